"""What ``fairseq-knnlm-tune`` chose: how good it is, how to evaluate with it, and keeping it."""

import argparse
import functools
import logging
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

import numpy as np
import torch

from ..datastore.tuned import WITHOUT_CACHE, find_tuned, in_words, save_tuned
from ..errors import UserError
from ..files import without_infinities
from ..gating.gates import Gate, Weights
from ..gating.store import to_bytes
from ..probability import bootstrap
from ..probability.bootstrap import paired_interval
from ..probability.metrics import bits_per_byte, perplexity
from ..probability.mixture import mix
from ..scoring.settings import Settings, flag_of, refuse_impossible
from ..scoring.words import log_probs_of_words
from ..units import in_time
from ..version import __version__
from .cache_sweep import CacheSweep, log_p_cache
from .gate_data import GateData, look, mixture, skip_curve, weigh
from .grid import CacheGridPoint, KNNGridPoint, best, of_larger_units
from .knn_sweep import log_p_knn
from .tuning_data import TuningData

logger = logging.getLogger("fairseq_knnlm.tune")

# Names of methods in JSON, the best at the end, and what they say in words.
METHODS = {
    "cache": "with a cache",
    "knn": "with neighbours",
    "knn_cache": "with neighbours and a cache",
    "gate": "through the gate",
}
# Changes in JSON that something makes besides another method, and the same in words.
BESIDES = {
    "knn_cache_change_from_knn": "the cache, besides neighbours",
    "gate_change_from_constant": "the gate, besides constant weights",
}


def change_of(method: str) -> str:
    """The name in JSON of the change that a method makes from the model alone."""
    return "relative_change" if method == "knn" else f"{method}_change"


class Chosen(NamedTuple):
    """The best settings, each of its own method.

    given (Settings): what was not tuned.
    knn (KNNGridPoint): neighbours; None without a datastore.
    cache (CacheGridPoint): a cache; None without one.
    knn_cache (CacheGridPoint): a cache besides these neighbours; None unless both are there.
    cache_grid (list of CacheGridPoint): all that was tried for *knn_cache*.
    gate (Gate): weighs neighbours, and the cache if there is one, for each token; None: the weights
        are the same for all.
    """

    given: Settings
    knn: Optional[KNNGridPoint] = None
    cache: Optional[CacheGridPoint] = None
    knn_cache: Optional[CacheGridPoint] = None
    cache_grid: Sequence[CacheGridPoint] = ()
    gate: Optional[Gate] = None

    def points(self) -> dict:
        """Those that there are, by their names in JSON."""
        points = {"best": self.knn, "best_cache": self.cache, "best_knn_cache": self.knn_cache}
        return {name: point for name, point in points.items() if point is not None}

    def final(self) -> dict:
        """What to evaluate with, as fields of ``Settings``."""
        fields = self.without_cache()
        cache = self.knn_cache or self.cache
        if cache:
            fields.update(cache._asdict())
            del fields["perplexity"]
            fields.update(cache_metric=self.given.cache_metric, cache_reset=self.given.cache_reset)
        if not self.knn:
            fields.pop("knn_lambda")
        return fields

    def without_cache(self) -> dict:
        """The same of neighbours alone; empty without a datastore."""
        if not self.knn:
            return {}
        fields = self.knn._asdict()
        del fields["perplexity"]
        return fields

    def log_probs(self, data: TuningData) -> dict[str, torch.Tensor]:
        """Log-probabilities of the targets with each method, shape (N,), float32."""
        log_p_lm, scores = data.log_p_lm, None
        log_probs = {"base": log_p_lm}
        if self.cache:
            log_probs["cache"] = self._with_cache(data, self.cache, None)
        if self.knn:
            (scores,) = log_p_knn(data, [self.knn.k], self.knn.temperature)
            log_probs["knn"] = mix(log_p_lm, scores, knn_lambda=self.knn.knn_lambda)
        if self.knn_cache:
            log_probs["knn_cache"] = self._with_cache(data, self.knn_cache, scores)
        if self.gate:
            gated = self._gated(data)
            log_probs["gate"] = mixture(weigh(self.gate, gated), gated.log_probs)
        return log_probs

    def weigh(self, data: TuningData) -> Weights:
        """The weights that the gate gives to all tokens of a text."""
        return weigh(self.gate, self._gated(data))

    def skip_curve(self, data: TuningData, starts: Optional[np.ndarray] = None) -> list[dict]:
        """Perplexity against the share of the searches that are not made.

        Args:
            data (TuningData): of a text.
            starts (ndarray): as of ``measure``.

        Returns:
            list of dict: see ``gate_data.skip_curve``; empty where the gate cannot skip any.
        """
        if not self.gate.looks_before:
            return []
        return skip_curve(self.gate, self._gated(data), starts)

    def _gated(self, data: TuningData) -> GateData:
        return self.gate_data(data, self.gate.temperatures, look(self.gate, data))

    def gate_data(self, data: TuningData, temperatures, before=None) -> GateData:
        """What a gate is fitted to beside what was chosen, see ``GateData.of``."""
        cached = self._log_p_cache(data, self.knn_cache) if self.knn_cache else None
        return GateData.of(data, self.knn.k, temperatures, cached, before)

    def _with_cache(self, data: TuningData, point: CacheGridPoint, scores) -> torch.Tensor:
        cached = self._log_p_cache(data, point)
        return mix(data.log_p_lm, scores, cached, point.knn_lambda, point.cache_lambda)

    def _log_p_cache(self, data: TuningData, point: CacheGridPoint) -> torch.Tensor:
        settings = [point.cache_size], [point.cache_theta], *self._cache_settings()
        return log_p_cache(data, *settings)[0, 0]

    def _cache_settings(self):
        refuse_impossible("Chosen", self.given)
        return self.given.cache_metric, self.given.cache_reset == "document"

    def tune_cache(self, data: TuningData, sizes, thetas, tokens_per_unit: float = 1.0) -> "Chosen":
        """The same with the best cache of a grid, for the k and T that were chosen.

        Args:
            data (TuningData): of the text that is tuned on, with queries.
            sizes (sequence of int): see ``CacheSweep.run``.
            thetas (sequence of float): see ``CacheSweep.run``.
            tokens_per_unit (float): of the units that perplexity is of, see ``of_larger_units``.

        Raises:
            UserError: if a setting of the cache, a size or a theta cannot be, or *data* lacks
                queries.
        """
        started = time.monotonic()
        scores = None
        if self.knn:
            (scores,) = log_p_knn(data, [self.knn.k], self.knn.temperature)
        sweep = CacheSweep(data, *self._cache_settings(), scores)
        sweep.run(sizes, thetas)
        of_units = functools.partial(of_larger_units, tokens_per_unit=tokens_per_unit)
        cache_grid = list(map(of_units, sweep.with_knn))
        chosen = self._replace(
            cache=of_units(best(sweep.alone)),
            knn_cache=best(cache_grid) if self.knn else None,
            cache_grid=cache_grid,
        )
        point = chosen.knn_cache or chosen.cache
        logger.info(
            f"{len(sweep.alone)} caches in {in_time(time.monotonic() - started)}; best: size "
            f"{point.cache_size:,}, theta {point.cache_theta:g}, weight {point.cache_lambda:g}"
            + (f", lambda {point.knn_lambda:g}" if self.knn else "")
        )
        return chosen


