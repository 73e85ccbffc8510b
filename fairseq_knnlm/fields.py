"""What the fields of a JSON file, of a set of flags or of arguments may be, as small tables.

A table says of each field its kind: what it must be, in words and as a test. One function,
``faults``, compares values with a table and says what is wrong, field by field.
"""

import math
import numbers
from collections.abc import Iterator
from typing import Callable, NamedTuple

# What numpy counts rows in.
MOST = 2**63 - 1


class Kind(NamedTuple):
    """What a value must be: in words that follow "must be", and as a test that never raises."""

    expected: str
    holds: Callable[[object], bool]


def faults(value, kind: Kind, name: str = "") -> Iterator[str]:
    """What is wrong with a value.

    Args:
        value: what was read.
        kind (Kind): what it must be.
        name (str): of the value.

    Yields:
        str: for each fault the name, what it must be and what it is.
    """
    if not kind.holds(value):
        yield f"{name} must be {kind.expected}, got {brief(value)}"


def brief(value) -> str:
    """A value as text, not too long for a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- kinds -----------------------------------------------------------------------------------------


def is_whole(value, least: int, most: int = MOST) -> bool:
    """Whether a value is a whole number in a range; 1.0 and True are none.

    Args:
        value: of any type.
        least, most (int): ends of the range, both in it.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return whole and least <= value <= most


def is_number(value) -> bool:
    """Whether a value is a finite number; True is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    # A whole number of JSON may be larger than any float.
    return isinstance(value, numbers.Integral) or math.isfinite(value)


def whole(least: int, most: int = MOST) -> Kind:
    """The kind of whole numbers in a range.

    Args:
        least, most (int): ends of the range, both in it.
    """
    limit = "" if most == MOST else f" and <= {most}"
    return Kind(f"a whole number >= {least}{limit}", lambda value: is_whole(value, least, most))


def one_of(choices) -> Kind:
    """One of a few texts."""
    choices = tuple(choices)
    return Kind(
        f"one of {', '.join(choices)}", lambda value: isinstance(value, str) and value in choices
    )
