"""Every ``--knn-*`` flag, its help and its range.

fairseq derives the command-line flags from the fields, and reads their types: no postponed
annotations here.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Optional

from fairseq.dataclass import ChoiceEnum
from fairseq.tasks.language_modeling import LanguageModelingConfig

from ..datastore.manifest import refuse_part
from ..encoding.key_extractor import KEY_TYPES
from ..errors import UserError
from ..files import refuse_unwritable_outputs
from ..options import (
    DEFAULT_DISTANCES,
    DEFAULT_K,
    DEFAULT_KEY,
    DEFAULT_METRIC,
    DEFAULT_NPROBE,
    DEVICES,
    DISTANCES,
    METRICS,
)
from ..probability.continuous_cache import CACHE_METRICS
from ..scoring.settings import (
    CACHE_RESETS,
    DEFAULT_CACHE_LAMBDA,
    DEFAULT_LAMBDA,
    DEFAULT_TEMPERATURE,
    Settings,
    flag_of,
    range_faults,
    trime_faults,
    weight_fault,
)
from .stock_flags import stock_faults

# Fields that say something of neighbours alone; which state is the key matters to a cache as well.
_NEIGHBOR_FLAGS = (
    "knn_k", "knn_lambda", "knn_temperature", "knn_nprobe", "knn_distances", "knn_metric",
    "knn_index",
)  # fmt: skip

# Settings that are given beside --knn-tuned.
_NEVER_TUNED = ("skip",)


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
    knn_distances: Optional[ChoiceEnum(list(DISTANCES))] = field(
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
    knn_cache_metric: Optional[ChoiceEnum(list(CACHE_METRICS))] = field(
        default=None,
        metadata={
            "help": "what hidden states of the cache have in common: 'ip', the inner product, or "
            f"'l2', minus the squared distance (default: {CACHE_METRICS[0]})"
        },
    )
    knn_cache_reset: Optional[ChoiceEnum(CACHE_RESETS)] = field(
        default=None,
        metadata={
            "help": "'document': the cache is emptied where a document begins, after an empty "
            "line and where --sample-break-mode complete_doc begins one; 'block', with "
            "--trime-temperature: where a block does; 'none': never "
            f"(default: {CACHE_RESETS[0]})"
        },
    )
    trime_temperature: Optional[float] = field(
        default=None,
        metadata={
            "help": "tau > 0, divides what hidden states have in common: the cache, and neighbours "
            "by inner product, join the softmax of a model that was trained with --criterion "
            "trime_loss (default: they do not)"
        },
    )
    knn_tuned: bool = field(
        default=False,
        metadata={
            "help": "take k, lambda, temperature, nprobe, distances and the cache from what "
            "fairseq-knnlm-tune chose and stored in the datastore; with the gate that it fitted"
        },
    )
    knn_skip: Optional[float] = field(
        default=None,
        metadata={
            "help": "share of the searches that are not made, in [0, 1], with --knn-tuned and a "
            "gate that fairseq-knnlm-tune --knn-gate learned fitted: tokens that gain least from "
            "neighbours are scored by the language model alone (default: 0)"
        },
    )
    knn_device: ChoiceEnum(list(DEVICES)) = field(
        default=DEVICES[0],
        metadata={
            "help": "where neighbours are searched; auto: in an index on a GPU when faiss has one "
            "for it, exhaustively where the model is"
        },
    )
    knn_verify: ChoiceEnum(["read", "off"]) = field(
        default="read",
        metadata={
            "help": "'read': what is read of a datastore is compared with its checksums when it is "
            "read first, a chunk of keys at a time; 'off': only by fairseq-knnlm-info --verify"
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
    knn_metric: Optional[ChoiceEnum(list(METRICS))] = field(
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
    knn_output: Optional[str] = field(
        default=None,
        metadata={
            "help": "fairseq-eval-lm and fairseq-knnlm-*: write the results there, as JSON, with "
            "the settings in effect, where each comes from, hashes and versions (default: nowhere)",
        },
    )
    knn_output_tokens: Optional[str] = field(
        default=None,
        metadata={
            "help": "fairseq-eval-lm: write for each token its log-probability by the model, the "
            "neighbours, the cache and all together there, as .npz (default: nowhere)",
        },
    )


def check_settings(flags) -> None:
    """Refuse settings that cannot be, all faults at once; fairseq's own as well.

    Args:
        flags: of the task, its part of fairseq's configuration.

    Raises:
        UserError: naming every flag that is wrong, what it may be and what came.
    """
    given = given_settings(flags)
    out_of_range = range_faults(given)
    faults = [*stock_faults(flags), *_datastore_faults(flags), *out_of_range]
    if flags.knn_tuned and given.get("trime_temperature") is not None:
        faults.append(
            "--knn-tuned and --trime-temperature: nothing that was tuned is for one softmax over "
            "words and memories: drop one"
        )
    if given.get("nprobe") is not None and given.get("distances") == "exhaustive":
        faults.append("--knn-nprobe is for an index, --knn-distances exhaustive reads none")
    size, joined = given.get("cache_size"), "trime_temperature" in given
    if size and datastore_paths(flags) and not out_of_range and not joined:
        fault = weight_fault(Settings(**given))
        faults += [fault] if fault else []
    cache_flags = [name for name in given if name.startswith("cache_") and name != "cache_size"]
    if cache_flags and not size and not flags.knn_tuned:
        named = ", ".join(map(flag_of, cache_flags))
        faults.append(f"{named} without --knn-cache-size, which is 0: there is no cache")
    faults += trime_faults(given)
    if flags.knn_show_neighbors < 0:
        faults.append(f"--knn-show-neighbors must be >= 0, got {flags.knn_show_neighbors}")
    if given.get("skip") and not flags.knn_tuned:
        faults.append(
            f"--knn-skip {given['skip']} needs --knn-tuned: a gate tells which searches to leave "
            "out, and fairseq-knnlm-tune --knn-gate learned fits one"
        )
    if flags.knn_tuned and not datastore_paths(flags):
        faults.append("--knn-tuned needs the --knn-datastore that was tuned")
    if faults:
        raise UserError("; ".join(faults))
    names = ("knn_output", "knn_output_tokens")
    outputs = {flag_of(name): getattr(flags, name) for name in names}
    refuse_unwritable_outputs(outputs)
    for flag, path in outputs.items():
        if path is not None:
            refuse_part(flag, path)


def datastore_paths(flags) -> list[str]:
    """The directories named by ``--knn-datastore``."""
    return [path for path in (flags.knn_datastore or "").split(":") if path]


def _datastore_faults(flags) -> Iterator[str]:
    """What is wrong with ``--knn-datastore`` before any directory is opened."""
    if flags.knn_datastore is None:
        return
    paths = datastore_paths(flags)
    if not paths:
        yield (
            "--knn-datastore must name a directory, or several separated by ':', got "
            f"{flags.knn_datastore!r}"
        )
    by_place: dict[str, list[str]] = {}
    for path in paths:
        by_place.setdefault(os.path.realpath(path), []).append(path)
    for place, names in by_place.items():
        if len(names) > 1:
            yield (
                f"--knn-datastore names the directory {place} {len(names)} times "
                f"({', '.join(names)}): its entries would count so many times"
            )


def unused_neighbor_flags(flags) -> list[str]:
    """Flags of the neighbours that are given without a datastore, and so change nothing."""
    if datastore_paths(flags):
        return []
    names = [name for name in _NEIGHBOR_FLAGS if getattr(flags, name) is not None]
    return [flag_of(name) for name in names]


def _field_of(setting: str) -> str:
    """The field of the flags' dataclass for a field of ``Settings``."""
    return flag_of(setting)[len("--") :].replace("-", "_")


def given_settings(flags) -> dict:
    """The ``Settings`` that the command line gives; a temperature that is no number as text."""
    given = {name: getattr(flags, _field_of(name)) for name in Settings._fields}
    for name in ("distances", "cache_metric", "cache_reset"):
        # an Enum of fairseq's
        given[name] = None if given[name] is None else str(given[name])
    if given["temperature"] is not None:
        with contextlib.suppress(ValueError):
            given["temperature"] = float(given["temperature"])
    return {name: value for name, value in given.items() if value is not None}


def refuse_other_than_tuned(flags, tuned: dict) -> None:
    """Refuse flags that say something else than what was tuned.

    Args:
        flags: of the task.
        tuned (dict): from ``scoring.tuned_settings.settings_of_tuned``.

    Raises:
        UserError: naming all of them.
    """
    tuned = {**Settings()._asdict(), **tuned}
    faults = [
        f"{flag_of(name)} is {value}, {tuned[name]} was tuned"
        for name, value in given_settings(flags).items()
        if value != tuned[name] and name not in _NEVER_TUNED
    ]
    if faults:
        raise UserError(f"--knn-tuned: {'; '.join(faults)}: drop these flags, or --knn-tuned")
