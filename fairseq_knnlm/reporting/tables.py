"""What one retrieval says beyond its best setting: the tables of a report.

The curves of Khandelwal et al. (2020), section 5, over k, lambda, temperature and datastore size;
perplexity by frequency of the target; and where neighbours help and where they hurt. Settings are
chosen on the split that is tuned on, figures are of the split that is reported on.
"""

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Optional

import numpy as np
import torch

from ..probability.metrics import perplexity
from ..probability.mixture import mix
from ..tuning.grid import CacheGridPoint, KNNGridPoint, Point, best
from ..tuning.knn_sweep import Prefixes, best_of_each_k, log_p_knn
from ..tuning.tuning_data import TuningData
from .intervals import change_between, perplexity_with_bounds, starts_within
from .sizes import SizePoint, size_curve

# Steps of the curve over lambda.
_LAMBDAS = 50
# Values that are counted together: they may be more than memory holds.
_BATCH_VALUES = 1 << 24
# Width of a bin of the histogram of log-ratios.
BIN_NATS = 0.1
# Where the first bin ends and where the last one begins; both are open on the other side.
_FIRST_BIN_NATS, _LAST_BIN_NATS = -4.0, 7.0
# So many words that gain most are listed, and as many that lose most.
_EXTREME_TYPES = 15


def training_counts(datastores: Sequence, types: int) -> np.ndarray:
    """How often each token is a value.

    Args:
        datastores (sequence of Datastore): all that were searched.
        types (int): V, the size of the dictionary.

    Returns:
        ndarray: shape (V,), int64.
    """
    counts = np.zeros(types, dtype=np.int64)
    for datastore in datastores:
        for start in range(0, len(datastore.values), _BATCH_VALUES):
            batch = datastore.values[start : start + _BATCH_VALUES]
            counts += np.bincount(batch, minlength=types)
    return counts


def make_tables(
    knn_grid: Sequence[KNNGridPoint],
    cache_grid: Sequence[CacheGridPoint],
    data: TuningData,
    sizes: Sequence[SizePoint],
    counts: np.ndarray,
    dictionary,
    word_starts: Optional[np.ndarray] = None,
) -> dict:
    """All tables of a report: lists of rows, a dictionary each, by name.

    Args:
        knn_grid (sequence of KNNGridPoint): all that was tried on the split that is tuned on.
        cache_grid (sequence of CacheGridPoint): the same, of a cache besides neighbours; empty
            without one.
        data (TuningData): of the split that is reported on, with targets and documents.
        sizes (sequence of SizePoint): from ``tune_sizes``, of the split that is tuned on.
        counts (ndarray): shape (V,), from ``training_counts``.
        dictionary: fairseq's, of V types.
        word_starts (ndarray): shape (W,), rows of *data* at which words begin: the perplexities of
            curves are of these, as those of *knn_grid* are; None: of the targets. What is said of
            single targets is of targets in either case.

    Returns:
        dict: ``grid``; the curves ``k``, ``k_at_temperature``, ``temperature``, ``lambda`` and
        ``size``; ``cache_grid``, and its curves ``cache_size`` and ``cache_theta`` of the split
        that is tuned on; ``found``, ``frequency``, ``unknown``, ``log_ratio``, ``types`` and
        ``helped_or_hurt``.
    """
    chosen = best(knn_grid)
    (scores,) = log_p_knn(data, [chosen.k], chosen.temperature)
    mixed = mix(data.log_p_lm, scores, knn_lambda=chosen.knn_lambda)
    targets = _Targets(data, mixed, counts, dictionary)
    same_temperature = [point for point in knn_grid if point.temperature == chosen.temperature]
    curves = {
        "k": best_of_each_k(knn_grid),
        "k_at_temperature": best_of_each_k(same_temperature),
        "temperature": _best_of_each("temperature", knn_grid),
    }
    return {
        "grid": _rows(knn_grid),
        **dict(zip(curves, _evaluated(data, list(curves.values()), word_starts))),
        "lambda": list(_lambda_curve(data, scores, chosen.knn_lambda, word_starts)),
        "size": list(size_curve(data, sizes, chosen.temperature, counts.sum(), word_starts)),
        "cache_grid": _rows(cache_grid),
        "cache_size": _rows(_best_of_each("cache_size", cache_grid)),
        "cache_theta": _rows(_best_of_each("cache_theta", cache_grid)),
        "found": list(_targets_found(data.matches, sorted({point.k for point in knn_grid}))),
        "frequency": list(targets.by_frequency()),
        "unknown": list(targets.known_and_unknown()),
        "log_ratio": list(_histogram(targets.log_ratios)),
        "types": list(targets.extreme_types()),
        "helped_or_hurt": [helped_or_hurt(targets.log_ratios)],
    }


