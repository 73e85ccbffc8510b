"""Long steps in fairseq's own bars: lines with rate and time in a log, tqdm in a terminal."""

import logging
import re

import pytest
from fairseq.logging import progress_bar

from fairseq_knnlm import progress
from fairseq_knnlm.plugin import bars
from fairseq_knnlm.plugin.bars import bars_like, in_bars
from fairseq_knnlm.progress import shown_by, track


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    monkeypatch.setattr(bars, "_LINE_EVERY_S", 0.0)


def shown(kind, caplog):
    """Items and log of a step that is shown in a bar of that kind."""
    outer = progress_bar.progress_bar(range(1), log_format=kind, log_interval=7)
    with caplog.at_level(logging.INFO), shown_by(in_bars(bars_like(outer))):
        items = list(track("neighbours", iter("abc"), 3))
    return items, caplog.text


def test_lines_of_a_log(caplog):
    items, text = shown("simple", caplog)
    assert items == ["a", "b", "c"]
    lines = re.findall(r"neighbours: +(\d) / 3 left=(.*), rate=(\S+)/s", text)
    assert [number for number, *_ in lines] == ["1", "2", "3"]
    assert all(left.endswith(" s") for _, left, _ in lines)


def test_json(caplog):
    items, text = shown("json", caplog)
    assert items == ["a", "b", "c"] and '"left": "0.0 s"' in text


def test_no_bar_where_none_is_wanted(caplog):
    assert shown("none", caplog) == (["a", "b", "c"], "")


def test_tqdm(capsys):
    outer = progress_bar.TqdmProgressBar([])
    bar = bars_like(outer)(progress.Remaining(iter("abc"), 3), "neighbours")
    assert list(bar) == ["a", "b", "c"]
    assert (
        bar.tqdm.total == 3
        and not hasattr(bar, "log_interval")
        and "neighbours" in capsys.readouterr().err
    )


def test_a_loader_without_a_bar_shows_none(caplog):
    with caplog.at_level(logging.INFO), shown_by(in_bars(bars_like(iter([])))):
        assert list(track("neighbours", iter("abc"), 3)) == ["a", "b", "c"]
    assert caplog.text == ""


@pytest.mark.parametrize(
    "per_second, text", [(0.01234, "0.0123/s"), (12.34, "12.3/s"), (12345.6, "12,346/s")]
)
def test_rates(per_second, text):
    assert bars._rate(per_second) == text
