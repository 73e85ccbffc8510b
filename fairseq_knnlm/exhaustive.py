"""Exact nearest of all keys, by torch matrix products, on any device.

No index is read. Every key is compared with every query, in blocks: the cost grows with the
datastore, and is what a GPU does best. Everything found stays on the device.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from .near_pairs import center_of

# Keys of one block, and elements of one product of keys and queries (4 bytes each).
_KEYS = 1 << 16
_PRODUCTS = {"cpu": 1 << 26, "cuda": 1 << 28}
# Keys stay on a GPU if they fit in this share of its free memory: the rest is for the model and for
# what is found.
_RESIDENT_SHARE = 0.5


class ExhaustiveSearch:
    """Compares queries with all keys.

    Args:
        keys (ndarray): shape (N, D), float16, a memory-mapped ``.npy`` file.
        metric (str): ``l2`` or ``ip``.
        device (torch.device): where the products are computed. Keys that fit in a GPU's memory stay
            there; others are copied to it by every search, each block while the one before it is
            compared.
    """

    def __init__(self, keys: np.ndarray, metric: str, device: torch.device):
        self._keys = keys
        self._device = device
        self._is_l2 = metric == "l2"
        self._center = torch.from_numpy(center_of(keys, metric)).to(device)
        self._resident = self._fitting()

    def _fitting(self):
        """The keys on the device, shape (N, D), float16; None where they do not fit or need not."""
        if self._device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self._device)
        if self._keys.nbytes > _RESIDENT_SHARE * free:
            return None
        keys = torch.empty(self._keys.shape, dtype=torch.float16, device=self._device)
        for first, block in self._copied():
            keys[first : first + len(block)] = block
        return keys

    @torch.no_grad()
    def search(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k nearest keys, nearest first; of equal distances the lower id first.

        Distances are computed from rounded norms and products, all in float32: they are exact to
        about 1e-6 of the squared norms (relative to the mean of all keys).

        Args:
            queries (Tensor): shape (N, D), any float dtype and device.
            k (int): at most the number of keys.

        Returns:
            tuple: distances, shape (N, k), float32, squared L2 or minus the inner product, and ids,
            shape (N, k), int64; on the device of the search.
        """
        queries = queries.to(self._device).float() - self._center
        nearest = [
            _Nearest(part, k)
            for part in queries.split(max(1, _PRODUCTS[self._device.type] // _KEYS))
        ]
        with _full_precision():
            for first, block in self._blocks():
                block = block.float() - self._center
                # |k|^2 - 2 qk: the order of distances, without what all keys have in common
                norms = block.square().sum(1) if self._is_l2 else block.new_zeros(len(block))
                for part in nearest:
                    factor = -2 if self._is_l2 else -1
                    gaps = torch.addmm(norms, part.queries, block.T, alpha=factor)
                    part.take(gaps, first)
        found = [part.in_order(self._is_l2) for part in nearest]
        if not found:
            found = [(queries.new_empty(0, k), queries.new_empty(0, k, dtype=torch.long))]
        distances, ids = (torch.cat(parts) for parts in zip(*found))
        return distances, ids

    def _blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Row of the first key and keys on the device, for every block."""
        if self._resident is None:
            return self._copied()
        return zip(range(0, len(self._keys), _KEYS), self._resident.split(_KEYS))

    def _copied(self) -> Iterator[tuple[int, torch.Tensor]]:
        starts = range(0, len(self._keys), _KEYS)
        on_gpu = self._device.type == "cuda"
        # pinned, a copy to a GPU goes past the processor; one is read into while the other is used
        buffers = [
            torch.empty(
                min(_KEYS, len(self._keys)), self._keys.shape[1],
                dtype=torch.float16, pin_memory=on_gpu,
            )
            for _ in range(2)
        ]  # fmt: skip

        def read(number):
            some = self._keys[starts[number] : starts[number] + _KEYS]
            buffer = buffers[number % 2][: len(some)]
            buffer.numpy()[:] = some
            return buffer

        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(read, 0)
            for number, first in enumerate(starts):
                block = reading.result().to(self._device)
                if number + 1 < len(starts):
                    reading = pool.submit(read, number + 1)
                yield first, block


class _Nearest:
    """Collects the nearest keys of some queries.

    Attributes:
        queries (Tensor): shape (n, D), float32, relative to the center.
    """

    def __init__(self, queries: torch.Tensor, k: int):
        self.queries = queries
        self._k = k
        self._gaps = queries.new_empty(len(queries), 0)
        self._ids = queries.new_empty(len(queries), 0, dtype=torch.long)

    def take(self, gaps: torch.Tensor, first: int) -> None:
        """Take a block of keys whose first row is *first*; gaps: shape (n, keys of the block)."""
        offered = gaps.size(1)
        if self._gaps.size(1) == self._k:
            # no row has more to offer, and a short selection is a fast one
            offered = int((gaps < self._gaps.amax(1, keepdim=True)).sum(1).max())
        if offered == 0:
            return
        gaps, ids = gaps.topk(min(offered, self._k), dim=1, largest=False, sorted=False)
        self._gaps = torch.cat([self._gaps, gaps], dim=1)
        self._ids = torch.cat([self._ids, ids + first], dim=1)
        if self._gaps.size(1) > self._k:
            self._gaps, order = self._gaps.topk(self._k, dim=1, largest=False, sorted=False)
            self._ids = self._ids.gather(1, order)

    def in_order(self, is_l2: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances and ids, nearest first."""
        distances = self._gaps
        if is_l2:
            distances = (distances + self.queries.square().sum(1, keepdim=True)).clamp_(min=0)
        return in_order(distances, self._ids)


def in_order(distances: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest first, and of equal distances the lower id first; all of shape (n, k)."""
    ids, order = ids.sort(dim=1)
    distances, order = distances.gather(1, order).sort(dim=1, stable=True)
    return distances, ids.gather(1, order)


@contextlib.contextmanager
def _full_precision():
    """Products of float32 in float32, whatever is allowed elsewhere (TF32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