# -- curves ----------------------------------------------------------------------------------------


def _rows(points: Iterable[Point]) -> list[dict]:
    return [point._asdict() for point in points]


def _best_of_each(name: str, grid: Sequence[Point]) -> list[Point]:
    """The best points among those of each value of one setting, the smallest value first."""
    of_value: dict = {}
    for point in sorted(grid, key=operator.attrgetter(name)):
        of_value.setdefault(getattr(point, name), []).append(point)
    return [best(points) for points in of_value.values()]


def _evaluated(
    data: TuningData, curves: Sequence[Sequence[KNNGridPoint]], word_starts
) -> Iterator[list[dict]]:
    """The points of each curve with their perplexity here and on the split that is tuned on."""
    points = sorted({point for curve in curves for point in curve})
    prefixes = Prefixes(data, sorted({point.k for point in points}))
    rows = {}
    for temperature in sorted({point.temperature for point in points}):
        scores = dict(zip(prefixes.ks, prefixes.log_p_knn(temperature)))
        for point in points:
            if point.temperature == temperature:
                mixed = mix(data.log_p_lm, scores[point.k], knn_lambda=point.knn_lambda)
                rows[point] = {
                    **point._asdict(),
                    **perplexity_with_bounds(data, mixed, word_starts),
                    "tuned_perplexity": point.perplexity,
                }
    for curve in curves:
        yield [rows[point] for point in curve]


def _lambda_curve(
    data: TuningData, scores: torch.Tensor, chosen: float, word_starts
) -> Iterator[dict]:
    for knn_lambda in sorted({chosen, *(step / _LAMBDAS for step in range(_LAMBDAS))}):
        mixed = mix(data.log_p_lm, scores, knn_lambda=knn_lambda)
        yield {"knn_lambda": knn_lambda, **perplexity_with_bounds(data, mixed, word_starts)}


def _targets_found(matches: torch.Tensor, ks: Sequence[int]) -> Iterator[dict]:
    """Share of the targets that are among the k nearest."""
    first = torch.where(matches.any(dim=1), matches.byte().argmax(dim=1), matches.size(1))
    for k in ks:
        yield {"k": k, "targets_found": (first < k).double().mean().item()}


# -- tokens ----------------------------------------------------------------------------------------


