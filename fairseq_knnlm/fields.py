"""What the fields of a JSON file, of a set of flags or of arguments may be, as small tables.

A table says of each field its kind: what it must be, in words and as a test. One function,
``faults``, compares values with a table and says what is wrong, field by field.
"""

import math
import numbers
import re
from collections.abc import Iterator
from typing import Callable, NamedTuple, Union

# What numpy counts rows in.
MOST = 2**63 - 1


class Kind(NamedTuple):
    """What a value must be: in words that follow "must be", and as a test that never raises."""

    expected: str
    holds: Callable[[object], bool]


class Record(NamedTuple):
    """A dict with fields of its own; further ones are allowed.

    required (dict): the kind of each field that must be there, by its name.
    optional (dict): the kind of each field that may be there.
    """

    required: dict
    optional: dict

    expected = "a dict"


def faults(value, kind: Union[Kind, Record], name: str = "") -> Iterator[str]:
    """What is wrong with a value.

    Args:
        value: what was read.
        kind (Kind or Record): what it must be.
        name (str): of the value, in front of those of its fields; "" for a whole file.

    Yields:
        str: for each fault the name of the field, what it must be and what it is.
    """
    if isinstance(kind, Kind):
        if not kind.holds(value):
            yield f"{name} must be {kind.expected}, got {brief(value)}"
        return
    if not isinstance(value, dict):
        yield f"{name or 'it'} must be {kind.expected}, got {brief(value)}"
        return
    for part, of_part in {**kind.required, **kind.optional}.items():
        full = f"{name}.{part}" if name else part
        if part in value:
            yield from faults(value[part], of_part, full)
        elif part in kind.required:
            yield f"{full} is missing, it must be {of_part.expected}"


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


def matching(pattern: str, expected: str) -> Kind:
    """A text of which a regular expression describes the whole.

    Args:
        pattern (str): the expression.
        expected (str): the same in words.
    """
    compiled = re.compile(pattern)
    return Kind(
        expected, lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None
    )


def list_of(kind: Kind, plural: str) -> Kind:
    """A list whose elements are all of one kind.

    Args:
        kind (Kind): of each element.
        plural (str): the elements in words.
    """
    return Kind(
        f"a list of {plural}",
        lambda value: isinstance(value, list) and all(map(kind.holds, value)),
    )


def or_null(kind: Kind) -> Kind:
    """The same, or null."""
    return Kind(f"{kind.expected}, or null", lambda value: value is None or kind.holds(value))


TEXT = Kind("a text that is not empty", lambda value: isinstance(value, str) and value != "")
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
POSITIVE = Kind("a finite number > 0", lambda value: is_number(value) and value > 0)
TEXTS_BY_NAME = Kind(
    "a dict of texts",
    lambda value: isinstance(value, dict) and all(isinstance(v, str) for v in value.values()),
)
CHECKSUM = matching("[0-9a-f]{8}", "8 hexadecimal digits")
CHECKSUMS = list_of(CHECKSUM, "checksums of 8 hexadecimal digits")
SHA256 = matching("[0-9a-f]{64}", "64 hexadecimal digits")
