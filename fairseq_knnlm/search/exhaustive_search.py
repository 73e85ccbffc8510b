"""Exact nearest of all keys, by torch matrix products, on any device.

No index is read. Every key is compared with every query, in blocks: the cost grows with the
datastore, and is what a GPU does best. Neighbours stay on the device.
"""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Optional

import numpy as np
import torch

from ..neighbors import Neighbors
from ..progress import track
from .near_pairs import center_of
from .ordering import in_order
from .searcher import Batch, CheckRows, gather, trust

# Keys of one block.
_KEYS = 1 << 16
# Elements of one product of keys and queries, 4 bytes each.
_PRODUCTS = {"cpu": 1 << 26, "cuda": 1 << 28}
# Keys stay on a GPU if they fit in this share of its free memory. The rest is for the model and for
# the neighbours.
_RESIDENT_SHARE = 0.5


class ExhaustiveSearch:
    """Compares queries with all keys (the protocol of ``searcher.Searcher``).

    Distances are computed from rounded norms and products, all in float32: they are exact to about
    1e-6 of the squared norms (relative to the mean of all keys).

    Args:
        keys (ndarray): shape (entries, D), float16, a memory-mapped ``.npy`` file.
        values (ndarray): shape (entries,), the token of each entry.
        metric (str): ``l2`` or ``ip``.
        device (torch.device): where the products are computed. Keys that fit in a GPU's memory stay
            there; others are copied to it by every search, each block while the one before it is
            compared.
        check_rows (callable): see ``searcher.CheckRows``.
    """

    def __init__(
        self,
        keys: np.ndarray,
        values: np.ndarray,
        metric: str,
        *,
        device: torch.device,
        check_rows: CheckRows = trust,
    ):
        self._keys = keys
        self._check_rows = check_rows
        self._device = device
        self._is_l2 = metric == "l2"
        self._center = torch.from_numpy(center_of(keys, metric, check_rows)).to(device)
        self._values = torch.from_numpy(values.astype(np.int32)).to(device)
        self._resident = self._keys_on_gpu()

    def search(self, queries: torch.Tensor, k: int) -> Neighbors:
        """All batches as one, on the device of the search, see ``batches``."""
        return gather(self.batches(queries, k), k, self._device)

    def batches(self, queries: torch.Tensor, k: int) -> Iterator[Batch]:
        """Search, see ``searcher.Searcher.batches``; ties are in the order of ids."""
        start = 0
        for part in self._nearest(queries, k):
            distances, ids = part.in_order(self._is_l2)
            yield (
                slice(start, start + len(ids)),
                Neighbors(distances, self._values[ids].long(), ids),
            )
            start += len(ids)

    @torch.no_grad()
    def _nearest(self, queries: torch.Tensor, k: int) -> list["_Nearest"]:
        """The nearest keys of the queries, some thousand queries in each part."""
        queries = queries.to(self._device).float() - self._center
        rows = max(1, _PRODUCTS[self._device.type] // _KEYS)
        parts = [_Nearest(part, k) for part in queries.split(rows) if len(part)]
        with _full_precision():
            count = -(-len(self._keys) // _KEYS)
            for first, block in track("neighbours", self._blocks(), count):
                block = block.float() - self._center
                # |k|^2 - 2 qk orders as the distance does: |q|^2 is the same for all keys.
                norms = block.square().sum(1) if self._is_l2 else block.new_zeros(len(block))
                for part in parts:
                    factor = -2 if self._is_l2 else -1
                    gaps = torch.addmm(norms, part.queries, block.T, alpha=factor)
                    part.take(gaps, first)
        return parts

    def _keys_on_gpu(self) -> Optional[torch.Tensor]:
        """The keys on the device, shape (N, D), float16; None where they do not fit."""
        if self._device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(self._device)
        if self._keys.nbytes > _RESIDENT_SHARE * free:
            return None
        keys = torch.empty(self._keys.shape, dtype=torch.float16, device=self._device)
        for first, block in self._copied():
            keys[first : first + len(block)] = block
        return keys

    def _blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Row of the first key and keys on the device, for every block."""
        if self._resident is None:
            return self._copied()
        return zip(range(0, len(self._keys), _KEYS), self._resident.split(_KEYS))

    def _copied(self) -> Iterator[tuple[int, torch.Tensor]]:
        starts = range(0, len(self._keys), _KEYS)
        on_gpu = self._device.type == "cuda"
        # A copy of pinned memory to a GPU goes past the processor. There are two buffers: one is
        # read into while the other is used.
        buffers = [
            torch.empty(
                min(_KEYS, len(self._keys)), self._keys.shape[1],
                dtype=torch.float16, pin_memory=on_gpu,
            )
            for _ in range(2)
        ]  # fmt: skip

        def read(number):
            block = self._keys[starts[number] : starts[number] + _KEYS]
            self._check_rows(range(starts[number], starts[number] + len(block)))
            buffer = buffers[number % 2][: len(block)]
            buffer.numpy()[:] = block
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
        """Take a block of keys.

        Args:
            gaps (Tensor): shape (n, keys of the block), float32, distances less |q|^2.
            first (int): row of the first of the keys.
        """
        offered = gaps.size(1)
        if self._gaps.size(1) == self._k:
            # Only keys nearer than the farthest one kept count, and a short selection is fast.
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


@contextlib.contextmanager
def _full_precision():
    """Products of float32 in float32, whatever is allowed elsewhere (TF32, bfloat16)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
