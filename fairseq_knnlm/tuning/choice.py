"""What ``fairseq-knnlm-tune`` chose: how good it is, how to evaluate with it, and keeping it."""

import argparse
import logging
import os
import shlex
import time
from typing import NamedTuple, Optional

import torch

from ..datastore.tuned import save_tuned
from ..files import without_infinities
from ..probability.bootstrap import BLOCK_TOKENS, MIN_DOCUMENTS, Interval, paired_interval
from ..probability.metrics import perplexity
from ..probability.mixture import mix
from ..scoring.settings import Settings, flag_of
from ..units import in_time
from ..version import __version__
from .cache_sweep import CacheSweep, log_p_cache
from .grid import CacheGridPoint, KNNGridPoint, best
from .knn_sweep import log_p_knn
from .tuning_data import TuningData

logger = logging.getLogger("fairseq_knnlm.tune")

# What the names of methods in JSON say in words.
_WORDS = {
    "cache": "with a cache",
    "knn": "with neighbours",
    "knn_cache": "with neighbours and a cache",
}


class Chosen(NamedTuple):
    """The best settings, each of its own method.

    given (Settings): what was not tuned.
    knn (KNNGridPoint): neighbours; None without a datastore.
    cache (CacheGridPoint): a cache; None without one.
    knn_cache (CacheGridPoint): a cache besides these neighbours; None without either.
    """

    given: Settings
    knn: Optional[KNNGridPoint] = None
    cache: Optional[CacheGridPoint] = None
    knn_cache: Optional[CacheGridPoint] = None

    def points(self) -> dict:
        """Those that there are, by their names in JSON."""
        points = {"best": self.knn, "best_cache": self.cache, "best_knn_cache": self.knn_cache}
        return {name: point for name, point in points.items() if point is not None}

    def final(self) -> dict:
        """What to evaluate with, as fields of ``Settings``."""
        fields = {}
        if self.knn:
            fields.update(k=self.knn.k, knn_lambda=self.knn.knn_lambda)
            fields["temperature"] = self.knn.temperature
        cache = self.knn_cache or self.cache
        if cache:
            fields.update(cache._asdict())
            del fields["perplexity"]
            fields.update(cache_metric=self.given.cache_metric, cache_reset=self.given.cache_reset)
        if not self.knn:
            fields.pop("knn_lambda")
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
        return log_probs

    def _with_cache(self, data: TuningData, point: CacheGridPoint, scores) -> torch.Tensor:
        ((cached,),) = log_p_cache(
            data, [point.cache_size], [point.cache_theta], *self._cache_settings()
        )
        return mix(data.log_p_lm, scores, cached, point.knn_lambda, point.cache_lambda)

    def _cache_settings(self):
        return self.given.cache_metric, self.given.cache_reset == "document"

    def tune_cache(self, data: TuningData, sizes, thetas) -> "Chosen":
        """The same with the best cache of a grid, for the k and T that were chosen.

        Args:
            data (TuningData): of the text that is tuned on, with queries.
            sizes (sequence of int): see ``CacheSweep.run``.
            thetas (sequence of float): see ``CacheSweep.run``.
        """
        started = time.monotonic()
        scores = None
        if self.knn:
            (scores,) = log_p_knn(data, [self.knn.k], self.knn.temperature)
        sweep = CacheSweep(data, *self._cache_settings(), scores)
        sweep.run(sizes, thetas)
        chosen = self._replace(
            cache=best(sweep.alone), knn_cache=best(sweep.with_knn) if self.knn else None
        )
        point = chosen.knn_cache or chosen.cache
        logger.info(
            f"{len(sweep.alone)} caches in {in_time(time.monotonic() - started)}; best: size "
            f"{point.cache_size:,}, theta {point.cache_theta:g}, weight {point.cache_lambda:g}"
            + (f", lambda {point.knn_lambda:g}" if self.knn else "")
        )
        return chosen


def measure(split: str, data: TuningData, chosen: Chosen) -> dict:
    """Perplexity with every method, and how sure the differences are; also logged.

    Args:
        split (str): name of the text, for the log.
        data (TuningData): of that text.
        chosen (Chosen): the settings.

    Returns:
        dict: perplexities and changes by name, for JSON.
    """
    log_probs = chosen.log_probs(data)
    base = log_probs.pop("base")
    result = {"split": split, "tokens": len(base), "base_perplexity": perplexity(base)}
    logger.info(
        f"{split}: perplexity {result['base_perplexity']:.2f} of the model alone, over "
        f"{len(base):,} tokens"
    )
    for name, mixed in log_probs.items():
        change = paired_interval(base, mixed, data.document_starts)
        result[f"{name}_perplexity"] = perplexity(mixed)
        result["relative_change" if name == "knn" else f"{name}_change"] = change._asdict()
        logger.info(
            f"{split}: {result[f'{name}_perplexity']:.2f} {_WORDS[name]}: {_in_words(change)} "
            f"({_drawn(change)})"
        )
    if "knn_cache" in log_probs:
        change = paired_interval(log_probs["knn"], log_probs["knn_cache"], data.document_starts)
        result["knn_cache_change_from_knn"] = change._asdict()
        logger.info(f"{split}: what the cache adds to neighbours: {_in_words(change)}")
    return result


def _in_words(change: Interval) -> str:
    return f"{change.value:+.2%}, 95% interval [{change.low:+.2%}, {change.high:+.2%}]"


def _drawn(change: Interval) -> str:
    if change.unit == "blocks":
        return (
            f"{change.units:,} blocks of {BLOCK_TOKENS:,} tokens, for want of {MIN_DOCUMENTS} "
            "documents"
        )
    return f"{change.units:,} documents"


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
        "--knn-cache-metric", "--knn-cache-reset", "--report",
    ):  # fmt: skip
        ours.add_argument(flag)
    ours.add_argument("--report-on-tuned", action="store_true")
    _, others = ours.parse_known_args(typed)
    plugin = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    words = ["fairseq-eval-lm", *others, "--user-dir", plugin, "--task", "knnlm_lm"]
    words += ["--gen-subset", split]
    for name, value in chosen.final().items():
        words += [flag_of(name), value]
    return shlex.join(map(str, words))


def store(datastores, settings: dict, chosen: Chosen, summary: dict) -> None:
    """Keep what was chosen in the datastore, for ``--knn-tuned``.

    Args:
        datastores (list of Datastore): that it was tuned with.
        settings (dict): everything that decided what was retrieved.
        chosen (Chosen): the settings.
        summary (dict): ``tuned_on`` and, if another text was reported on, ``reported_on``, each
            from ``measure``.
    """
    tuned = {
        **chosen.final(),
        **{name: settings[name] for name in ("nprobe", "distances", "model", "data", "context")},
        **{name: summary[name] for name in ("tuned_on", "reported_on") if name in summary},
        "versions": {"fairseq_knnlm": __version__},
    }
    try:
        path = save_tuned([datastore.path for datastore in datastores], without_infinities(tuned))
    except OSError as error:
        logger.warning(f"the setting cannot be stored in the datastore, for --knn-tuned: {error}")
    else:
        logger.info(f"stored in {path}: fairseq-eval-lm --knn-tuned evaluates with it")
