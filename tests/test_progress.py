"""Long steps are shown where a command asks for it, and hand on their items in any case."""

import numpy as np
import pytest
import torch

from fairseq_knnlm import progress
from fairseq_knnlm.progress import shown_by, track
from fairseq_knnlm.search.exact_search import ExactSearch
from fairseq_knnlm.search.exhaustive_search import ExhaustiveSearch
from fairseq_knnlm.search.index_build import load
from fairseq_knnlm.search.index_search import IndexSearch


@pytest.fixture
def shown(monkeypatch):
    """Shows every step at once; gives what was shown."""
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    seen = []

    def show(what, remaining):
        seen.append((what, len(remaining)))
        yield from remaining

    with shown_by(show):
        yield seen


def test_nothing_is_shown_by_itself(monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    assert list(track("step", iter(range(5)), 5)) == [0, 1, 2, 3, 4]


def test_a_step_that_lasts_is_shown_with_its_length(shown):
    assert list(track("step", iter(range(5)), 5)) == [0, 1, 2, 3, 4]
    assert shown == [("step", 5)]


def test_a_short_step_is_not_shown(shown, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE_S", 60.0)
    assert list(track("step", range(5), 5)) == [0, 1, 2, 3, 4]
    assert shown == []


def test_a_step_is_shown_from_the_moment_that_it_lasts(shown, monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(progress, "PATIENCE_S", 2.5)
    assert list(track("step", range(6), 6)) == [0, 1, 2, 3, 4, 5]
    assert shown == [("step", 4)]


def test_more_items_than_were_said_are_handed_on(shown):
    assert list(track("step", range(5), 2)) == [0, 1, 2, 3, 4]


def test_items_are_asked_for_one_at_a_time(shown):
    taken = []
    for item in track("step", (taken.append(n) or n for n in range(3)), 3):
        assert taken == list(range(item + 1))


def test_nothing_is_shown_after_the_command(shown):
    with shown_by(lambda what, remaining: iter(["other"])):
        assert list(track("step", range(2), 2)) == ["other"]
    assert list(track("step", range(2), 2)) == [0, 1]


def make_search(kind, keys, path):
    values = np.zeros(len(keys), dtype=np.uint16)
    if kind == "exhaustive":
        return ExhaustiveSearch(keys, values, "l2", device=torch.device("cpu"))
    if kind == "index":
        return IndexSearch(None, values, "l2", index=load(path))
    return ExactSearch(keys, values, "l2", index=load(path))


@pytest.mark.parametrize(
    "kind, steps",
    [
        ("exact", ["neighbours, pass 1 of 2", "neighbours, pass 2 of 2"]),
        ("index", ["neighbours"]),
        ("exhaustive", ["neighbours"]),
    ],
)
def test_searches_are_shown(shown, kind, steps, keys, queries, index_path):
    search = make_search(kind, keys, index_path("IVF8,PQ8"))
    shown.clear()  # the index may have been built just now
    found = search.search(torch.from_numpy(queries), 32)
    assert list(dict.fromkeys(what for what, _ in shown)) == steps
    with shown_by(None):
        again = search.search(torch.from_numpy(queries), 32)
    assert torch.equal(found.ids, again.ids)
