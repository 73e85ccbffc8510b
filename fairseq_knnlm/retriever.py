"""From queries to neighbours: searches one or several datastores as one."""

from collections.abc import Sequence
from functools import partial
from typing import Callable, Optional

import torch

from .datastore import Datastore
from .errors import UserError
from .exhaustive import ExhaustiveSearch
from .key_extractor import KeyExtractor
from .neighbors import DeviceSearch, HostSearch, Neighbors
from .search_index import SearchIndex, choose_device

# What datastores that are searched as one must agree in, and what a model must fit.
_COMMON = ("dimension", "key", "metric", "dictionary", "model")


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
        self._device = device
        self._index_devices = self._choose_devices()
        # HostSearch or DeviceSearch, loaded when it is first needed
        self._searcher = None

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

    def _choose_devices(self) -> list[str]:
        """Where the index of each datastore is searched."""
        if not self._exhaustive:
            factories = [datastore.manifest["index"]["factory"] for datastore in self.datastores]
            return [choose_device(self._device, each, self.k, self.nprobe) for each in factories]
        if self._device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "fairseq_knnlm: --knn-device cuda: torch sees no GPU; use --knn-device cpu"
            )
        return []

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
        if self._searcher is None:
            self._searcher = self._load(queries.device)
        return self._searcher.map(function, queries, self.k if k is None else k)

    def _load(self, device: torch.device):
        """What searches; *device*: of the queries."""
        datastores, metric = self.datastores, self._manifest["metric"]
        if self._exhaustive:
            # "cuda" without a number is the GPU of this process
            device = device if self._device == "auto" else torch.device(self._device)
            every = [ExhaustiveSearch(datastore.keys, metric, device) for datastore in datastores]
            return DeviceSearch(datastores, [each.search for each in every], device)
        indexes = [
            SearchIndex(
                datastore.index_path,
                metric,
                keys=datastore.keys if self.distances == "exact" else None,
                device=each,
            )
            for datastore, each in zip(datastores, self._index_devices)
        ]
        if device.type == "cuda" and all(index.takes_tensors for index in indexes):
            searches = [partial(index.search_tensors, nprobe=self.nprobe) for index in indexes]
            return DeviceSearch(datastores, searches, device)
        return HostSearch(datastores, indexes, self.nprobe)
