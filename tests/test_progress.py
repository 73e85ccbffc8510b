"""Long steps are shown where a command asks for it, and hand on their items in any case."""

import pytest

from fairseq_knnlm import progress
from fairseq_knnlm.progress import shown_by, track


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
