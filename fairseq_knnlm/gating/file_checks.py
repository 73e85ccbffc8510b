"""What the file of a gate must hold, beyond being whole: numbers that a gate can have."""

from collections.abc import Iterator

import numpy as np

from ..fields import Kind, Record, faults, is_number, list_of, one_of, whole
from .features import SCALARS_BEFORE, scalars_after
from .gates import MEASURES
from .ngram_counts import ORDERS

# What float32 holds, and so does what is computed of it.
_LEAST, _MOST = 1e-18, 1e18
_NUMBER = Kind(f"within {_MOST:g} of 0", lambda value: is_number(value) and abs(value) <= _MOST)
_POSITIVE = Kind(
    f"in [{_LEAST:g}, {_MOST:g}]", lambda value: is_number(value) and _LEAST <= value <= _MOST
)
_SHARE = Kind("in [0, 1)", lambda value: is_number(value) and 0 <= value < 1)
_SIZES = {
    "networks": whole(1),
    **dict.fromkeys(("scalars", "states", "outputs", "hidden", "reduced"), whole(1)),
}
# Numbers of each kind of gate beside its k.
_ABOUT = {
    "buckets": {"temperature": _POSITIVE, "measure": one_of(MEASURES)},
    "nest": {"temperature": _POSITIVE, "alpha": _NUMBER, "tau": _POSITIVE, "cache_share": _SHARE},
    "learned": {
        "temperatures": list_of(_POSITIVE, f"numbers in [{_LEAST:g}, {_MOST:g}]"),
        "unit": _POSITIVE,
        "types": whole(1),
        "orders": whole(ORDERS, ORDERS),
        "cache_share": _SHARE,
        "before": Record(_SIZES, {}),
        "after": Record(_SIZES, {}),
    },
}
# Weights may be rounded to a little more than 1 together.
_ROUNDING = 1e-5


def refuse_impossible(kind: str, about: dict, arrays: dict) -> None:
    """Refuse numbers that no gate of a kind has.

    Args:
        kind (str): as in ``--knn-gate``.
        about (dict): its numbers by name.
        arrays (dict): its arrays by name.

    Raises:
        KeyError: if there is no such kind, or an array is missing.
        ValueError: naming what cannot be.
    """
    found = list(faults(about, Record({"k": whole(1), **_ABOUT[kind]}, {})))
    found = found or list(_ARRAY_FAULTS[kind](about, arrays))
    if found:
        raise ValueError("; ".join(found))


def _bucket_faults(about: dict, arrays: dict) -> Iterator[str]:
    edges, knn, cache = (arrays[name] for name in ("edges", "knn_lambdas", "cache_lambdas"))
    # One may be infinite: beyond it there is no neighbour.
    if not _is_row(edges, infinite=True) or not (np.diff(edges) > 0).all():
        yield "edges must be numbers, ascending"
    elif not (_is_row(knn) and _is_row(cache) and len(knn) == len(cache) == len(edges) + 1):
        yield "each bucket must have one weight of neighbours and one of the cache"
    elif min(knn.min(), cache.min()) < 0 or (knn + cache).max() > 1 + _ROUNDING:
        yield "weights must be >= 0, and at most 1 together"


def _learned_faults(about: dict, arrays: dict) -> Iterator[str]:
    if not (_is_row(arrays["quantiles"]) and (np.diff(arrays["quantiles"]) >= 0).all()):
        yield "quantiles must be finite and ascending"
    temperatures, before, after = len(about["temperatures"]), about["before"], about["after"]
    if before["scalars"] != SCALARS_BEFORE or before["outputs"] != 1:
        yield "the networks before the search are of other sizes"
    scalars = SCALARS_BEFORE + scalars_after(about["k"])
    # the model's weight, those of p_knn at each temperature and, with a cache, its own
    outputs = (1 + temperatures, 2 + temperatures)
    if after["scalars"] != scalars or after["outputs"] not in outputs:
        yield "the networks after the search are of other sizes"
    if before["states"] != after["states"]:
        yield "the networks are of hidden states of different sizes"
    for number in range(ORDERS):
        yield from _order_faults(number, arrays)
    floats = [name for name, array in arrays.items() if array.dtype.kind == "f"]
    if not all(np.isfinite(arrays[name]).all() for name in floats):
        yield "a weight of a network is not finite"


def _order_faults(number: int, arrays: dict) -> Iterator[str]:
    grams, *counts = (arrays[f"{name}.{number}"] for name in ("grams", "counts", "successors"))
    if grams.dtype != np.int64 or grams.ndim != 1 or (np.diff(grams) <= 0).any():
        yield f"grams.{number} must be whole numbers, ascending"
    if any(each.dtype != np.uint32 or each.shape != grams.shape for each in counts):
        yield f"counts.{number} and successors.{number} must be of all n-grams"


def _is_row(array: np.ndarray, infinite: bool = False) -> bool:
    """Whether an array has one dimension and numbers of float32, finite unless they may be not."""
    numbers = ~np.isnan(array) if infinite else np.isfinite(array)
    return array.dtype == np.float32 and array.ndim == 1 and bool(numbers.all())


_ARRAY_FAULTS = {
    "buckets": _bucket_faults,
    "nest": lambda about, arrays: (),
    "learned": _learned_faults,
}
