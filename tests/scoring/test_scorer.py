"""The whole path, from checkpoint to perplexity, against brute force and against stock fairseq."""

import json

import numpy as np
import pytest
from helpers import oracle
from helpers.commands import build, evaluate

MODELS = ["adaptive", "plain"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("distances", ["exact", "exhaustive"])
@pytest.mark.parametrize(
    "k, temperature, knn_lambda", [(1, 1.0, 0.3), (8, 3.0, 0.25), (300, 10.0, 0.6)]
)
def test_equals_brute_force(
    data, checkpoints, datastores, model, distances, k, temperature, knn_lambda
):
    task, loaded = oracle.load(data, checkpoints[model], 32)
    keys, values, _ = oracle.score(task, loaded, "train")
    queries, targets, log_p_lm = oracle.score(task, loaded, "test")
    log_p_knn = oracle.knn_log_probs(keys, values, queries, targets, k, temperature)
    found = evaluate(
        data, checkpoints[model],
        "--knn-datastore", datastores[model], "--knn-k", k, "--knn-temperature", temperature,
        "--knn-lambda", knn_lambda, "--knn-distances", distances,
    )  # fmt: skip
    expected = oracle.perplexity(log_p_lm, log_p_knn, knn_lambda)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("index", ["Flat", "IVF8,SQfp16"])
def test_inner_product_equals_brute_force(data, checkpoints, tmp_path, index):
    build(data, checkpoints["plain"], tmp_path / "d", "--knn-metric", "ip", "--knn-index", index)
    task, model = oracle.load(data, checkpoints["plain"], 32)
    keys, values, _ = oracle.score(task, model, "train")
    queries, targets, log_p_lm = oracle.score(task, model, "valid")
    log_p_knn = oracle.knn_log_probs(keys, values, queries, targets, 32, 2.0, metric="ip")
    found = evaluate(
        data, checkpoints["plain"], "--gen-subset", "valid", "--knn-datastore", tmp_path / "d",
        "--knn-k", 32, "--knn-temperature", 2, "--knn-nprobe", 8,
    )  # fmt: skip
    assert found == pytest.approx(oracle.perplexity(log_p_lm, log_p_knn, 0.25), rel=1e-4)


@pytest.mark.parametrize(
    # not complete_doc with context: fairseq, and so the oracle, lets it cross documents
    "break_mode, context_window",
    [("none", 0), ("complete", 0), ("complete_doc", 0), ("eos", 0)]
    + [("none", 12), ("complete", 12), ("eos", 12)],
)
def test_every_target_is_stored_once_in_corpus_order(
    data, checkpoints, tmp_path, break_mode, context_window
):
    build(
        data, checkpoints["adaptive"], tmp_path / "d", "--knn-index", "Flat",
        "--sample-break-mode", break_mode, "--context-window", context_window, "--max-tokens", 90,
    )  # fmt: skip
    task, model = oracle.load(data, checkpoints["adaptive"], 32 - context_window, break_mode)
    keys, values, _ = oracle.score(task, model, "train", context_window)
    assert np.array_equal(np.load(tmp_path / "d" / "values.npy"), values)
    stored = np.load(tmp_path / "d" / "keys.npy").astype(np.float64)
    assert np.abs(stored - keys).max() < 2e-3 * np.abs(keys).max()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--sample-break-mode", "complete"],
        ["--sample-break-mode", "complete_doc", "--max-tokens", "100"],
        ["--sample-break-mode", "eos", "--batch-size", "3"],
        ["--context-window", "16", "--batch-size", "1"],
        ["--softmax-batch", "7"],
        ["--output-word-probs", "--output-word-stats"],
    ],
    ids=" ".join,
)
def test_without_neighbours_it_is_stock(data, checkpoints, datastores, model, flags):
    stock = evaluate(data, checkpoints[model], *flags, task="language_modeling")
    assert evaluate(data, checkpoints[model], *flags) == pytest.approx(stock, rel=1e-5)
    with_lambda_0 = evaluate(
        data, checkpoints[model], *flags, "--knn-datastore", datastores[model], "--knn-lambda", 0
    )
    assert with_lambda_0 == pytest.approx(stock, rel=1e-5)


def test_scores_do_not_depend_on_batches_or_workers(data, checkpoints, datastores):
    flags = ["--context-window", 16, "--knn-datastore", datastores["adaptive"], "--knn-k", 8]
    results = [
        evaluate(data, checkpoints["adaptive"], *flags, *batches)
        for batches in (
            ["--batch-size", 1],
            ["--batch-size", 16, "--num-workers", 1],
            ["--max-tokens", 100, "--num-workers", 4],
        )
    ]
    assert results == pytest.approx([results[0]] * 3, rel=1e-5)


def test_quantised_index_is_close_to_exhaustive_search(data, checkpoints, datastores, tmp_path):
    build(data, checkpoints["adaptive"], tmp_path / "d", "--knn-index", "IVF16,PQ32x4fs")
    settings = ["--knn-k", 64, "--knn-temperature", 10]
    flat = evaluate(
        data, checkpoints["adaptive"], "--knn-datastore", datastores["adaptive"], *settings
    )
    ivf = evaluate(data, checkpoints["adaptive"], "--knn-datastore", tmp_path / "d", *settings)
    quantised = evaluate(
        data, checkpoints["adaptive"], "--knn-datastore", tmp_path / "d", *settings,
        "--knn-distances", "index",
    )  # fmt: skip
    assert ivf == pytest.approx(flat, rel=5e-3)
    assert quantised != ivf


def test_bos_token_is_fed_but_neither_stored_nor_counted(data, checkpoints, tmp_path):
    flags = ["--add-bos-token", "--tokens-per-sample", 16]
    build(data, checkpoints["plain"], tmp_path / "d", "--knn-index", "Flat", *flags)
    task, model = oracle.load(data, checkpoints["plain"], 16)
    assert np.array_equal(
        np.load(tmp_path / "d" / "values.npy"), oracle.score(task, model, "train")[1]
    )
    stock = evaluate(data, checkpoints["plain"], *flags, task="language_modeling")
    found = evaluate(
        data, checkpoints["plain"], *flags, "--knn-datastore", tmp_path / "d", "--knn-lambda", 0
    )
    assert found == pytest.approx(stock, rel=1e-5)


def test_manifest_explains_the_datastore(datastores, data):
    manifest = json.loads((datastores["adaptive"] / "manifest.json").read_text())
    keys = np.load(datastores["adaptive"] / "keys.npy", mmap_mode="r")
    values = np.load(datastores["adaptive"] / "values.npy", mmap_mode="r")
    assert keys.shape == (manifest["count"], manifest["dimension"]) and keys.dtype == np.float16
    assert values.shape == (manifest["count"],) and values.dtype == np.uint8
    assert manifest["key"] == {"type": "ffn-input", "layer": 1, "layers": 2}
    assert str(data) not in json.dumps(manifest)
