"""Nearest first, and of equal distances the lower id first.

On the host a distance and an id are packed into one 64-bit integer that sorts by distance, then by
id: the upper half holds the distance in bits that sort as integers, the lower half the id.
"""

import sys

import numpy as np
import torch

# An id has 32 bits, and the largest number stands for "no neighbour".
MAX_KEYS = (1 << 32) - 1
# A packed entry behind all others.
NO_ENTRY = np.iinfo(np.uint64).max
_SIGN = np.uint32(1 << 31)
# Places of the two halves of a 64-bit integer in memory.
_LOW, _HIGH = (0, 1) if sys.byteorder == "little" else (1, 0)


def nearest_first(distances: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of the candidates of each query, in order.

    Args:
        distances (ndarray): shape (n, m), float32; where there is no entry, above all others.
        ids (ndarray): shape (n, m), int64, -1 where there is no entry.
        k (int): neighbours, at most m.

    Returns:
        tuple: distances, +inf where there is no entry, and ids, each of shape (n, k).
    """
    packed = pack(distances, ids)
    packed.sort(axis=1)
    return unpack(packed[:, :k])


def in_order(distances: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for tensors on any device; all of shape (n, k).

    Args:
        distances (Tensor): float32.
        ids (Tensor): int64.
    """
    ids, order = ids.sort(dim=1)
    distances, order = distances.gather(1, order).sort(dim=1, stable=True)
    return distances, ids.gather(1, order)


def pack(distances: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Integers that sort by distance, then by id; an id of -1 becomes the last of all ids.

    Args:
        distances (ndarray): any shape, float32.
        ids (ndarray): the same shape, int64 in [-1, ``MAX_KEYS``).

    Returns:
        ndarray: the same shape, uint64.
    """
    packed = np.empty(distances.shape, dtype=np.uint64)
    halves = _halves(packed)
    halves[..., _LOW] = ids
    np.bitwise_xor(_sortable(distances.view(np.int32)).view(np.uint32), _SIGN, halves[..., _HIGH])
    return packed


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances and ids of packed rows in order, shape (n, k); ``NO_ENTRY`` gives +inf and -1."""
    halves = _halves(packed)
    distances = _sortable((halves[..., _HIGH] ^ _SIGN).view(np.int32)).view(np.float32)
    ids = halves[..., _LOW].astype(np.int64)
    if (ids[:, -1:] == MAX_KEYS).any():
        missing = ids == MAX_KEYS
        distances[missing], ids[missing] = np.inf, -1
    return distances, ids


def _halves(packed: np.ndarray) -> np.ndarray:
    return packed.view(np.uint32).reshape(*packed.shape, 2)


def _sortable(bits: np.ndarray) -> np.ndarray:
    """The bits of floats as integers that sort as they do, or back: negative ones are reversed."""
    if not bits.size or bits.min() >= 0:
        return bits
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
