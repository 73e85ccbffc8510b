"""What ``fairseq-knnlm-tune`` chose: how good it is, how to evaluate with it, and keeping it."""

import argparse
import logging
import os
import shlex
import time
from typing import NamedTuple, Optional

import torch

import fairseq_knnlm

from ..bootstrap import BLOCK_TOKENS, MIN_DOCUMENTS, Interval, paired_interval
from ..cache_sweep import CacheSetting, CacheSweep, log_p_cache
from ..cache_sweep import best as best_cache
from ..config import Settings
from ..interpolation import mix
from ..metrics import perplexity, without_infinities
from ..neighbors_file import Retrieved
from ..sweep import Setting, log_p_knn
from ..tuned import save_tuned
from ..version import __version__

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
    knn (Setting): neighbours; None without a datastore.
    cache (CacheSetting): a cache; None without one.
    knn_cache (CacheSetting): a cache besides these neighbours; None without either.
    """

    given: Settings
    knn: Optional[Setting] = None
    cache: Optional[CacheSetting] = None
    knn_cache: Optional[CacheSetting] = None

    def settings(self) -> dict:
        """By their names in JSON."""
        found = {"best": self.knn, "best_cache": self.cache, "best_knn_cache": self.knn_cache}
        return {name: setting for name, setting in found.items() if setting is not None}

    def final(self) -> dict:
        """What to evaluate with, as fields of ``Settings``."""
        found = {}
        if self.knn:
            found.update(k=self.knn.k, knn_lambda=self.knn.knn_lambda)
            found["temperature"] = self.knn.temperature
        cache = self.knn_cache or self.cache
        if cache:
            found.update(cache._asdict())
            del found["perplexity"]
            found.update(cache_metric=self.given.cache_metric, cache_reset=self.given.cache_reset)
        if not self.knn:
            found.pop("knn_lambda")
        return found

    def log_probs(self, retrieved: Retrieved) -> dict[str, torch.Tensor]:
        """Log-probabilities of the targets with each method, shape (N,), float32."""
        log_p_lm, scores = retrieved.log_p_lm, None
        found = {"base": log_p_lm}
        if self.cache:
            found["cache"] = self._with_cache(retrieved, self.cache, None)
        if self.knn:
            (scores,) = log_p_knn(retrieved, [self.knn.k], self.knn.temperature)
            found["knn"] = mix(log_p_lm, scores, knn_lambda=self.knn.knn_lambda)
        if self.knn_cache:
            found["knn_cache"] = self._with_cache(retrieved, self.knn_cache, scores)
        return found

    def _with_cache(self, retrieved, setting: CacheSetting, scores) -> torch.Tensor:
        cached = log_p_cache(
            retrieved, [setting.cache_size], [setting.cache_theta], *self._cache_settings()
        )
        return mix(
            retrieved.log_p_lm, scores, cached[0, 0], setting.knn_lambda, setting.cache_lambda
        )

    def _cache_settings(self):
        return self.given.cache_metric, self.given.cache_reset == "document"

    def tune_cache(self, retrieved: Retrieved, sizes, thetas) -> "Chosen":
        """The same with the best cache of a grid, see ``CacheSweep``; k and T stay."""
        started = time.monotonic()
        scores = None
        if self.knn:
            (scores,) = log_p_knn(retrieved, [self.knn.k], self.knn.temperature)
        sweep = CacheSweep(retrieved, *self._cache_settings(), scores)
        sweep.run(sizes, thetas)
        found = self._replace(
            cache=best_cache(sweep.alone),
            knn_cache=best_cache(sweep.with_knn) if self.knn else None,
        )
        chosen = found.knn_cache or found.cache
        logger.info(
            f"{len(sweep.alone)} caches in {time.monotonic() - started:.1f} s; best: size "
            f"{chosen.cache_size}, theta {chosen.cache_theta:g}, weight {chosen.cache_lambda:g}"
            + (f", lambda {chosen.knn_lambda:g}" if self.knn else "")
        )
        return found


def measure(split: str, retrieved: Retrieved, chosen: Chosen) -> dict:
    """Perplexity with every method, and how sure the differences are; also logged."""
    log_probs = chosen.log_probs(retrieved)
    base = log_probs.pop("base")
    result = {"split": split, "tokens": len(base), "base_perplexity": perplexity(base)}
    logger.info(
        f"{split}: perplexity {result['base_perplexity']:.2f} of the model alone, over "
        f"{len(base):,} tokens"
    )
    for name, mixed in log_probs.items():
        change = paired_interval(base, mixed, retrieved.document_starts)
        result[f"{name}_perplexity"] = perplexity(mixed)
        result["relative_change" if name == "knn" else f"{name}_change"] = change._asdict()
        logger.info(
            f"{split}: {result[f'{name}_perplexity']:.2f} {_WORDS[name]}: {_in_words(change)} "
            f"({_drawn(change)})"
        )
    if "knn_cache" in log_probs:
        change = paired_interval(
            log_probs["knn"], log_probs["knn_cache"], retrieved.document_starts
        )
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
    """The command line of ``fairseq-eval-lm`` for what was chosen: as typed, but for ours."""
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
    plugin = os.path.dirname(fairseq_knnlm.__file__)
    words = ["fairseq-eval-lm", *others, "--user-dir", plugin, "--task", "knnlm_lm"]
    words += ["--gen-subset", split]
    for name, value in chosen.final().items():
        words += [f"--knn-{name.replace('knn_', '').replace('_', '-')}", value]
    return shlex.join(map(str, words))


def store(datastores, settings: dict, chosen: Chosen, summary: dict) -> None:
    """Keep what was chosen in the datastore, for ``--knn-tuned``.

    Args:
        datastores (list of Datastore): that it was tuned with.
        settings (dict): everything that decided what was retrieved.
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
