"""fairseq-eval-lm with one softmax over words and memories, against a loop in float64."""

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.commands import build, evaluate
from helpers.trime import joint_nll

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.scoring.cache_reader import make_cache_reader
from fairseq_knnlm.scoring.settings import Settings

TRIME = ("--trime-temperature", 1.2)


def text_of(task, split="valid"):
    task.load_dataset(split)
    dataset = task.dataset(split)
    return [(dataset[i]["source"], dataset[i]["target"]) for i in range(len(dataset))]


@pytest.mark.parametrize("by_block", [True, False], ids=["local", "long"])
@pytest.mark.parametrize("kind", ["adaptive", "plain"])
def test_perplexity_is_that_of_the_loop(kind, by_block, data, checkpoints):
    reset = ["--knn-cache-reset", "block"] if by_block else []
    flags = ("--gen-subset", "valid", "--knn-cache-size", 50, *reset, *TRIME)
    found = evaluate(data, checkpoints[kind], *flags)
    task, model = oracle.load(data, checkpoints[kind], 32)
    nll = joint_nll(model, text_of(task), 50, 1.2, by_block)
    assert found == pytest.approx(nll.mean().exp().item(), rel=1e-5)
    # whatever the batches and the processes that share the text
    assert evaluate(data, checkpoints[kind], *flags, "--max-tokens", 64) == pytest.approx(
        found, rel=1e-6
    )


def test_what_is_retrieved_joins_the_softmax_and_is_mixed_in(data, checkpoints, tmp_path):
    build(data, checkpoints["plain"], tmp_path / "ip", "--knn-index", "Flat", "--knn-metric", "ip")
    flags = ("--knn-datastore", tmp_path / "ip", "--knn-k", 16, "--knn-lambda", 0.3)
    flags += ("--knn-temperature", 5, "--knn-cache-size", 50)
    found = evaluate(data, checkpoints["plain"], "--gen-subset", "valid", *flags, *TRIME)

    task, model = oracle.load(data, checkpoints["plain"], 32)
    keys, values = (np.load(tmp_path / "ip" / f"{name}.npy") for name in ("keys", "values"))
    keys = keys.astype(np.float64)
    queries, targets, _ = oracle.score(task, model, "valid")

    def retrieve(state):
        nearest = np.argsort(-(keys @ state.numpy()), kind="stable")[:16]
        return torch.from_numpy(keys[nearest]), values[nearest].tolist()

    p = (-joint_nll(model, text_of(task), 50, 1.2, retrieve=retrieve)).exp().numpy()
    p_knn = np.exp(oracle.knn_log_probs(keys, values, queries, targets, 16, 5, "ip"))
    expected = np.exp(-np.log(0.7 * p + 0.3 * p_knn).mean())
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "flags, message",
    [
        (TRIME, "--trime-temperature needs --knn-cache-size"),
        ((*TRIME, "--knn-cache-size", 9, "--knn-cache-lambda", 0.1), "--knn-cache-lambda: with"),
        ((*TRIME, "--knn-cache-size", 9, "--knn-cache-metric", "l2"), "must be ip"),
        (("--trime-temperature", 0, "--knn-cache-size", 9), "--trime-temperature must be"),
        (("--knn-cache-size", 9, "--knn-cache-reset", "block"), "is for --trime-temperature"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message, data, checkpoints):
    with pytest.raises(UserError, match=message):
        evaluate(data, checkpoints["plain"], *flags)


def test_a_cache_of_its_own_distribution_is_not_made_in_its_place():
    with pytest.raises(UserError, match="--trime-temperature is for fairseq-eval-lm"):
        make_cache_reader(Settings(cache_size=9, trime_temperature=1.0))
