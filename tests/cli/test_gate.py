"""Gates from the command line: tuned, stored, evaluated, generated with, inspected, refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.commands import build, call, evaluate

from fairseq_knnlm.cli import info, inspect, tune
from fairseq_knnlm.datastore.manifest import GATE
from fairseq_knnlm.datastore.tuned import read_tuned
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.gating.store import from_bytes
from fairseq_knnlm.hub import from_pretrained

KINDS = ["buckets", "nest", "learned"]


@pytest.fixture(scope="module")
def built(data, checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gates")
    build(data, checkpoints["adaptive"], folder / "d", "--knn-index", "Flat")
    return folder / "d"


def tune_gate(data, checkpoint, datastore, kind, *flags):
    """Tune on valid and report on test; what the command writes."""
    output = datastore.parent / f"{datastore.name}.json"
    call(
        tune.main, data, "--path", checkpoint, "--knn-datastore", datastore, "--knn-k", 32,
        "--tokens-per-sample", 32, "--cpu", "--log-format", "none", "--num-workers", 0,
        "--report-subset", "test", "--knn-gate", kind, "--knn-output", output, *flags,
    )  # fmt: skip
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def gated(data, checkpoints, built, tmp_path_factory):
    """For each kind a datastore that was tuned with such a gate, and what came out."""
    folder, done = tmp_path_factory.mktemp("tuned"), {}

    def with_gate(kind, *flags):
        name = "-".join([kind, *map(str, flags)]).replace("/", "_")
        if name not in done:
            shutil.copytree(built, folder / name)
            result = tune_gate(data, checkpoints["adaptive"], folder / name, kind, *flags)
            done[name] = folder / name, result
        return done[name]

    return with_gate


@pytest.mark.parametrize("kind", KINDS)
def test_the_stored_gate_evaluates_as_it_was_reported(data, checkpoints, gated, kind):
    datastore, result = gated(kind)
    report = result["reported_on"]
    assert report["gate_change_from_constant"]["value"] == pytest.approx(
        report["gate_perplexity"] / report["knn_perplexity"] - 1, rel=1e-6
    )
    flags = ["--knn-datastore", datastore, "--knn-tuned"]
    found = evaluate(data, checkpoints["adaptive"], *flags)
    assert found == pytest.approx(report["gate_perplexity"], rel=1e-5)
    assert result["command"].endswith("--knn-tuned")
    assert read_tuned(str(datastore))["gate"] == kind


def test_a_gate_with_a_cache_weighs_it_too(data, checkpoints, gated):
    for kind in KINDS:
        datastore, result = gated(kind, "--knn-cache-size", 50)
        flags = ["--knn-datastore", datastore, "--knn-tuned"]
        found = evaluate(data, checkpoints["adaptive"], *flags)
        assert found == pytest.approx(result["reported_on"]["gate_perplexity"], rel=1e-5)


def test_skipping_from_nothing_to_everything(data, checkpoints, gated):
    datastore, result = gated("learned")
    flags = ["--knn-datastore", datastore, "--knn-tuned"]
    none, some, most, all_ = (
        evaluate(data, checkpoints["adaptive"], *flags, "--knn-skip", share)
        for share in (0, 0.3, 0.9, 1)
    )
    assert none == evaluate(data, checkpoints["adaptive"], *flags)
    assert all_ == evaluate(data, checkpoints["adaptive"])
    assert none < most < all_ and none < some < all_
    curve = {point["skip"]: point for point in result["reported_on"]["skip_curve"]}
    assert curve[0.3]["perplexity"] == pytest.approx(some, rel=1e-5)
    assert curve[0.0]["skipped"] == 0 and curve[1.0]["skipped"] == 1
    assert all_ == pytest.approx(curve[1.0]["perplexity"], rel=1e-5)


def test_what_is_written_of_each_token_has_its_weight(data, checkpoints, gated, tmp_path):
    flags = ["--knn-datastore", gated("learned")[0], "--knn-tuned", "--knn-skip", 0.4]
    files = ["--knn-output", tmp_path / "o.json", "--knn-output-tokens", tmp_path / "o.npz"]
    evaluate(data, checkpoints["adaptive"], *flags, *files)
    settings = json.loads((tmp_path / "o.json").read_text())["settings"]
    assert settings["skip"] == {"value": 0.4, "source": "given"}
    with np.load(tmp_path / "o.npz") as file:
        columns = {name: file[name] for name in file.files}
    weights, p_lm = columns["knn_lambda"].astype(float), np.exp(columns["log_p_lm"].astype(float))
    skipped = weights == 0
    assert 0.2 < skipped.mean() < 0.6
    assert np.isnan(columns["log_p_knn"][skipped]).all()
    assert np.array_equal(columns["log_p"][skipped], columns["log_p_lm"][skipped])
    mixed = weights * np.exp(columns["log_p_knn"].astype(float)) + (1 - weights) * p_lm
    np.testing.assert_allclose(np.exp(columns["log_p"][~skipped]), mixed[~skipped], rtol=1e-4)


def test_without_a_gate_nothing_is_said_of_it(data, checkpoints, built, tmp_path):
    files = ["--knn-output", tmp_path / "o.json", "--knn-output-tokens", tmp_path / "o.npz"]
    evaluate(data, checkpoints["adaptive"], "--knn-datastore", built, "--knn-k", 8, *files)
    assert "skip" not in json.loads((tmp_path / "o.json").read_text())["settings"]
    with np.load(tmp_path / "o.npz") as file:
        assert "knn_lambda" not in file.files


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_gives_the_same_gate(data, checkpoints, built, gated, tmp_path, kind):
    datastore, result = gated(kind)
    shutil.copytree(built, tmp_path / "d")
    again = tune_gate(data, checkpoints["adaptive"], tmp_path / "d", kind)
    assert again["reported_on"] == result["reported_on"]
    assert (tmp_path / "d" / GATE).read_bytes() == (datastore / GATE).read_bytes()


def test_the_text_that_is_reported_on_does_not_change_the_gate(
    data, checkpoints, built, gated, tmp_path
):
    datastore, _ = gated("learned")
    shutil.copytree(built, tmp_path / "d")
    tune_gate(data, checkpoints["adaptive"], tmp_path / "d", "learned", "--report-subset", "train")
    assert (tmp_path / "d" / GATE).read_bytes() == (datastore / GATE).read_bytes()


def test_what_was_kept_of_a_retrieval_fits_the_same_gate(data, checkpoints, built, gated, tmp_path):
    datastore, _ = gated("learned")
    shutil.copytree(built, tmp_path / "d")
    flags = ["--knn-neighbors", tmp_path / "n.npz"]
    for _ in range(2):
        tune_gate(data, checkpoints["adaptive"], tmp_path / "d", "learned", *flags)
        assert (tmp_path / "d" / GATE).read_bytes() == (datastore / GATE).read_bytes()


def test_tuning_without_a_gate_leaves_none(data, checkpoints, gated, tmp_path):
    shutil.copytree(gated("buckets")[0], tmp_path / "d")
    result = tune_gate(data, checkpoints["adaptive"], tmp_path / "d", "constant")
    assert not (tmp_path / "d" / GATE).exists()
    found = evaluate(
        data, checkpoints["adaptive"], "--knn-datastore", tmp_path / "d", "--knn-tuned"
    )
    assert found == pytest.approx(result["reported_on"]["knn_perplexity"], rel=1e-5)


def test_the_report_has_the_tables_and_figures_of_a_gate(data, checkpoints, built, gated, tmp_path):
    shutil.copytree(built, tmp_path / "d")
    folder = tmp_path / "report"
    result = tune_gate(data, checkpoints["adaptive"], tmp_path / "d", "learned", "--report", folder)
    tables = json.loads((folder / "report.json").read_text())["tables"]
    curve = [{**point, "tokens_per_s": None} for point in result["reported_on"]["skip_curve"]]
    assert [{**row, "tokens_per_s": None} for row in tables["gate_skip"]] == curve
    speeds = [row["tokens_per_s"] for row in tables["gate_skip"]]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]
    for name in ("gate_frequency", "gate_quality", "gate_entropy"):
        assert sum(row["tokens"] for row in tables[name]) == result["reported_on"]["tokens"]
        assert (folder / "tables" / f"{name}.csv").exists()
    for name in ("gate_trust", "gate_skip"):
        assert (folder / "figures" / f"{name}.pdf").exists()
        assert (folder / "tables" / f"{name}.tex").exists()
    page = (folder / "report.html").read_text()
    assert "<h2>The gate</h2>" in page and "the gate, besides constant weights" in page
    for point in curve[::5]:
        assert f">{point['perplexity']:,.2f}<" in page
    for row in tables["gate_quality"]:
        assert f">{row['knn_lambda']:.3f}<" in page


# -- generation and inspection ---------------------------------------------------------------------


def hub(data, checkpoints, **settings):
    path = checkpoints["adaptive"]
    return from_pretrained(path.parent, path.name, data, **settings).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_of_a_generation_is_a_distribution(data, checkpoints, gated, kind, monkeypatch):
    lm = hub(data, checkpoints, knn_datastore=gated(kind)[0], knn_tuned=True)
    from fairseq_knnlm.plugin.generator import KNNModel

    sums, forward = [], KNNModel.forward_decoder

    def summing(*arguments, **options):
        log_p, attention = forward(*arguments, **options)
        sums.append(log_p.exp().sum(dim=1))
        return log_p, attention

    monkeypatch.setattr(KNNModel, "forward_decoder", summing)
    assert lm.sample("w1 w7 w49", beam=3, max_len_b=12)
    sums = torch.cat(sums)
    assert len(sums) > 10
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-5, atol=1e-5)


def test_generation_skips_too(data, checkpoints, gated):
    datastore = gated("learned")[0]
    stock = hub(data, checkpoints)
    for skip, same in ((1.0, True), (0.0, False)):
        lm = hub(data, checkpoints, knn_datastore=datastore, knn_tuned=True, knn_skip=skip)
        pair = [each.score("w1 w7 w49 w100")["positional_scores"] for each in (lm, stock)]
        assert torch.allclose(*pair, atol=1e-5) == same
        pair = [each.sample("w1 w7", beam=2, max_len_b=9) for each in (lm, stock)]
        assert not same or pair[0] == pair[1]


@pytest.mark.parametrize("kind", ["buckets", "nest", "learned"])
def test_inspection_shows_each_tokens_lambda(data, checkpoints, gated, tmp_path, kind):
    datastore, result = gated(kind)
    path = tmp_path / "passage.json"
    call(
        inspect.main, data, "--path", checkpoints["adaptive"], "--knn-datastore", datastore,
        "--knn-tuned", "--tokens-per-sample", 32, "--cpu", "--log-format", "none",
        "--num-workers", 0, "--gen-subset", "test", "--positions",
        f"0:{result['reported_on']['tokens']}", "--json", path, "--html", tmp_path / "p.html",
    )  # fmt: skip
    passage = json.loads(path.read_text())
    tokens = passage["tokens"]
    assert len({token["knn_lambda"] for token in tokens}) > 10
    for token in tokens[:50]:
        mixed = token["knn_lambda"] * token["p_knn"] + (1 - token["knn_lambda"]) * token["p_lm"]
        assert token["p_mixture"] == pytest.approx(mixed, rel=1e-4)
        weights = [neighbor["weight"] for neighbor in token["neighbors"][:3]]
        assert weights == sorted(weights, reverse=True) and 0 < sum(weights) <= 1
    assert passage["perplexity"]["mixture"] == pytest.approx(
        result["reported_on"]["gate_perplexity"], rel=1e-5
    )
    assert f"<td>{tokens[0]['knn_lambda']:.3f}</td>" in (tmp_path / "p.html").read_text()


# -- what is refused -------------------------------------------------------------------------------


def refusal(data, checkpoint, *flags):
    with pytest.raises(UserError) as error:
        evaluate(data, checkpoint, *flags)
    return str(error.value)


def test_a_gate_belongs_to_what_it_was_fitted_with(data, checkpoints, built, gated, tmp_path):
    datastore, _ = gated("learned")
    checkpoint, flags = checkpoints["adaptive"], ["--knn-datastore", datastore, "--knn-tuned"]
    assert "--knn-k is 8, 32 was tuned" in refusal(data, checkpoint, *flags, "--knn-k", 8)
    assert "--knn-key output" in refusal(data, checkpoint, *flags, "--knn-key", "output")
    assert "the weights of --path" in refusal(data, checkpoints["plain"], *flags)
    other = tmp_path / "other"
    build(data, checkpoint, other, "--knn-index", "Flat", "--gen-subset", "valid")
    for name in ("tuned.json", GATE):
        shutil.copy(datastore / name, other / name)
    message = refusal(data, checkpoint, "--knn-datastore", other, "--knn-tuned")
    assert "is not what was tuned with" in message


def test_a_gate_that_is_missing_or_another_is_refused(data, checkpoints, gated, tmp_path):
    shutil.copytree(gated("learned")[0], tmp_path / "d")
    flags = ["--knn-datastore", tmp_path / "d", "--knn-tuned"]
    shutil.copy(gated("nest")[0] / GATE, tmp_path / "d" / GATE)
    assert "is not the gate that was fitted" in refusal(data, checkpoints["adaptive"], *flags)
    with pytest.raises(UserError, match="is not the gate that was fitted"):
        call(info.main, tmp_path / "d")
    (tmp_path / "d" / GATE).unlink()
    assert "cannot be read" in refusal(data, checkpoints["adaptive"], *flags)


def test_skipping_without_a_gate_that_can_tell_is_refused(data, checkpoints, built, gated):
    checkpoint, skip = checkpoints["adaptive"], ["--knn-skip", 0.5]
    assert "needs --knn-tuned" in refusal(data, checkpoint, "--knn-datastore", built, *skip)
    for kind, message in (("nest", "cannot tell before a search"), ("constant", "has no gate")):
        flags = ["--knn-datastore", gated(kind)[0], "--knn-tuned", *skip]
        assert message in refusal(data, checkpoint, *flags)
    flags = ["--knn-datastore", gated("learned")[0], "--knn-tuned", "--knn-skip", 1.5]
    assert "--knn-skip must be in [0, 1], got 1.5" in refusal(data, checkpoint, *flags)


def test_a_gate_without_a_datastore_is_refused(data, checkpoints):
    with pytest.raises(UserError, match="--knn-gate nest weighs neighbours"):
        call(
            tune.main, data, "--path", checkpoints["adaptive"], "--cpu", "--knn-gate", "nest",
            "--knn-cache-size", 10, "--tokens-per-sample", 32,
        )  # fmt: skip


def test_the_file_has_plain_arrays(gated):
    with np.load(gated("learned")[0] / GATE) as file:
        assert all(file[name].dtype != object for name in file.files)
    assert from_bytes((gated("learned")[0] / GATE).read_bytes()).k == 32