def measure(
    split: str,
    data: TuningData,
    chosen: Chosen,
    starts: Optional[np.ndarray] = None,
    text_bytes: Optional[int] = None,
) -> dict:
    """Perplexity with every method, and how sure the differences are; also logged.

    Args:
        split (str): name of the text, for the log.
        data (TuningData): of that text.
        chosen (Chosen): the settings.
        starts (ndarray): shape (W,), rows at which words begin, see ``scoring.words``: perplexity
            is of these; None: of the tokens.
        text_bytes (int): of the text, see ``scoring.text_bytes``; None: not known.

    Returns:
        dict: perplexities, bits per byte where the bytes are known, and changes by name, for JSON.

    Raises:
        UserError: if *data* does not say where documents begin, or lacks what a method needs.
    """
    if data.document_starts is None:
        raise UserError("measure: data must have document_starts, but lacks them")
    log_probs, documents, unit = chosen.log_probs(data), data.document_starts, "tokens"
    if starts is not None:
        log_probs = {name: log_probs_of_words(each, starts) for name, each in log_probs.items()}
        documents, unit = np.searchsorted(starts, documents), "words"
    base = log_probs.pop("base")
    result = {
        "split": split,
        "tokens": len(data.log_p_lm),
        "counted": len(base),
        "base_perplexity": perplexity(base),
        "bytes": text_bytes,
        **_bits_per_byte({"base": base, **log_probs}, text_bytes),
    }
    logger.info(
        f"{split}: perplexity {result['base_perplexity']:.2f} of the model alone, over "
        f"{len(base):,} {unit}" + _of_tokens(result)
    )
    for name, mixed in log_probs.items():
        change = paired_interval(base, mixed, documents)
        result[f"{name}_perplexity"] = perplexity(mixed)
        result[change_of(name)] = change._asdict()
        logger.info(
            f"{split}: {result[f'{name}_perplexity']:.2f} {METHODS[name]}: {change.value:+.2%}, "
            f"{bootstrap.in_words(change, counted=unit)}"
        )
    for name, what, without, mixed in _besides(log_probs):
        change = paired_interval(without, mixed, documents)
        result[name] = change._asdict()
        logger.info(
            f"{split}: what {what}: {change.value:+.2%}, {bootstrap.in_words(change, counted=unit)}"
        )
    if "gate" in log_probs:
        result["skip_curve"] = chosen.skip_curve(data, starts)
    return result


