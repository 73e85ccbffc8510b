"""Sizes and durations as people write them."""

import pytest
from fairseq.logging import progress_bar

from fairseq_knnlm.units import Count, in_bytes, in_time


@pytest.mark.parametrize(
    "size, text",
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (4_510_000_000, "4.5 GB"),
        (99_949_999, "99.9 MB"),
        (99_950_000, "100 MB"),
        (211_408_939_008, "211 GB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1.0 GB"),
        (12e18, "12,000 PB"),
    ],
)
def test_sizes(size, text):
    assert in_bytes(size) == text


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (80, "1 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h"),
        (2 * 3600 + 5 * 60 + 10, "2 h 5 min"),
        (86400 - 20, "1 day"),
        (3 * 86400 + 4 * 3600, "3 days 4 h"),
    ],
)
def test_durations(seconds, text):
    assert in_time(seconds) == text


def test_counts_are_printed_in_all_their_digits(caplog):
    with caplog.at_level("INFO"):
        bar = progress_bar.SimpleProgressBar(range(2), prefix="dump", log_interval=1)
        for number in bar:
            bar.log({"entries": Count(1_245_184 + number)}, step=number)
        assert Count(3) + 1 == 4 and f"{Count(12_345):,}" == "12,345"
    assert "entries=1245185" in caplog.text
