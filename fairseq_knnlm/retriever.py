"""From queries to neighbours: searches one or several datastores as one."""

from collections.abc import Iterator, Sequence
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch

from .datastore import Datastore
from .errors import UserError
from .exhaustive import ExhaustiveSearch
from .key_extractor import KeyExtractor
from .list_search import slices
from .search_index import SearchIndex, choose_device

# What datastores that are searched as one must agree in, and what a model must fit.
_COMMON = ("dimension", "key", "metric", "dictionary", "model")
# Queries whose neighbours are handed over at a time, as tensors on a device.
_ROWS = 1 << 12


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
        distances (str): ``exact``, computed from the stored keys; ``index``, as the index has
            them; or ``exhaustive``: all keys are compared, and no index is read.
        device (str): ``cpu``, ``cuda`` or ``auto``: where is searched. ``auto`` is for an index a
            GPU where FAISS has one, for exhaustive search the device of the first queries.

    Raises:
        UserError: if the datastores do not agree, k is more than they hold, or there is no such
            device.
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
        self.distances = distances
        self._refuse_differing()
        if k > len(self):
            raise UserError(
                f"fairseq_knnlm: --knn-k {k} is more than the {len(self)} entries of "
                f"{self._names()}"
            )
        self._devices = self._choose_devices(device)
        self._searches: Optional[list] = None
        self._values: list = []

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
    def _exhaustive(self) -> bool:
        return self.distances == "exhaustive"

    def _choose_devices(self, device: str) -> list[str]:
        if not self._exhaustive:
            return [
                choose_device(device, datastore.manifest["index"]["factory"], self.k, self.nprobe)
                for datastore in self.datastores
            ]
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "fairseq_knnlm: --knn-device cuda: torch sees no GPU; use --knn-device cpu"
            )
        return [device] * len(self.datastores)

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
            function (callable): takes a slice of the queries and their ``Neighbors``, on the CPU
                or on the GPU that searched; may be called from several threads.
            queries (Tensor): shape (N, D), any float dtype and device.
            k (int): as in ``search``.

        Returns:
            list: its results, in the order of the queries.
        """
        k = self.k if k is None else k
        if self._searches is None:
            self._load(queries.device)
        if self._values:
            parts = (part.split(_ROWS) for part in self._search_tensors(queries, k))
            return [
                function(slice(number * _ROWS, number * _ROWS + len(found[0])), Neighbors(*found))
                for number, found in enumerate(zip(*parts))
            ]
        flat = np.ascontiguousarray(queries.float().cpu().numpy())
        if len(self.datastores) == 1:
            (index,), (datastore,) = self._searches, self.datastores
            return index.map(
                lambda rows, *found: function(rows, _neighbors(datastore, 0, *found)),
                flat, k, self.nprobe,
            )  # fmt: skip
        each = list(self._search_each(flat, k))
        return [
            function(rows, _merge(([part[rows] for part in found] for found in each), k))
            for rows in slices(len(flat))
        ]

    def _search_each(self, queries: np.ndarray, k: int) -> Iterator[Neighbors]:
        first_id = 0
        for datastore, index in zip(self.datastores, self._searches):
            found = index.search(queries, min(k, len(datastore)), self.nprobe)
            yield _neighbors(datastore, first_id, *found)
            first_id += len(datastore)

    def _search_tensors(self, queries: torch.Tensor, k: int) -> Neighbors:
        """The same in tensors that stay on the device that searches."""
        each, first_id = [], 0
        for datastore, search, values in zip(self.datastores, self._searches, self._values):
            most = min(k, len(datastore))
            if self._exhaustive:
                distances, ids = search.search(queries, most)
            else:
                distances, ids = search.search_tensors(queries, most, self.nprobe)
            missing = ids < 0
            found = values[ids.clamp(min=0)].long().masked_fill_(missing, 0)
            each.append(Neighbors(distances, found, (ids + first_id).masked_fill_(missing, -1)))
            first_id += len(datastore)
        return each[0] if len(each) == 1 else _merge(each, k)

    def _load(self, device: torch.device) -> None:
        """Load what is searched; *device*: of the queries.

        Where all of it takes tensors, the values are put beside it.
        """
        if self._exhaustive:
            # "cuda" without a number is the GPU of this process
            devices = [device if each == "auto" else torch.device(each) for each in self._devices]
            self._searches = [
                ExhaustiveSearch(datastore.keys, datastore.manifest["metric"], each)
                for datastore, each in zip(self.datastores, devices)
            ]
        else:
            self._searches = [
                SearchIndex(
                    datastore.index_path,
                    datastore.manifest["metric"],
                    keys=datastore.keys if self.distances == "exact" else None,
                    device=each,
                )
                for datastore, each in zip(self.datastores, self._devices)
            ]
            devices = [device] * len(self._searches)
        on_gpu = device.type == "cuda"
        if self._exhaustive or on_gpu and all(search.takes_tensors for search in self._searches):
            self._values = [
                torch.from_numpy(datastore.values.astype(np.int32)).to(each)
                for datastore, each in zip(self.datastores, devices)
            ]


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
