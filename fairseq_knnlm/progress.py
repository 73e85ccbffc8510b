"""How far a long step is: the library says it, a command shows it, as with logging.

A loop that may take a minute goes over ``track(...)`` of its items. Nothing is shown unless a
command has said how (``shown_by``), and then only of steps that last.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Callable, Optional, TypeVar

Item = TypeVar("Item")

# A step that is done sooner needs no bar.
PATIENCE_S = 2.0

_show: ContextVar[Optional[Callable]] = ContextVar("show", default=None)


class Remaining:
    """What is left of a loop, with its length, as progress bars want it.

    Args:
        items (Iterator): those that are left.
        count (int): how many.
    """

    def __init__(self, items: Iterator, count: int):
        self._items = items
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator:
        return self._items


def track(what: str, items: Iterable[Item], count: int) -> Iterator[Item]:
    """Hand on the items of a loop; where progress is shown, it is seen how far the loop is.

    Args:
        what (str): the step in a word or two, such as ``index``.
        items (iterable): to be handed on.
        count (int): how many they are.

    Yields:
        the items.
    """
    show, started, done = _show.get(), time.monotonic(), 0
    items = iter(items)
    while show is None or done >= count or time.monotonic() - started < PATIENCE_S:
        try:
            item = next(items)
        except StopIteration:
            return
        yield item
        done += 1
    yield from show(what, Remaining(items, count - done))


@contextlib.contextmanager
def shown_by(show: Callable) -> Iterator[None]:
    """Within this context, steps that last are shown.

    Args:
        show (callable): takes what the step is and a ``Remaining``; gives an iterator over the
            same items, which shows how far it is.
    """
    token = _show.set(show)
    try:
        yield
    finally:
        _show.reset(token)
