"""What one retrieval says beyond its best setting: the tables of a report.

The curves of Khandelwal et al. (2020), section 5, over k, lambda, temperature and datastore size;
perplexity by frequency of the target; and where neighbours help and where they hurt. Settings are
chosen on the split that is tuned on, figures are of the split that is reported on.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np
import torch

from .bootstrap import paired_interval
from .interpolation import interpolate, knn_log_probs
from .metrics import perplexity
from .neighbors_file import PARTS, Retrieved
from .sweep import (
    Prefixes,
    Setting,
    best,
    best_lambda,
    best_of_each_k,
    log_p_knn,
    mixture_perplexities,
)

# Shares of the datastore, in ``PARTS``.
_SIZES = (1, 2, 4, 8, 16)
# Of the k nearest of all, k / 16 are in the smallest share; nearly always half as many.
_COMMON_SHARE = 2 * PARTS
_LAMBDAS = 50
_ROWS = 2048
_COUNTED = 1 << 24
# Log-ratios are counted in steps of this, ...
BIN_NATS = 0.1
# ... the first and the last bin being open.
_FIRST_BIN_NATS, _LAST_BIN_NATS = -4.0, 7.0
_EXTREME_TYPES = 15
# With fewer documents or blocks an interval says nothing.
_MIN_UNITS = 10


class SizeSetting(NamedTuple):
    """A lambda for a part of the datastore.

    parts (int): how many of ``PARTS`` parts of the datastore.
    k (int): neighbours per query; None: all that are known of this part.
    knn_lambda (float): the best one on the split that is tuned on.
    """

    parts: int
    k: Optional[int]
    knn_lambda: float


def tune_sizes(retrieved: Retrieved, temperature: float) -> list[SizeSetting]:
    """The best lambda for every size of the datastore."""
    same_k = max(1, retrieved.distances.size(1) // _COMMON_SHARE)
    return [
        SizeSetting(parts, k, best_lambda(retrieved.log_p_lm, scores))
        for k in (same_k, None)
        for parts in _SIZES
        for scores in [log_p_knn_of_part(retrieved, parts, k, temperature)]
    ]


def log_p_knn_of_part(
    retrieved: Retrieved, parts: int, k: Optional[int], temperature: float
) -> torch.Tensor:
    """log p_knn of the targets with a random part of the datastore.

    The nearest neighbours of the part are those of the whole that are in it, as long as there are
    any among those that were retrieved.

    Args:
        retrieved (Retrieved): with ``parts``.
        parts (int): how many of ``PARTS`` parts.
        k (int): neighbours per query; None: all that are known.
        temperature (float): T > 0.

    Returns:
        Tensor: shape (N,), float32, natural log.
    """
    pieces = []
    columns = (retrieved.distances, retrieved.matches, retrieved.parts)
    for distances, matches, part in zip(*(column.split(_ROWS) for column in columns)):
        kept = part < parts
        if k is not None:
            kept &= kept.cumsum(dim=1, dtype=torch.int32) <= k
        found = torch.ones(len(part), dtype=torch.bool)
        distances = distances.masked_fill(~kept, math.inf)
        pieces.append(knn_log_probs(distances, matches & kept, found, temperature))
    return torch.cat(pieces)


def training_counts(datastores, types: int) -> np.ndarray:
    """How often each token is a value, shape (types,), int64."""
    counts = np.zeros(types, dtype=np.int64)
    for datastore in datastores:
        for start in range(0, len(datastore.values), _COUNTED):
            counts += np.bincount(datastore.values[start : start + _COUNTED], minlength=types)
    return counts


def tables(
    settings: Sequence[Setting],
    retrieved: Retrieved,
    retuned: bool,
    sizes: Sequence[SizeSetting],
    counts: np.ndarray,
    symbols: Sequence[str],
) -> dict:
    """All tables of a report: lists of rows, a dictionary each, by name.

    Args:
        settings: the grid, of the split that is tuned on.
        retrieved (Retrieved): of the split that is reported on, with targets and documents.
        retuned (bool): whether that is another split than the one that is tuned on.
        sizes: from ``tune_sizes``, of the split that is tuned on.
        counts (ndarray): shape (V,), from ``training_counts``.
        symbols: shape (V,), the dictionary.
    """
    chosen = best(settings)
    (scores,) = log_p_knn(retrieved, [chosen.k], chosen.temperature)
    mixed = interpolate(retrieved.log_p_lm, scores, chosen.knn_lambda)
    log_p_lm, mixed = retrieved.log_p_lm.double().numpy(), mixed.double().numpy()
    targets, log_ratios = retrieved.targets.numpy(), mixed - log_p_lm
    at_chosen_temperature = [each for each in settings if each.temperature == chosen.temperature]
    curves = {
        "k": best_of_each_k(settings),
        "k_at_temperature": best_of_each_k(at_chosen_temperature),
        "temperature": _best_of_each_temperature(settings),
    }
    return {
        "grid": [setting._asdict() for setting in settings],
        **dict(zip(curves, _evaluated(retrieved, list(curves.values()), retuned))),
        "lambda": list(_lambda_curve(retrieved.log_p_lm, scores, chosen.knn_lambda)),
        "size": list(_size_curve(retrieved, sizes, chosen.temperature, counts.sum())),
        "found": list(_found(retrieved.matches, sorted({each.k for each in settings}))),
        "frequency": list(
            _by_frequency(counts[targets], log_p_lm, mixed, retrieved.document_starts)
        ),
        "log_ratio": list(_histogram(log_ratios)),
        "types": list(_extreme_types(targets, log_ratios, counts, symbols)),
        "helped_or_hurt": [_helped_or_hurt(log_ratios)],
    }


# -- curves ----------------------------------------------------------------------------------------


def _best_of_each_temperature(settings: Sequence[Setting]) -> list[Setting]:
    by_temperature: dict = {}
    for setting in sorted(settings, key=lambda setting: setting.temperature):
        by_temperature.setdefault(setting.temperature, []).append(setting)
    return [best(some) for some in by_temperature.values()]


def _evaluated(retrieved: Retrieved, curves, retuned: bool) -> Iterator[list[dict]]:
    """The settings of each curve with their perplexity here and on the split that is tuned on."""
    wanted = sorted({setting for curve in curves for setting in curve})
    found = {setting: setting.perplexity for setting in wanted}
    if retuned:
        prefixes = Prefixes(retrieved, sorted({setting.k for setting in wanted}))
        for temperature in sorted({setting.temperature for setting in wanted}):
            scores = dict(zip(prefixes.ks, prefixes.log_p_knn(temperature)))
            for setting in wanted:
                if setting.temperature == temperature:
                    (found[setting],) = mixture_perplexities(
                        retrieved.log_p_lm, scores[setting.k], [setting.knn_lambda]
                    )
    for curve in curves:
        yield [
            {
                **setting._asdict(),
                "perplexity": found[setting],
                "tuned_perplexity": setting.perplexity,
            }
            for setting in curve
        ]


def _lambda_curve(log_p_lm, scores, chosen: float) -> Iterator[dict]:
    lambdas = sorted({chosen, *(step / _LAMBDAS for step in range(_LAMBDAS))})
    for knn_lambda, found in zip(lambdas, mixture_perplexities(log_p_lm, scores, lambdas)):
        yield {"knn_lambda": knn_lambda, "perplexity": found}


def _size_curve(retrieved, sizes, temperature: float, entries: int) -> Iterator[dict]:
    for setting in sizes:
        counted = _known(retrieved, setting.parts)
        limit = setting.k or retrieved.distances.size(1)
        scores = log_p_knn_of_part(retrieved, setting.parts, setting.k, temperature)
        yield {
            "share": setting.parts / PARTS,
            "entries": round(int(entries) * setting.parts / PARTS),
            "k": setting.k,
            "mean_neighbors": counted.clamp(max=limit).double().mean().item(),
            "queries_with_fewer": (
                None if setting.k is None else (counted < setting.k).double().mean().item()
            ),
            "knn_lambda": setting.knn_lambda,
            "perplexity": perplexity(interpolate(retrieved.log_p_lm, scores, setting.knn_lambda)),
        }


def _known(retrieved: Retrieved, parts: int) -> torch.Tensor:
    """How many of the retrieved neighbours are in a part, shape (N,)."""
    pieces = zip(retrieved.distances.split(_ROWS), retrieved.parts.split(_ROWS))
    return torch.cat(
        [((part < parts) & (distances < math.inf)).sum(dim=1) for distances, part in pieces]
    )


def _found(matches: torch.Tensor, ks: Sequence[int]) -> Iterator[dict]:
    """Share of the targets that are among the k nearest."""
    first = torch.where(matches.any(dim=1), matches.byte().argmax(dim=1), matches.size(1))
    for k in ks:
        yield {"k": k, "targets_found": (first < k).double().mean().item()}


# -- tokens ----------------------------------------------------------------------------------------


def _by_frequency(frequencies, log_p_lm, mixed, document_starts) -> Iterator[dict]:
    """Perplexity by how often the target is in the training text: 0, 1-9, 10-99, ..."""
    digits = np.where(frequencies > 0, np.floor(np.log10(np.maximum(frequencies, 1))) + 1, 0)
    for digit in np.unique(digits).astype(int).tolist():
        rows = np.flatnonzero(digits == digit)
        starts = np.searchsorted(rows, document_starts)
        change = paired_interval(log_p_lm[rows], mixed[rows], starts[starts < len(rows)])
        sure = change.units >= _MIN_UNITS
        yield {
            "lowest": 10 ** (digit - 1) if digit else 0,
            "highest": 10**digit - 1 if digit else 0,
            "tokens": len(rows),
            "share": len(rows) / len(frequencies),
            "base_perplexity": perplexity(log_p_lm[rows]),
            "knn_perplexity": perplexity(mixed[rows]),
            "relative_change": change.value,
            "low": change.low if sure else None,
            "high": change.high if sure else None,
            "nats": float((mixed[rows] - log_p_lm[rows]).sum()),
        }


def _helped_or_hurt(log_ratios: np.ndarray) -> dict:
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
    # exact zeros are neither help nor harm, but they belong somewhere
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


def _extreme_types(targets, log_ratios, counts, symbols) -> Iterator[dict]:
    """The targets that gain most and those that lose most, all their occurrences together."""
    nats = np.bincount(targets, log_ratios, len(counts))
    seen = np.bincount(targets, minlength=len(counts))
    order = np.argsort(nats, kind="stable")
    lost = [token for token in order[:_EXTREME_TYPES] if nats[token] < 0]
    gained = [token for token in order[::-1][:_EXTREME_TYPES] if nats[token] > 0]
    for token in gained + lost:
        yield {
            "token": symbols[token],
            "nats": float(nats[token]),
            "occurrences": int(seen[token]),
            "training_count": int(counts[token]),
            "mean_log_ratio": float(nats[token] / seen[token]),
        }
