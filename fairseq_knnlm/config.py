"""Every ``--knn-*`` flag, its help and its range.

fairseq derives the command-line flags from the fields, and reads their types: no postponed
annotations here.
"""

import contextlib
import math
import os
from dataclasses import dataclass, field
from typing import NamedTuple, Optional, Union

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import II

from .cache import METRICS
from .errors import UserError
from .interpolation import ROUNDING
from .key_extractor import KEY_TYPES

DEFAULT_KEY = "ffn-input"
DEFAULT_METRIC = "l2"
DEFAULT_K = 1024
DEFAULT_LAMBDA = 0.25
DEFAULT_TEMPERATURE = 1.0
DEFAULT_NPROBE = 32
DEFAULT_DISTANCES = "exact"
DEFAULT_CACHE_LAMBDA = 0.1
AUTO = "auto"
CACHE_RESETS = ["none", "document"]


@dataclass
class KNNLMConfig(LanguageModelingConfig):
    """Settings of the task ``knnlm_lm``: those of ``language_modeling`` and ours."""

    knn_datastore: Optional[str] = field(
        default=None,
        metadata={
            "help": "datastore directory; several, separated by ':', are searched as one "
            "(default: none, plain language model scores)"
        },
    )
    knn_k: Optional[int] = field(
        default=None, metadata={"help": f"neighbours per query, >= 1 (default: {DEFAULT_K})"}
    )
    knn_lambda: Optional[float] = field(
        default=None,
        metadata={"help": f"weight of p_knn in the mixture, in [0, 1] (default: {DEFAULT_LAMBDA})"},
    )
    knn_temperature: Optional[str] = field(
        default=None,
        metadata={
            "help": "T > 0, divides the distances, worth tuning; 'auto': the value that "
            "fairseq-knnlm-build took from the distances between keys, of the first datastore "
            f"(default: {DEFAULT_TEMPERATURE})"
        },
    )
    knn_nprobe: Optional[int] = field(
        default=None,
        metadata={"help": f"inverted lists visited per query, >= 1 (default: {DEFAULT_NPROBE})"},
    )
    knn_distances: Optional[ChoiceEnum(["exact", "index", "exhaustive"])] = field(
        default=None,
        metadata={
            "help": "'exact': of the entries that the index finds, from the stored keys; 'index': "
            "as the (quantised) index returns them; 'exhaustive': of all entries, by matrix "
            f"products, for a GPU (default: {DEFAULT_DISTANCES})"
        },
    )
    knn_cache_size: Optional[int] = field(
        default=None,
        metadata={
            "help": "continuous cache: how many of the tokens before it a token looks back on, in "
            "the text that is evaluated (default: 0, no cache)"
        },
    )
    knn_cache_lambda: Optional[float] = field(
        default=None,
        metadata={
            "help": "weight of p_cache in the mixture (1 - LAMBDA - CACHE_LAMBDA) p_lm + LAMBDA "
            f"p_knn + CACHE_LAMBDA p_cache, in [0, 1] (default: {DEFAULT_CACHE_LAMBDA})"
        },
    )
    knn_cache_theta: Optional[float] = field(
        default=None,
        metadata={
            "help": "theta >= 0, multiplies what hidden states have in common, worth tuning "
            "(default: 1 / sqrt(dimension of the state), half of it for l2)"
        },
    )
    knn_cache_metric: Optional[ChoiceEnum(list(METRICS))] = field(
        default=None,
        metadata={
            "help": "what hidden states of the cache have in common: 'ip', the inner product, or "
            f"'l2', minus the squared distance (default: {METRICS[0]})"
        },
    )
    knn_cache_reset: Optional[ChoiceEnum(CACHE_RESETS)] = field(
        default=None,
        metadata={
            "help": "'document': the cache is emptied where a document begins, after an empty "
            "line and where --sample-break-mode complete_doc begins one; 'none': never "
            f"(default: {CACHE_RESETS[0]})"
        },
    )
    knn_tuned: bool = field(
        default=False,
        metadata={
            "help": "take k, lambda, temperature, nprobe, distances and the cache from what "
            "fairseq-knnlm-tune chose and stored in the datastore"
        },
    )
    knn_device: ChoiceEnum(["auto", "cpu", "cuda"]) = field(
        default="auto",
        metadata={
            "help": "where neighbours are searched; auto: in an index on a GPU when faiss has one "
            "for it, exhaustively where the model is"
        },
    )
    knn_key: Optional[ChoiceEnum(list(KEY_TYPES))] = field(
        default=None,
        metadata={
            "help": "hidden state that is the key, one of {}; fixed when the datastore is built "
            "(default there: {})".format(", ".join(KEY_TYPES), DEFAULT_KEY)
        },
    )
    knn_key_layer: Optional[int] = field(
        default=None,
        metadata={
            "help": "decoder layer the key is taken from, negative from the top; fixed when the "
            "datastore is built (default there: -1, the last)"
        },
    )
    knn_metric: Optional[ChoiceEnum(["l2", "ip"])] = field(
        default=None,
        metadata={
            "help": "'l2' (squared) or 'ip' (inner product); fixed when the datastore is built "
            f"(default there: {DEFAULT_METRIC})"
        },
    )
    knn_index: Optional[str] = field(
        default=None,
        metadata={
            "help": "FAISS factory string; fixed when the datastore is built "
            "(default there: an IVF-PQ index chosen from the size)"
        },
    )
    knn_show_neighbors: int = field(
        default=0,
        metadata={
            "help": "fairseq-interactive and fairseq-generate: print this many memories behind "
            "each generated token, as N- lines, and the nearest that has the token itself "
            "(default: 0, none)"
        },
    )
    # no help, so no flag: fairseq's own --path, to refuse an ensemble before it is loaded
    path: Optional[str] = II("common_eval.path")


