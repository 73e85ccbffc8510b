"""From queries to neighbours: searches one or several datastores as one."""

from collections.abc import Iterator, Sequence
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch

from . import index as faiss_index
from .datastore import Datastore
from .errors import UserError
from .key_extractor import KeyExtractor

# What datastores that are searched as one must agree in, and what a model must fit.
_COMMON = ("dimension", "key", "metric", "dictionary", "model")


class Neighbors(NamedTuple):
    """The nearest entries of each query, nearest first.

    distances (Tensor): shape (N, k), float32, squared L2 or minus the inner product; +inf where
        there is no neighbour.
    values (LongTensor): shape (N, k), the token that followed; 0 where there is no neighbour.
    ids (LongTensor): shape (N, k), rows of the datastores, counted through all of them in the
        order they were named; -1 where there is no neighbour.
    """

    distances: torch.Tensor
    values: torch.Tensor
    ids: torch.Tensor


class Retriever:
    """Finds the nearest entries of one or several datastores.

    Args:
        datastores (list of Datastore): all of one model, key and metric.
        k (int): neighbours per query.
        nprobe (int): inverted lists visited.
        distances (str): ``exact``, computed from the stored keys, or ``index``.
        device (str): ``cpu``, ``cuda`` or ``auto``: where the index is searched.

    Raises:
        UserError: if the datastores do not agree, or k is more than they hold.
    """

    def __init__(
        self,
        datastores: Sequence[Datastore],
        k: int,
        nprobe: int = 32,
        distances: str = "exact",
        device: str = "auto",
    ):
        self.datastores = list(datastores)
        self.k = k
        self.nprobe = nprobe
        self.exact = distances == "exact"
        self._refuse_differing()
        if k > len(self):
            raise UserError(
                f"fairseq_knnlm: --knn-k {k} is more than the {len(self)} entries of "
                f"{self._names()}"
            )
        self._devices = [
            faiss_index.choose_device(device, datastore.manifest["index"]["factory"], k)
            for datastore in self.datastores
        ]
        self._indexes: Optional[list] = None

    @classmethod
    def open(cls, paths: Sequence[str], expected: Optional[dict] = None, **settings):
        """Open datastores for searching.

        Args:
            paths: their directories.
            expected (dict): flags that were given although the datastore fixes them, None where
                not given.
            settings: arguments of the constructor.

        Raises:
            UserError: if a datastore is not whole, or not what was expected.
        """
        retriever = cls([Datastore.open(path) for path in paths], **settings)
        for flag, value in (expected or {}).items():
            retriever._refuse_unexpected(flag, value)
        return retriever

    def __len__(self) -> int:
        return sum(len(datastore) for datastore in self.datastores)

    # -- what fits -----------------------------------------------------------------------------

    @property
    def _manifest(self) -> dict:
        return self.datastores[0].manifest

    def _names(self) -> str:
        return ":".join(datastore.path for datastore in self.datastores)

    def _refuse_differing(self) -> None:
        first = self.datastores[0]
        for other in self.datastores[1:]:
            for name in _COMMON:
                if other.manifest[name] != first.manifest[name]:
                    raise UserError(
                        f"fairseq_knnlm: the datastores cannot be searched as one: the {name} of "
                        f"{first.path} is {first.manifest[name]}, of {other.path} "
                        f"{other.manifest[name]}"
                    )

    def _refuse_unexpected(self, flag: str, value) -> None:
        if value is None:
            return
        for datastore in self.datastores:
            manifest = datastore.manifest
            key = manifest["key"]
            if flag == "--knn-key-layer" and -key["layers"] <= value < 0:
                value += key["layers"]
            found = {
                "--knn-key": key["type"],
                "--knn-key-layer": key["layer"],
                "--knn-metric": manifest["metric"],
                "--knn-index": manifest["index"]["factory"],
            }[flag]
            if str(value) != str(found):
                raise UserError(
                    f"fairseq_knnlm: {flag} {value} does not fit the datastore {datastore.path}, "
                    f"which was built with {found}: drop the flag, or build with it"
                )

    def check_dictionary(self, fingerprint: str) -> None:
        """Refuse a dictionary that is not the datastore's.

        Raises:
            UserError: naming both.
        """
        expected = self._manifest["dictionary"]
        if fingerprint != expected["sha256"]:
            raise UserError(
                f"fairseq_knnlm: the dictionary of the data (sha256 {fingerprint[:12]}) is not "
                f"that of the datastore {self._names()} ({expected['types']} types, sha256 "
                f"{expected['sha256'][:12]}): token ids would mean other words"
            )

    def check_model(self, model, fingerprint: str) -> None:
        """Refuse a model whose hidden states the keys are not.

        Args:
            fingerprint (str): of its weights.

        Raises:
            UserError: naming both.
        """
        dimension = KeyExtractor(model.decoder).dimension
        if dimension != self._manifest["dimension"]:
            raise UserError(
                f"fairseq_knnlm: the model's keys have {dimension} dimensions, those of the "
                f"datastore {self._names()} {self._manifest['dimension']}: it was built with "
                "another model"
            )
        expected = self._manifest["model"]["sha256"]
        if fingerprint != expected:
            raise UserError(
                f"fairseq_knnlm: the weights of --path (sha256 {fingerprint[:12]}) are not those "
                f"that the datastore {self._names()} was built with (sha256 {expected[:12]}): use "
                "its checkpoint, or build a datastore for this one"
            )

    # -- searching -----------------------------------------------------------------------------

    def extractor(self, model) -> KeyExtractor:
        """An extractor of this model's queries: the state that the keys are."""
        key = self._manifest["key"]
        return KeyExtractor(model.decoder, key["type"], key["layer"])

    def search(self, queries: torch.Tensor, k: Optional[int] = None) -> Neighbors:
        """The k nearest entries of each query.

        Args:
            queries (Tensor): shape (N, D), any float dtype and device.
            k (int): neighbours, at most those of the retriever; None: as many.

        Returns:
            Neighbors: on the device of *queries*.

        Raises:
            UserError: if k is not in [1, k of the retriever].

        >>> retriever = Retriever.open([directory], k=4)
        >>> own = torch.from_numpy(retriever.datastores[0].keys[:3].astype("float32"))
        >>> found = retriever.search(own, k=2)
        >>> found.distances.shape == found.values.shape == found.ids.shape == (3, 2)
        True
        >>> found.distances[:, 0].tolist()  # the nearest of a key is itself
        [0.0, 0.0, 0.0]
        """
        k = self.k if k is None else k
        if not 1 <= k <= self.k:
            raise UserError(
                f"Retriever.search: k must be in [1, {self.k}], got {k}; open the retriever with "
                "the largest k that is wanted"
            )
        found = self.map(lambda rows, neighbors: neighbors, queries, k)
        if not found:
            empty = torch.empty(0, k)
            found = [Neighbors(empty, empty.long(), empty.long())]
        return Neighbors(*(torch.cat(parts).to(queries.device) for parts in zip(*found)))

    def map(self, function: Callable, queries: torch.Tensor, k: Optional[int] = None) -> list:
        """Search, and use the neighbours of some queries at a time, while they are in the cache.

        Args:
            function (callable): takes a slice of the queries and their ``Neighbors``, on the CPU;
                called from several threads.
            queries (Tensor): shape (N, D), any float dtype and device.
            k (int): as in ``search``.

        Returns:
            list: its results, in the order of the queries.
        """
        k = self.k if k is None else k
        flat = np.ascontiguousarray(queries.float().cpu().numpy())
        if self._indexes is None:
            self._indexes = [self._load(*each) for each in zip(self.datastores, self._devices)]
        if len(self.datastores) == 1:
            (index,), (datastore,) = self._indexes, self.datastores
            return index.map(
                lambda rows, *found: function(rows, _neighbors(datastore, 0, *found)),
                flat, k, self.nprobe,
            )  # fmt: skip
        each = list(self._search_each(flat, k))
        return [
            function(rows, _merge(([part[rows] for part in found] for found in each), k))
            for rows in faiss_index.slices(len(flat))
        ]

    def _search_each(self, queries: np.ndarray, k: int) -> Iterator[Neighbors]:
        first_id = 0
        for datastore, index in zip(self.datastores, self._indexes):
            found = index.search(queries, min(k, len(datastore)), self.nprobe)
            yield _neighbors(datastore, first_id, *found)
            first_id += len(datastore)

    def _load(self, datastore: Datastore, device: str):
        return faiss_index.SearchIndex(
            datastore.index_path,
            datastore.manifest["metric"],
            keys=datastore.keys if self.exact else None,
            device=device,
        )


def _neighbors(datastore: Datastore, first_id: int, distances, ids) -> Neighbors:
    missing = ids < 0
    if not missing.any():
        values, ids = datastore.values[ids].astype(np.int64), ids + first_id
    else:
        values = np.where(missing, 0, datastore.values[np.where(missing, 0, ids)]).astype(np.int64)
        ids = np.where(missing, -1, ids + first_id)
    return Neighbors(*(torch.from_numpy(part) for part in (distances, values, ids)))


def _merge(each, k: int) -> Neighbors:
    return _nearest(Neighbors(*(torch.cat(parts, dim=1) for parts in zip(*each))), k)


def _nearest(neighbors: Neighbors, k: int) -> Neighbors:
    distances, order = neighbors.distances.topk(k, dim=1, largest=False, sorted=True)
    return Neighbors(distances, neighbors.values.gather(1, order), neighbors.ids.gather(1, order))
