"""The arguments of what Python users call, checked before anything is done: all faults at once."""

from .errors import UserError
from .fields import Kind, faults

TRUE_OR_FALSE = Kind("True or False", lambda value: isinstance(value, bool))


def check_arguments(owner: str, **arguments) -> None:
    """Refuse arguments that cannot be.

    Args:
        owner (str): the function or class that takes them, for the message.
        arguments (tuple): by its name, each value and its ``fields.Kind``.

    Raises:
        UserError: naming each that cannot be, what it must be and what it is.
    """
    refuse(
        owner,
        [fault for name, (value, kind) in arguments.items() for fault in faults(value, kind, name)],
    )


def refuse(owner: str, found: list) -> None:
    """Raise what was found wrong with the arguments of a function or class, if there is anything.

    Args:
        owner (str): the function or class.
        found (list of str): its faults.

    Raises:
        UserError: with all of them.
    """
    if found:
        raise UserError(f"{owner}: {'; '.join(found)}")


def or_none(kind: Kind) -> Kind:
    """The same kind, of an argument that may also be None."""
    return Kind(f"{kind.expected}, or None", lambda value: value is None or kind.holds(value))