def check_settings(cfg) -> None:
    """Refuse settings that cannot be, all faults at once.

    Raises:
        UserError: naming every flag that is wrong, what it may be and what came.
    """
    faults: list[str] = []

    def require(holds, flag, expected, got):
        if not holds:
            faults.append(f"{flag} must be {expected}, got {got}")

    checkpoints = (getattr(cfg, "path", None) or "").split(os.pathsep)
    if len(checkpoints) > 1 and all(map(os.path.exists, checkpoints)):
        faults.append(
            f"an ensemble of models is not supported: --path names {len(checkpoints)} checkpoints, "
            "a datastore belongs to one"
        )
    given = given_settings(cfg)
    k, knn_lambda, nprobe = (given.get(name) for name in ("k", "knn_lambda", "nprobe"))
    require(k is None or k >= 1, "--knn-k", ">= 1", k)
    require(knn_lambda is None or 0.0 <= knn_lambda <= 1.0, "--knn-lambda", "in [0, 1]", knn_lambda)
    temperature = given.get("temperature", DEFAULT_TEMPERATURE)
    require(
        temperature == AUTO or isinstance(temperature, float) and 0.0 < temperature < math.inf,
        "--knn-temperature", f"a finite number > 0, or {AUTO}", cfg.knn_temperature,
    )  # fmt: skip
    require(nprobe is None or nprobe >= 1, "--knn-nprobe", ">= 1", nprobe)
    if nprobe is not None and given.get("distances") == "exhaustive":
        faults.append("--knn-nprobe is for an index, --knn-distances exhaustive reads none")
    faults += _cache_faults(cfg, given)
    show = cfg.knn_show_neighbors
    require(show >= 0, "--knn-show-neighbors", ">= 0", show)
    if cfg.knn_tuned and not datastore_paths(cfg):
        faults.append("--knn-tuned needs the --knn-datastore that was tuned")
    if faults:
        raise UserError("fairseq_knnlm: " + "; ".join(faults))


