"""The file of a gate: an ``.npz`` of plain arrays, and JSON of its numbers; nothing is unpickled.

- ``about``, a string: JSON of ``format_version``, ``kind`` and the numbers of the gate;
- of a gate of buckets ``edges``, ``knn_lambdas`` and ``cache_lambdas``;
- of a learned gate ``quantiles``; of each network its parameters by name, such as
  ``after.0.output.weight``; and ``grams.N``, ``counts.N`` and ``successors.N`` of n-grams.
"""

import io
import json
import zipfile
import zlib

import numpy as np
import torch

from ..errors import UserError
from .file_checks import refuse_impossible
from .gates import Buckets, Gate, Nest
from .learned import Learned
from .network import GateNetwork
from .ngram_counts import NgramCounts, Order

FORMAT_VERSION = 1
# What reading something else, or only a part of it, can end with.
_DAMAGES = (
    OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RuntimeError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
_STAGES = ("before", "after")


def to_bytes(gate: Gate) -> bytes:
    """The file of a gate."""
    about, arrays = _TO_PARTS[gate.kind](gate)
    about = {"format_version": FORMAT_VERSION, "kind": gate.kind, "k": gate.k, **about}
    file = io.BytesIO()
    np.savez(file, about=np.array(json.dumps(about, sort_keys=True)), **arrays)
    return file.getvalue()


def from_bytes(data: bytes) -> Gate:
    """The gate of a file.

    Args:
        data (bytes): that ``to_bytes`` gave.

    Raises:
        UserError: if it is no such file, or one of another release.
    """
    try:
        with np.load(io.BytesIO(data)) as file:
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        version, kind = about.pop("format_version"), about.pop("kind")
        if version == FORMAT_VERSION:
            refuse_impossible(kind, about, arrays)
            return _FROM_PARTS[kind](about, arrays)
    except _DAMAGES as error:
        what = " ".join(str(error).split())  # PyTorch's are of several lines
        raise UserError(f"the gate is damaged ({what}): run fairseq-knnlm-tune again") from None
    raise UserError(
        f"the gate has format version {version}, this release reads version {FORMAT_VERSION}: run "
        "fairseq-knnlm-tune again"
    )


# -- buckets and the rule of two numbers -----------------------------------------------------------


def _buckets_to_parts(gate: Buckets):
    arrays = {name: getattr(gate, name).numpy() for name in _BUCKET_ARRAYS}
    return {"temperature": gate.temperatures[0], "measure": gate.measure}, arrays


def _buckets_from_parts(about: dict, arrays: dict) -> Buckets:
    return Buckets(**about, **{name: torch.from_numpy(arrays[name]) for name in _BUCKET_ARRAYS})


def _nest_to_parts(gate: Nest):
    names = ("alpha", "tau", "cache_share")
    return {"temperature": gate.temperatures[0], **{n: getattr(gate, n) for n in names}}, {}


def _nest_from_parts(about: dict, arrays: dict) -> Nest:
    return Nest(**about)


# -- the learned gate ------------------------------------------------------------------------------


def _learned_to_parts(gate: Learned):
    about = {"temperatures": gate.temperatures, "unit": gate.unit, "types": gate.counts.types}
    about["cache_share"] = gate.cache_share
    arrays = {"quantiles": gate.quantiles.numpy()}
    for stage in _STAGES:
        networks = getattr(gate, stage)
        about[stage] = {"networks": len(networks), **networks[0].sizes}
        for number, network in enumerate(networks):
            for name, tensor in network.state_dict().items():
                arrays[f"{stage}.{number}.{name}"] = tensor.cpu().numpy()
    for number, order in enumerate(gate.counts.orders):
        arrays.update({f"{name}.{number}": part for name, part in order._asdict().items()})
    about["orders"] = len(gate.counts.orders)
    return about, arrays


def _learned_from_parts(about: dict, arrays: dict) -> Learned:
    orders = [
        Order(*(arrays[f"{name}.{number}"] for name in Order._fields))
        for number in range(about.pop("orders"))
    ]
    counts = NgramCounts(orders, about.pop("types"))
    stages = {stage: _networks(stage, about.pop(stage), arrays) for stage in _STAGES}
    quantiles = torch.from_numpy(arrays["quantiles"])
    return Learned(**about, counts=counts, **stages, quantiles=quantiles)


def _networks(stage: str, sizes: dict, arrays: dict) -> list[GateNetwork]:
    networks = []
    for number in range(sizes.pop("networks")):
        network, prefix = GateNetwork(**sizes), f"{stage}.{number}."
        state = {
            name[len(prefix) :]: torch.from_numpy(array)
            for name, array in arrays.items()
            if name.startswith(prefix)
        }
        network.load_state_dict(state)
        networks.append(network)
    return networks


_BUCKET_ARRAYS = ("edges", "knn_lambdas", "cache_lambdas")
_TO_PARTS = {"buckets": _buckets_to_parts, "nest": _nest_to_parts, "learned": _learned_to_parts}
_FROM_PARTS = {
    "buckets": _buckets_from_parts,
    "nest": _nest_from_parts,
    "learned": _learned_from_parts,
}
