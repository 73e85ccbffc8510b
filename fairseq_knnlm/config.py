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

from .errors import UserError
from .key_extractor import KEY_TYPES

DEFAULT_KEY = "ffn-input"
DEFAULT_METRIC = "l2"
DEFAULT_K = 1024
DEFAULT_LAMBDA = 0.25
DEFAULT_TEMPERATURE = 1.0
DEFAULT_NPROBE = 32
DEFAULT_DISTANCES = "exact"
AUTO = "auto"


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
    knn_distances: Optional[ChoiceEnum(["exact", "index"])] = field(
        default=None,
        metadata={
            "help": "'exact': distances from the stored keys; 'index': as the (quantised) index "
            f"returns them (default: {DEFAULT_DISTANCES})"
        },
    )
    knn_tuned: bool = field(
        default=False,
        metadata={
            "help": "take k, lambda, temperature, nprobe and distances from what "
            "fairseq-knnlm-tune chose and stored in the datastore"
        },
    )
    knn_device: ChoiceEnum(["auto", "cpu", "cuda"]) = field(
        default="auto",
        metadata={"help": "where the index is searched; auto: a GPU when faiss has one"},
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
    if cfg.knn_tuned and not datastore_paths(cfg):
        faults.append("--knn-tuned needs the --knn-datastore that was tuned")
    if faults:
        raise UserError("fairseq_knnlm: " + "; ".join(faults))


def datastore_paths(cfg) -> list[str]:
    """The directories named by ``--knn-datastore``."""
    return [path for path in (cfg.knn_datastore or "").split(":") if path]


class Settings(NamedTuple):
    """What is searched with, and how the neighbours are mixed in.

    temperature (float): or ``AUTO``, until the datastore has said what that is.
    """

    k: int = DEFAULT_K
    knn_lambda: float = DEFAULT_LAMBDA
    temperature: Union[float, str] = DEFAULT_TEMPERATURE
    nprobe: int = DEFAULT_NPROBE
    distances: str = DEFAULT_DISTANCES


def given_settings(cfg) -> dict:
    """The ``Settings`` that the command line gives; a temperature that is no number as text."""
    given = {
        "k": cfg.knn_k,
        "knn_lambda": cfg.knn_lambda,
        "temperature": cfg.knn_temperature,
        "nprobe": cfg.knn_nprobe,
        "distances": None if cfg.knn_distances is None else str(cfg.knn_distances),
    }
    if given["temperature"] is not None:
        with contextlib.suppress(ValueError):
            given["temperature"] = float(given["temperature"])
    return {name: value for name, value in given.items() if value is not None}


def refuse_other_than_tuned(cfg, tuned: dict) -> None:
    """Refuse flags that say something else than what was tuned.

    Raises:
        UserError: naming all of them.
    """
    faults = [
        f"--knn-{name.replace('knn_', '')} is {value}, {tuned[name]} was tuned"
        for name, value in given_settings(cfg).items()
        if value != tuned[name]
    ]
    if faults:
        raise UserError(
            f"fairseq_knnlm: --knn-tuned: {'; '.join(faults)}: drop these flags, or --knn-tuned"
        )
