"""Training with fairseq-train and memory: its batches, its warm-up, going on, two processes."""

import contextlib
import re
import shutil
import types

import numpy as np
import pytest
import torch
from helpers.commands import (
    ARCHITECTURES,
    MODEL,
    NO_THREADS,
    USER_DIR,
    command,
    evaluate,
    in_two_processes,
    run,
)
from helpers.small import make_dictionary

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.plugin.trime_batches import by_similarity, in_text_order, refuse_lonely

TRAINING = (
    "--criterion trime_loss --optimizer adam --lr 0.01 --tokens-per-sample 32 --max-tokens 256 "
    "--seed 7 --cpu --required-batch-size-multiple 1 --no-epoch-checkpoints --log-format simple "
    "--log-interval 1 " + " ".join(NO_THREADS)
)
# In the second epoch.
KILLED, UPDATES = 20, 24


def train_command(data, folder, *flags, architecture="adaptive"):
    architecture = re.sub(r"--criterion \S+", "", ARCHITECTURES[architecture])
    return [
        command("fairseq-train"), data, "--user-dir", USER_DIR, "--task", "knnlm_lm",
        "--save-dir", folder, *MODEL.split(), *architecture.split(), *TRAINING.split(),
        "--ddp-backend", "legacy_ddp", *flags,
    ]  # fmt: skip


def losses(output):
    """Of each update by its number."""
    found = re.findall(r"train_inner .*?loss=([\d.]+),.*?num_updates=(\d+)", output)
    return {int(update): loss for loss, update in found}


@pytest.mark.parametrize("memory", ["local", "long", "external"])
def test_training_that_is_continued_has_the_same_losses(memory, data, tmp_path):
    flags = ["--trime-memory", memory, "--disable-validation", "--trime-warmup-updates", 2]
    data = shutil.copytree(data, tmp_path / "data")  # what is similar is kept there
    whole = run(*train_command(data, tmp_path / "whole", *flags, "--max-update", UPDATES))
    begun = train_command(data, tmp_path / "parts", *flags, "--max-update", UPDATES)
    assert "epoch 002" in run(*begun[:-1], KILLED).stdout
    continued, expected = losses(run(*begun).stdout), losses(whole.stdout)
    assert set(continued) == set(range(KILLED + 1, UPDATES + 1))
    assert continued == {update: expected[update] for update in continued}
    models = [
        torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=False)["model"]
        for name in ("whole", "parts")
    ]
    # fairseq's buffers of this name hold whatever was in memory
    trained = {name for name in models[0] if not name.endswith("_float_tensor")}
    for name in trained:
        weight = models[0][name]
        torch.testing.assert_close(models[1][name], weight, rtol=1e-5, atol=1e-6)


def test_validation_reports_both_perplexities(data, tmp_path):
    flags = ["--max-update", 20, "--update-freq", 2, "--trime-memory", "long"]
    output = run(*train_command(data, tmp_path, *flags)).stdout
    (line,) = re.findall(r"\| valid \|.*", output)[-1:]
    assert re.search(r"\| ppl [\d.]+ .*\| lm_ppl [\d.]+ ", line)
    # the checkpoint is a language model as any other
    checkpoint = tmp_path / "checkpoint_last.pt"
    found = evaluate(data, checkpoint, "--gen-subset", "valid", task="language_modeling")
    expected = float(re.search(r"lm_ppl ([\d.]+)", line)[1])
    assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("architecture", ["adaptive", "plain"])
def test_two_processes(architecture, data, tmp_path):
    data = shutil.copytree(data, tmp_path / "data")
    flags = ["--trime-memory", "external", "--max-update", 8, "--trime-warmup-updates", 1]
    start = train_command(data, tmp_path / "both", *flags, architecture=architecture)
    output = in_two_processes(start, tmp_path)
    assert set(losses(output)) == set(range(1, 9))
    assert re.search(r"\| valid \|.*lm_ppl", output)


# -- batches ---------------------------------------------------------------------------------------


class Text(types.SimpleNamespace):
    """What a dataset of fairseq is asked for."""

    def __len__(self):
        return len(self.segments)

    def __getitem__(self, index):
        return {"id": index, "target": torch.from_numpy(self.segments[index])}


def test_long_keeps_the_order_of_the_text():
    text = Text(segments=[np.arange(4)] * 9)
    assert in_text_order(text).ordered_indices().tolist() == list(range(9))


@pytest.mark.parametrize("limits, holds", [((63, None), 1), ((64, 1), 1), ((64, None), 2)])
def test_batches_of_one_segment_are_refused(limits, holds):
    sizes = np.array([32] * 9 + [5])
    with contextlib.nullcontext() if holds > 1 else pytest.raises(UserError, match="--max-tokens"):
        refuse_lonely("long", sizes, *limits)


def test_external_is_another_order_each_time_the_same_for_a_seed(tmp_path):
    rng = np.random.default_rng(0)
    text = Text(segments=[rng.integers(4, 50, size=20) for _ in range(40)])
    dataset = by_similarity(text, len(make_dictionary(60)), str(tmp_path / "train"))
    orders = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        orders.append(dataset.ordered_indices().tolist())
    assert orders[0] == orders[1] != orders[2]
    assert all(sorted(order) == list(range(40)) for order in orders)