class _Targets:
    """The targets of a text, ``<unk>`` apart: it stands for many words, and is among the most
    frequent tokens where each of them is rare.

    Args:
        data (TuningData): with targets and documents.
        mixed (Tensor): shape (N,), log p of the targets by the mixture.
        counts (ndarray): shape (V,), how often each token is in the datastore.
        dictionary: fairseq's.
    """

    def __init__(self, data: TuningData, mixed: torch.Tensor, counts: np.ndarray, dictionary):
        self._targets, self._document_starts = data.targets.numpy(), data.document_starts
        self._log_p_lm, self._mixed = data.log_p_lm.double().numpy(), mixed.double().numpy()
        self.log_ratios = self._mixed - self._log_p_lm
        self._counts, self._dictionary = counts, dictionary
        self._is_known = self._targets != dictionary.unk()

    def by_frequency(self) -> Iterator[dict]:
        """Perplexity by how often the target is in the datastore: 0, 1-9, 10-99, ..."""
        frequencies = self._counts[self._targets]
        digits = np.where(frequencies > 0, np.floor(np.log10(np.maximum(frequencies, 1))) + 1, 0)
        for digit in np.unique(digits[self._is_known]).astype(int).tolist():
            yield {
                "lowest": 10 ** (digit - 1) if digit else 0,
                "highest": 10**digit - 1 if digit else 0,
                **self._of(self._is_known & (digits == digit)),
            }

    def known_and_unknown(self) -> Iterator[dict]:
        """Perplexity of the words that the model knows, and of ``<unk>``, if there is any."""
        for words, which in (("known", self._is_known), ("<unk>", ~self._is_known)):
            if which.any():
                yield {"words": words, **self._of(which)}

    def _of(self, which: np.ndarray) -> dict:
        """What neighbours change of some of the targets; *which*: shape (N,), bool."""
        rows = np.flatnonzero(which)
        log_p_lm, mixed = self._log_p_lm[rows], self._mixed[rows]
        return {
            "tokens": len(rows),
            "share": len(rows) / len(which),
            "base_perplexity": perplexity(log_p_lm),
            "knn_perplexity": perplexity(mixed),
            **change_between(log_p_lm, mixed, starts_within(rows, self._document_starts)),
            "nats": float((mixed - log_p_lm).sum()),
        }

    def extreme_types(self) -> Iterator[dict]:
        """The words that gain most and those that lose most, all their occurrences together."""
        targets = self._targets[self._is_known]
        nats = np.bincount(targets, self.log_ratios[self._is_known], len(self._counts))
        seen = np.bincount(targets, minlength=len(self._counts))
        order = np.argsort(nats, kind="stable")
        lost = [token for token in order[:_EXTREME_TYPES] if nats[token] < 0]
        gained = [token for token in order[::-1][:_EXTREME_TYPES] if nats[token] > 0]
        for token in gained + lost:
            yield {
                "token": self._dictionary[token],
                "nats": float(nats[token]),
                "occurrences": int(seen[token]),
                "training_count": int(self._counts[token]),
                "mean_log_ratio": float(nats[token] / seen[token]),
            }


def helped_or_hurt(log_ratios: np.ndarray) -> dict:
    """Whom a mixture helps and whom it hurts, of log-ratios to p_lm of shape (N,)."""
    helped, hurt = log_ratios > 0, log_ratios < 0
    return {
        "tokens": len(log_ratios),
        "helped": float(helped.mean()),
        "hurt": float(hurt.mean()),
        "nats_gained": float(log_ratios[helped].sum()),
        "nats_lost": float(log_ratios[hurt].sum()),
        "median": float(np.median(log_ratios)),
        "doubled": float((log_ratios >= math.log(2)).mean()),
        "halved": float((log_ratios <= -math.log(2)).mean()),
    }


def _histogram(log_ratios: np.ndarray) -> Iterator[dict]:
    """Tokens by ln(p_mixture / p_lm); the first and the last bin are open."""
    first, last = round(_FIRST_BIN_NATS / BIN_NATS), round(_LAST_BIN_NATS / BIN_NATS)
    # A log-ratio of exactly 0 is neither help nor harm; it is counted in the bin that begins at 0.
    bins = np.floor(np.clip(log_ratios / BIN_NATS, first, last)).astype(int)
    lowest = int(bins.min())
    tokens = np.bincount(bins - lowest)
    nats = np.bincount(bins - lowest, log_ratios)
    for number, (count, total) in enumerate(zip(tokens, nats), start=lowest):
        yield {
            "from": round(number * BIN_NATS, 1) if number > first else None,
            "to": round((number + 1) * BIN_NATS, 1) if number < last else None,
            "tokens": int(count),
            "nats": float(total),
        }
