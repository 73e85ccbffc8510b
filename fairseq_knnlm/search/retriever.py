"""From queries to neighbours: the one way into a datastore, or into several as one."""

import os
from collections.abc import Iterator, Sequence
from typing import Optional, Union

import numpy as np
import torch

from ..arguments import refuse
from ..datastore.datastore import Datastore
from ..datastore.schema import require
from ..errors import UserError
from ..fields import faults, is_whole, one_of, whole
from ..neighbors import Neighbors
from ..options import DEFAULT_DISTANCES, DEFAULT_K, DEFAULT_NPROBE, DEVICES, DISTANCES
from .devices import choose_device
from .exact_search import ExactSearch
from .exhaustive_search import ExhaustiveSearch
from .index_check import load_checked
from .index_search import IndexSearch
from .product_type import forced_type
from .searcher import Batch, Searcher, as_tensor, gather
from .several import SeveralSearch

Queries = Union[torch.Tensor, np.ndarray]

# What datastores that are searched as one must agree in.
_COMMON = ("dimension", "key", "metric", "dictionary", "model")


class Retriever:
    """Finds the nearest entries of one or several datastores.

    Args:
        datastores (list of Datastore): all of one model, key and metric.
        k (int): neighbours per query, at most the entries of all datastores together.
        nprobe (int): inverted lists visited, >= 1.
        distances (str): ``exact``, computed from the stored keys; ``index``, as the index has
            them; or ``exhaustive``: all keys are compared, and no index is read.
        device (str): ``cpu``, ``cuda`` or ``auto``: where is searched. ``auto`` is for an index a
            GPU where FAISS has one, for exhaustive search the device of the first queries.

    Raises:
        UserError: if an argument cannot be, the datastores do not agree, there is no such device,
            or the environment forces an unknown type of products (``product_type``).
    """

    def __init__(
        self,
        datastores: Sequence[Datastore],
        k: int = DEFAULT_K,
        nprobe: int = DEFAULT_NPROBE,
        distances: str = DEFAULT_DISTANCES,
        device: str = DEVICES[0],
    ):
        self.datastores = list(datastores)
        _check_arguments(self.datastores, k, nprobe, distances, device)
        forced_type()  # refuses an unknown one, before any work
        for datastore in self.datastores:
            require(datastore.path, datastore.manifest, ["metric"], "searching")
        _refuse_differing(self.datastores)
        self.k, self.nprobe = int(k), int(nprobe)
        self.distances = distances
        if k > len(self):
            raise UserError(
                f"Retriever: k (--knn-k) must be at most {len(self)}, the entries of {self.name}, "
                f"got {k}"
            )
        self._device = device
        self._index_devices = self._choose_devices()
        # The index is loaded, or keys are copied to a GPU, when the first queries come.
        self._searcher: Optional[Searcher] = None

    @classmethod
    def open(cls, paths: Sequence[str], verify: bool = True, **settings) -> "Retriever":
        """Open datastores for searching.

        Args:
            paths (list of str): their directories.
            verify (bool): compare what is read with its checksum, see ``Datastore.open``.
            settings: arguments of the constructor.

        Raises:
            UserError: if *paths* is no list, a datastore is not whole, or as the constructor.
        """
        if isinstance(paths, (str, os.PathLike)):
            raise UserError(
                f"Retriever.open: paths must be a list of directories, got {os.fspath(paths)!r}"
            )
        return cls([Datastore.open(path, verify) for path in paths], **settings)

    def __len__(self) -> int:
        return sum(len(datastore) for datastore in self.datastores)

    @property
    def name(self) -> str:
        """The directories of the datastores, as ``--knn-datastore`` names them."""
        return ":".join(datastore.path for datastore in self.datastores)

    @property
    def manifest(self) -> dict:
        """That of the first datastore; in what matters to a model the others agree with it."""
        return self.datastores[0].manifest

    @property
    def key(self) -> dict:
        """Which state of the model the keys are, see ``encoding.extractor_of``."""
        return self.manifest["key"]

    @property
    def metric(self) -> str:
        """``l2`` or ``ip``."""
        return self.manifest["metric"]

    def search(self, queries: Queries, k: Optional[int] = None) -> Neighbors:
        """The k nearest entries of each query.

        Args:
            queries (Tensor or ndarray): shape (N, D), any float dtype and device.
            k (int): neighbours, at most those of the retriever; None: as many.

        Returns:
            Neighbors: tensors of shape (N, k), on the device of *queries*, of an array on the CPU.

        Raises:
            UserError: if k is not in [1, k of the retriever], or D is not that of the keys.

        >>> retriever = Retriever.open([directory], k=4)
        >>> neighbors = retriever.search(retriever.datastores[0].keys[:3], k=2)
        >>> neighbors.distances.shape == neighbors.values.shape == neighbors.ids.shape == (3, 2)
        True
        >>> neighbors.distances[:, 0].tolist()  # the nearest of a key is itself
        [0.0, 0.0, 0.0]
        """
        queries = as_tensor(queries)
        return gather(self.batches(queries, k), self.k if k is None else k, queries.device)

    def batches(self, queries: Queries, k: Optional[int] = None) -> Iterator[Batch]:
        """The same, some queries at a time: see ``searcher.Searcher.batches``.

        Args:
            queries (Tensor or ndarray): shape (N, D), any float dtype and device.
            k (int): neighbours, at most those of the retriever; None: as many.

        Yields:
            tuple of slice and Neighbors: rows of *queries* in order, and their neighbours, on the
            CPU or on the GPU that searched.

        Raises:
            UserError: as ``search``.
        """
        k = self.k if k is None else k
        if not is_whole(k, 1, self.k):
            raise UserError(
                f"Retriever: k must be in [1, {self.k}], got {k!r}; make the retriever with the "
                "largest k that is wanted"
            )
        queries = as_tensor(queries)
        self._refuse_other_queries(queries)
        if self._searcher is None:
            self._searcher = self._load(queries.device)
        return self._searcher.batches(queries, k)

    def _refuse_other_queries(self, queries: torch.Tensor) -> None:
        dimension = self.datastores[0].dimension
        if queries.dim() != 2 or queries.size(1) != dimension or not queries.is_floating_point():
            raise UserError(
                f"Retriever: queries must have shape (N, {dimension}), as the keys of {self.name} "
                f"have, and a float type, got {tuple(queries.shape)} of {queries.dtype}"
            )

    # -- loading -------------------------------------------------------------------------------

    def _choose_devices(self) -> list[str]:
        """Where the index of each datastore is searched."""
        if self.distances != "exhaustive":
            factories = [datastore.manifest["index"]["factory"] for datastore in self.datastores]
            return [choose_device(self._device, each, self.k, self.nprobe) for each in factories]
        if self._device == "cuda" and not torch.cuda.is_available():
            raise UserError("Retriever: device (--knn-device) cuda: torch sees no GPU; use cpu")
        return ["none"] * len(self.datastores)

    def _load(self, queries_device: torch.device) -> Searcher:
        searchers = [
            self._load_one(datastore, index_device, queries_device)
            for datastore, index_device in zip(self.datastores, self._index_devices)
        ]
        if len(searchers) == 1:
            return searchers[0]
        return SeveralSearch(searchers, [len(datastore) for datastore in self.datastores])

    def _load_one(self, datastore: Datastore, index_device: str, queries_device) -> Searcher:
        keys, values, metric = datastore.keys, datastore.values, self.metric
        check_rows = datastore.check_rows
        if self.distances == "exhaustive":
            # "cuda" without a number is the GPU of this process
            auto = self._device == "auto"
            device = queries_device if auto else torch.device(self._device)
            return ExhaustiveSearch(keys, values, metric, device=device, check_rows=check_rows)
        of_index = {"index": load_checked(datastore), "nprobe": self.nprobe, "device": index_device}
        if self.distances == "index":
            return IndexSearch(None, values, metric, **of_index)
        return ExactSearch(keys, values, metric, **of_index, check_rows=check_rows)


def _check_arguments(datastores, k, nprobe, distances, device) -> None:
    found = []
    if not datastores or not all(isinstance(each, Datastore) for each in datastores):
        names = ", ".join(type(each).__name__ for each in datastores) or "none"
        found.append(f"datastores must be a list of one or more Datastore, got {names}")
    for name, value, kind in (
        ("k", k, whole(1)),
        ("nprobe", nprobe, whole(1)),
        ("distances", distances, one_of(DISTANCES)),
        ("device", device, one_of(DEVICES)),
    ):
        found += faults(value, kind, name)
    refuse("Retriever", found)


def _refuse_differing(datastores: Sequence[Datastore]) -> None:
    first = datastores[0]
    for other in datastores[1:]:
        for name in _COMMON:
            values = first.manifest.get(name), other.manifest.get(name)
            if values[0] != values[1]:
                raise UserError(
                    f"the datastores cannot be searched as one: the {name} of {first.path} is "
                    f"{values[0]}, of {other.path} {values[1]}"
                )