def _besides(log_probs: dict) -> Iterator[tuple[str, str, torch.Tensor, torch.Tensor]]:
    """Each change of ``BESIDES``: its name, what makes it, and log p without and with that."""
    if "gate" in log_probs:
        constant = log_probs.get("knn_cache", log_probs["knn"])
        what = "the gate adds to constant weights"
        yield "gate_change_from_constant", what, constant, log_probs["gate"]
    if "knn_cache" in log_probs:
        what = "the cache adds to neighbours"
        yield "knn_cache_change_from_knn", what, log_probs["knn"], log_probs["knn_cache"]


def _bits_per_byte(log_probs: dict, text_bytes: Optional[int]) -> dict:
    """Of every method, by its name in JSON; nothing where the bytes are not known."""
    if text_bytes is None:
        return {}
    return {
        f"{name}_bits_per_byte": bits_per_byte(each, text_bytes) for name, each in log_probs.items()
    }


def _of_tokens(result: dict) -> str:
    """The same perplexity of the tokens that words are made of, and of bytes; '' of tokens."""
    tokens, counted = result["tokens"], result["counted"]
    if tokens == counted:
        return ""
    of_tokens = result["base_perplexity"] ** (counted / tokens)
    text = f" ({of_tokens:.2f} over {tokens:,} tokens"
    if result["bytes"] is not None:
        text += f", {result['base_bits_per_byte']:.3f} bits for each of {result['bytes']:,} bytes"
    return f"{text})"


def command(typed, split: str, chosen: Chosen) -> str:
    """The command line of ``fairseq-eval-lm`` for what was chosen: as typed, but for our flags.

    Args:
        typed (list of str): the command line of ``fairseq-knnlm-tune``.
        split (str): to be evaluated.
        chosen (Chosen): the settings.
    """
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in (
        "--gen-subset", "--report-subset", "--user-dir", "--task", "--knn-neighbors",
        "--knn-output", "--knn-grid-k", "--knn-grid-temperature", "--knn-grid-lambda",
        "--knn-grid-cache-size", "--knn-grid-cache-theta", "--knn-k", "--knn-lambda",
        "--knn-temperature", "--knn-cache-size", "--knn-cache-lambda", "--knn-cache-theta",
        "--knn-cache-metric", "--knn-cache-reset", "--report", "--knn-gate",
    ):  # fmt: skip
        ours.add_argument(flag)
    for flag in ("--report-on-tuned", "--no-store", "--overwrite"):
        ours.add_argument(flag, action="store_true")
    _, others = ours.parse_known_args(typed)
    plugin = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    words = ["fairseq-eval-lm", *others, "--user-dir", plugin, "--task", "knnlm_lm"]
    words += ["--gen-subset", split]
    if chosen.gate:  # which no flag can say
        return shlex.join([*words, "--knn-tuned"])
    for name, value in chosen.final().items():
        words += [flag_of(name), value]
    return shlex.join(map(str, words))


def refuse_to_replace(paths: Sequence[str], data: dict, tokens: int) -> None:
    """Refuse, before any work, to replace a setting that was tuned on more text.

    Args:
        paths (sequence of str): directories of the datastores that are tuned with.
        data (dict): ``split`` and ``sha256`` of the text that will be tuned on.
        tokens (int): of it.

    Raises:
        UserError: naming both, and the flags that say what to do.
    """
    stored = find_tuned(paths)
    # The same text may have a few tokens less in another break mode.
    if stored is None or stored.get("data") == data:
        return
    if stored.get("tuned_on", {}).get("tokens", 0) > tokens:
        raise UserError(
            f"{paths[0]} holds a setting that was tuned on more text ({in_words(stored)}) than "
            f"--gen-subset {data['split']} has, {tokens:,} tokens: pass --overwrite to replace it, "
            "or --no-store to keep it"
        )


def store(datastores, settings: dict, chosen: Chosen, summary: dict) -> None:
    """Keep what was chosen in the datastore, for ``--knn-tuned``; log what it replaces.

    Args:
        datastores (list of Datastore): that it was tuned with.
        settings (dict): everything that decided what was retrieved.
        chosen (Chosen): the settings.
        summary (dict): ``tuned_on`` and, if another text was reported on, ``reported_on``, each
            from ``measure``.
    """
    paths = [datastore.path for datastore in datastores]
    tuned = {
        **chosen.final(),
        **{name: settings[name] for name in ("nprobe", "distances", "model", "data", "context")},
        **{name: summary[name] for name in ("tuned_on", "reported_on") if name in summary},
        "versions": {"fairseq_knnlm": __version__},
    }
    gate = None
    if chosen.gate:
        tuned["gate"], gate = chosen.gate.kind, to_bytes(chosen.gate)
    if chosen.cache:
        tuned[WITHOUT_CACHE] = chosen.without_cache()
    replaced = find_tuned(paths)
    try:
        path = save_tuned(paths, without_infinities(tuned), gate)
    except OSError as error:
        logger.warning(f"the setting cannot be stored in the datastore, for --knn-tuned: {error}")
        return
    logger.info(f"stored in {path}, for --knn-tuned: {in_words(tuned)}")
    if replaced is not None:
        logger.info(f"in place of: {in_words(replaced)}")