def _cache_faults(cfg, given: dict) -> list[str]:
    """What is wrong with the flags of the continuous cache."""
    faults = []
    size, weight, theta = (given.get(f"cache_{name}") for name in ("size", "lambda", "theta"))
    if size is not None and size < 0:
        faults.append(f"--knn-cache-size must be >= 0, got {size}")
    if weight is not None and not 0.0 <= weight <= 1.0:
        faults.append(f"--knn-cache-lambda must be in [0, 1], got {weight}")
    if theta is not None and not 0.0 <= theta < math.inf:
        faults.append(f"--knn-cache-theta must be a finite number >= 0, got {theta}")
    settings = Settings(**given)
    both = settings.knn_lambda + settings.cache_lambda
    if size and datastore_paths(cfg) and not faults and both > 1.0 + ROUNDING:
        faults.append(
            "--knn-lambda and --knn-cache-lambda must be at most 1 together, the weight of the "
            f"language model being the rest, got {settings.knn_lambda} and {settings.cache_lambda}"
        )
    others = [name for name in given if name.startswith("cache_") and name != "cache_size"]
    if others and not size and not cfg.knn_tuned:
        flags = ", ".join(f"--knn-{name.replace('_', '-')}" for name in others)
        faults.append(f"{flags} without --knn-cache-size, which is 0: there is no cache")
    return faults


def datastore_paths(cfg) -> list[str]:
    """The directories named by ``--knn-datastore``."""
    return [path for path in (cfg.knn_datastore or "").split(":") if path]


class Settings(NamedTuple):
    """What is searched with, and how the neighbours are mixed in.

    temperature (float): or ``AUTO``, until the datastore has said what that is.
    cache_size (int): 0: no cache.
    cache_theta (float): None: as ``ContinuousCache`` chooses.
    """

    k: int = DEFAULT_K
    knn_lambda: float = DEFAULT_LAMBDA
    temperature: Union[float, str] = DEFAULT_TEMPERATURE
    nprobe: int = DEFAULT_NPROBE
    distances: str = DEFAULT_DISTANCES
    cache_size: int = 0
    cache_lambda: float = DEFAULT_CACHE_LAMBDA
    cache_theta: Optional[float] = None
    cache_metric: str = METRICS[0]
    cache_reset: str = CACHE_RESETS[0]


def given_settings(cfg) -> dict:
    """The ``Settings`` that the command line gives; a temperature that is no number as text."""
    given = {
        "k": cfg.knn_k,
        "knn_lambda": cfg.knn_lambda,
        "temperature": cfg.knn_temperature,
        "nprobe": cfg.knn_nprobe,
        "distances": cfg.knn_distances,
        "cache_size": cfg.knn_cache_size,
        "cache_lambda": cfg.knn_cache_lambda,
        "cache_theta": cfg.knn_cache_theta,
        "cache_metric": cfg.knn_cache_metric,
        "cache_reset": cfg.knn_cache_reset,
    }
    for name in ("distances", "cache_metric", "cache_reset"):
        # an Enum of fairseq's
        given[name] = None if given[name] is None else str(given[name])
    if given["temperature"] is not None:
        with contextlib.suppress(ValueError):
            given["temperature"] = float(given["temperature"])
    return {name: value for name, value in given.items() if value is not None}


def refuse_other_than_tuned(cfg, tuned: dict) -> None:
    """Refuse flags that say something else than what was tuned.

    Raises:
        UserError: naming all of them.
    """
    tuned = {**Settings()._asdict(), **tuned}
    faults = [
        f"--knn-{name.replace('knn_', '').replace('_', '-')} is {value}, {tuned[name]} was tuned"
        for name, value in given_settings(cfg).items()
        if value != tuned[name]
    ]
    if faults:
        raise UserError(
            f"fairseq_knnlm: --knn-tuned: {'; '.join(faults)}: drop these flags, or --knn-tuned"
        )
