"""Long steps (``progress.track``) in fairseq's own progress bars."""

import time
from collections.abc import Iterable, Iterator
from typing import Callable

from fairseq.logging.progress_bar import JsonProgressBar, SimpleProgressBar, TqdmProgressBar

from ..progress import Remaining
from ..units import in_time

# Bars that are lines of a log, with --log-format simple or json, have one so often. fairseq counts
# steps for that, which are of any length here.
_LINE_EVERY_S = 10.0


def in_bars(make_bar: Callable) -> Callable:
    """What ``progress.shown_by`` takes.

    Args:
        make_bar (callable): takes items with a length and ``prefix``; gives a bar of fairseq's.
    """

    def show(what: str, remaining: Remaining) -> Iterator:
        bar, count = make_bar(remaining, prefix=what), len(remaining)
        # Only a bar that writes lines has this. The other one, tqdm, says rate and time by itself.
        interval = getattr(bar, "log_interval", None)
        started = said = time.monotonic()
        for done, item in enumerate(bar, start=1):
            yield item
            now = time.monotonic()
            if interval and now - said >= _LINE_EVERY_S:
                said, seconds = now, (now - started) / done
                figures = {"left": in_time(seconds * (count - done)), "rate": _rate(1 / seconds)}
                bar.log(figures, tag="fairseq_knnlm.progress", step=interval)

    return show


def _rate(per_second: float) -> str:
    return f"{per_second:,.3g}/s" if per_second < 1000 else f"{per_second:,.0f}/s"


def bars_like(bar: Iterable) -> Callable:
    """Makes bars of the kind of another one, for ``in_bars``.

    Args:
        bar (iterable): what ``fairseq-eval-lm`` goes over; if it shows nothing, as with
            --log-format none, neither do those that are made.
    """
    options = {"log_interval": bar.log_interval} if hasattr(bar, "log_interval") else {}
    kind = type(bar) if type(bar) in (JsonProgressBar, SimpleProgressBar, TqdmProgressBar) else None

    def make_bar(items: Remaining, prefix: str) -> Iterable:
        return items if kind is None else kind(items, prefix=prefix, **options)

    return make_bar
