"""The type of the rounded products of a search: the one that costs least on this machine.

Names of instruction sets do not tell which that is. On a CPU with AVX-512 but without bfloat16
units bfloat16 is five times slower than float32, and a virtual machine can hide units. So all are
timed, on matrices of the shape that the search multiplies, together with distances of the pairs
that pass because of rounding. Every type finds the same neighbours: ``near_pairs`` allows for what
is rounded.
"""

import functools
import logging
import os
import time
from typing import Callable, Optional

import numpy as np
import torch

from ..errors import UserError
from .float_products import FloatProducts, columns
from .integer_products import IntegerProducts, multiplies_integers
from .inverted_lists import pair_distances
from .list_blocks import are_near, padded, queries_of_block
from .near_pairs import Products
from .threads import one_thread_each

logger = logging.getLogger(__name__)

# The environment variable that forces a type, for comparisons.
FORCED = "FAIRSEQ_KNNLM_PRODUCTS"
# Each type, and the share of all pairs that pass because of its rounding. Measured on 2 million
# keys of 256 dimensions and 1,024 neighbours, where 4.8% pass without.
TYPES = {"float32": 0.0, "bfloat16": 0.0033, "int8": 0.0083}

# Queries, as many as are enough to tell types apart.
_QUERIES = 512
# Turns that are timed, of which the shortest counts: other programs can only lengthen one.
_TURNS = 4


def forced_type() -> Optional[str]:
    """The type that the environment forces, one of ``TYPES``; None where it forces none.

    Raises:
        UserError: if it names another, or one that cannot be here.
    """
    name = os.environ.get(FORCED) or None
    if name is not None and name not in TYPES:
        raise UserError(f"{FORCED} must be one of {', '.join(TYPES)}, or not set, got {name!r}")
    if name is not None and name not in usable_types():
        raise UserError(
            f"{FORCED}={name}: this CPU, or torch {torch.__version__}, has no exact products of "
            f"8-bit integers (they need VNNI or AMX); use {' or '.join(usable_types())}"
        )
    return name


def usable_types() -> list[str]:
    """Those of ``TYPES`` whose products this machine has."""
    return [name for name in TYPES if name != "int8" or multiplies_integers()]


def choose_products(metric: str, dimension: int, keys: int) -> Products:
    """The products of a search: of the forced type, or of the fastest, measured once a process.

    Args:
        metric (str): ``l2`` or ``ip``.
        dimension (int): D of the keys.
        keys (int): of a typical block.

    Raises:
        UserError: if the environment forces a type that cannot be.
    """
    return products_of(forced_type() or _fastest(dimension, padded(keys)), metric, dimension)


def products_of(name: str, metric: str, dimension: int) -> Products:
    """The products of a type, one of ``TYPES``; metric and dimension as ``choose_products``."""
    if name == "int8":
        return IntegerProducts(metric, dimension)
    return FloatProducts(getattr(torch, name), metric, dimension)


@functools.cache
def _fastest(dimension: int, keys: int) -> str:
    queries = queries_of_block(max(keys, columns(dimension)), _QUERIES)
    names = usable_types()
    with one_thread_each():
        turns = {name: _turn(name, dimension, queries, keys) for name in names}
        for turn in turns.values():
            turn()  # a kernel is compiled for every shape
        seconds = dict.fromkeys(names, float("inf"))
        for _ in range(_TURNS):
            for name, turn in turns.items():
                start = time.thread_time()  # a busy machine does not lengthen it
                turn()
                seconds[name] = min(seconds[name], time.thread_time() - start)
    fastest = min(seconds, key=seconds.get)
    costs = ", ".join(f"{name} {1000 * each:.2f} ms" for name, each in seconds.items())
    logger.info(f"products in {fastest}: {queries} queries with {keys} keys take {costs}")
    return fastest


def _turn(name: str, dimension: int, count: int, keys: int) -> Callable:
    """What a search does for each block, where only pairs pass that pass because of rounding."""
    rows, passed = np.arange(count), int(TYPES[name] * count * keys)
    queries, block = (np.ones((size, dimension), np.float32) for size in (count, keys))
    pairs = (np.arange(passed) * size // max(1, passed) for size in (count, keys))
    products = products_of(name, "l2", dimension)
    sides, scratch = products.query_sides(queries), products.scratch(keys)
    products.write_queries(sides, slice(None), np.zeros(count, np.float32))
    distances = functools.partial(pair_distances("l2"), queries, next(pairs), block, next(pairs))

    def turn():
        right = products.write_keys(scratch, block)
        are_near(products.multiply(scratch, sides, rows, right))
        distances()

    return turn
