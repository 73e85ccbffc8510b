"""Every ``--knn-*`` flag, its help and its range.

fairseq derives the command-line flags from the fields, and reads their types: no postponed
annotations here.
"""

import math
import os
from dataclasses import dataclass, field
from typing import Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks.language_modeling import LanguageModelingConfig
from omegaconf import II

from .errors import UserError
from .key_extractor import KEY_TYPES

DEFAULT_KEY = "ffn-input"
DEFAULT_METRIC = "l2"


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
    knn_k: int = field(default=1024, metadata={"help": "neighbours per query, >= 1"})
    knn_lambda: float = field(
        default=0.25, metadata={"help": "weight of p_knn in the mixture, in [0, 1]"}
    )
    knn_temperature: float = field(
        default=1.0, metadata={"help": "T > 0, divides the distances; worth tuning"}
    )
    knn_nprobe: int = field(default=32, metadata={"help": "inverted lists visited per query, >= 1"})
    knn_distances: ChoiceEnum(["exact", "index"]) = field(
        default="exact",
        metadata={
            "help": "'exact': distances from the stored keys; 'index': as the (quantised) index "
            "returns them"
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
    require(cfg.knn_k >= 1, "--knn-k", ">= 1", cfg.knn_k)
    require(0.0 <= cfg.knn_lambda <= 1.0, "--knn-lambda", "in [0, 1]", cfg.knn_lambda)
    require(
        0.0 < cfg.knn_temperature < math.inf,
        "--knn-temperature", "a finite number > 0", cfg.knn_temperature,
    )  # fmt: skip
    require(cfg.knn_nprobe >= 1, "--knn-nprobe", ">= 1", cfg.knn_nprobe)
    if faults:
        raise UserError("fairseq_knnlm: " + "; ".join(faults))


def datastore_paths(cfg) -> list[str]:
    """The directories named by ``--knn-datastore``."""
    return [path for path in (cfg.knn_datastore or "").split(":") if path]
