"""The numbers of the tables against plain numpy."""

import types

import numpy as np
import pytest
import torch
from helpers.study import (
    REPORTED_ON,
    ROWS,
    TUNED_ON,
    TYPES,
    VALUES,
    K,
    expected_perplexity,
    log_ratios,
    targets,
)

from fairseq_knnlm.probability.bootstrap import paired_interval
from fairseq_knnlm.reporting import tables
from fairseq_knnlm.reporting.tables import make_tables, training_counts


@pytest.mark.parametrize("name", ["k", "k_at_temperature", "temperature"])
def test_curves_are_chosen_on_one_split_and_shown_of_another(study, name):
    rows = study.tables[name]
    assert len(rows) == 3
    for row in rows:
        assert row["perplexity"] == pytest.approx(expected_perplexity(REPORTED_ON, row), rel=1e-4)
        assert row["tuned_perplexity"] == pytest.approx(
            expected_perplexity(TUNED_ON, row), rel=1e-4
        )
        if name != "temperature":
            same_k = [each.perplexity for each in study.grid if each.k == row["k"]]
            assert row["tuned_perplexity"] == min(same_k) or name == "k_at_temperature"
    if name == "k_at_temperature":
        assert {row["temperature"] for row in rows} == {study.best.temperature}


def test_one_split_for_both_has_the_perplexities_of_the_grid(study):
    shown = make_tables(study.grid, [], study.tuned_on, study.sizes, study.counts, study.dictionary)
    for row in shown["k"]:
        assert row["perplexity"] == pytest.approx(row["tuned_perplexity"], rel=1e-6)
    assert shown["cache_grid"] == shown["cache_size"] == shown["cache_theta"] == []


@pytest.mark.parametrize(
    "name, best",
    [
        ("cache_size", [(100, 2.0, 8.5), (200, 0.5, 8.0)]),
        ("cache_theta", [(200, 0.5, 8.0), (100, 2.0, 8.5)]),
    ],
)
def test_the_curves_over_the_cache(study, name, best):
    assert [
        (row["cache_size"], row["cache_theta"], row["perplexity"]) for row in study.tables[name]
    ] == best


@pytest.mark.parametrize("name", ["k", "temperature", "lambda", "size"])
def test_curves_have_the_interval_of_the_change_from_the_model_alone(study, name):
    base = np.exp(-study.reported_on.log_p_lm.double().mean().item())
    for row in study.tables[name]:
        assert row["perplexity_low"] <= row["perplexity"] <= row["perplexity_high"]
    if name == "lambda":  # there lambda is 0
        assert study.tables[name][0]["perplexity_low"] == pytest.approx(base, rel=1e-6)


def test_few_documents_have_no_interval(study):
    few = study.reported_on._replace(document_starts=np.array([0, 200]))  # one block of 300 tokens
    shown = make_tables(study.grid, [], few, study.sizes, study.counts, study.dictionary)
    for name in ("k", "k_at_temperature", "temperature", "lambda", "size"):
        assert {row["perplexity_high"] for row in shown[name]} == {None}
    for name in ("frequency", "unknown"):
        for row in shown[name]:
            assert row["low"] is row["high"] is None
            assert (row["units"], row["unit"]) == (1, "blocks")


def test_the_curve_over_lambda(study):
    rows = study.tables["lambda"]
    assert rows[0]["knn_lambda"] == 0 and rows[-1]["knn_lambda"] < 1
    assert study.best.knn_lambda in [row["knn_lambda"] for row in rows]
    for row in rows:
        setting = {**study.best._asdict(), **row}
        assert row["perplexity"] == pytest.approx(
            expected_perplexity(REPORTED_ON, setting), rel=1e-4
        )


def test_targets_found(study):
    matches = study.reported_on.matches.numpy()
    assert study.tables["found"] == [
        {"k": k, "targets_found": pytest.approx(matches[:, :k].any(axis=1).mean())}
        for k in (1, 8, K)
    ]


def test_buckets_of_frequency(study):
    is_known = targets(REPORTED_ON) != study.dictionary.unk()
    counts = np.bincount(VALUES, minlength=TYPES)[targets(REPORTED_ON)]
    log_p_lm = study.reported_on.log_p_lm.double().numpy()
    mixed = log_p_lm + log_ratios(study)
    rows = study.tables["frequency"]
    assert [(row["lowest"], row["highest"]) for row in rows] == [
        (0, 0), (1, 9), (10, 99), (100, 999),
    ]  # fmt: skip
    assert sum(row["tokens"] for row in rows) == is_known.sum()
    for row in rows:
        within = is_known & (counts >= row["lowest"]) & (counts <= row["highest"])
        assert row["tokens"] == within.sum() and row["share"] == within.mean()
        base, knn = np.exp(-log_p_lm[within].mean()), np.exp(-mixed[within].mean())
        assert [row["base_perplexity"], row["knn_perplexity"]] == pytest.approx(
            [base, knn], rel=1e-4
        )
        assert row["relative_change"] == pytest.approx(knn / base - 1, rel=1e-3, abs=1e-6)
        if row["low"] is not None:
            assert row["low"] <= row["relative_change"] <= row["high"]
    # never in the datastore: neighbours take lambda away and give nothing
    assert rows[0]["relative_change"] == pytest.approx(1 / (1 - study.best.knn_lambda) - 1)


def test_unknown_words_are_apart(study):
    is_unknown = targets(REPORTED_ON) == study.dictionary.unk()
    log_p_lm = study.reported_on.log_p_lm.double().numpy()
    known, unknown = study.tables["unknown"]
    assert (known["words"], unknown["words"]) == ("known", "<unk>")
    assert 0 < unknown["tokens"] == is_unknown.sum() == ROWS - known["tokens"]
    for row, which in ((known, ~is_unknown), (unknown, is_unknown)):
        assert row["base_perplexity"] == pytest.approx(np.exp(-log_p_lm[which].mean()))
        assert row["nats"] == pytest.approx(log_ratios(study)[which].sum(), rel=1e-3)
    assert "<unk>" not in {row["token"] for row in study.tables["types"]}


def test_a_text_of_known_words_has_no_row_of_unknown_ones(study):
    known = study.reported_on._replace(targets=torch.full((ROWS,), 7))
    shown = make_tables(study.grid, [], known, study.sizes, study.counts, study.dictionary)
    (row,) = shown["unknown"]
    (bucket,) = shown["frequency"]
    whole = paired_interval(
        known.log_p_lm, known.log_p_lm + torch.from_numpy(log_ratios(study)), known.document_starts
    )
    for each in (row, bucket):  # all tokens are in it
        assert (each["tokens"], each["units"]) == (ROWS, whole.units)


def test_helped_and_hurt(study):
    ratios = log_ratios(study)
    (row,) = study.tables["helped_or_hurt"]
    assert row["helped"] == (ratios > 0).mean() and row["hurt"] == (ratios < 0).mean()
    assert row["nats_gained"] == pytest.approx(ratios[ratios > 0].sum(), rel=1e-4)
    assert row["nats_lost"] == pytest.approx(ratios[ratios < 0].sum(), rel=1e-4)
    assert row["median"] == pytest.approx(np.median(ratios), abs=1e-4)
    assert row["doubled"] == (ratios >= np.log(2)).mean()


def test_the_histogram_holds_every_token_where_it_belongs(study):
    rows = study.tables["log_ratio"]
    assert sum(row["tokens"] for row in rows) == ROWS
    assert sum(row["nats"] for row in rows) == pytest.approx(log_ratios(study).sum(), rel=1e-3)
    rows = list(tables._histogram(np.array([-9.0, -0.05, 0.0, 0.05, 0.1001, 50.0])))
    assert {(row["from"], row["to"]): row["tokens"] for row in rows if row["tokens"]} == {
        (None, -3.9): 1, (-0.1, 0.0): 1, (0.0, 0.1): 2, (0.1, 0.2): 1, (7.0, None): 1,
    }  # fmt: skip


def test_types_that_gain_and_lose_most(study):
    ratios, counts = log_ratios(study), np.bincount(VALUES, minlength=TYPES)
    nats = {
        token: ratios[targets(REPORTED_ON) == token].sum()
        for token in set(targets(REPORTED_ON).tolist()) - {study.dictionary.unk()}
    }
    rows = study.tables["types"]
    order = sorted(nats, key=nats.get)
    gained = [token for token in order[::-1] if nats[token] > 0][:15]
    lost = [token for token in order if nats[token] < 0][:15]
    # types that are never found lose the same: any of them will do
    assert lost and [row["nats"] for row in rows] == pytest.approx(
        [nats[token] for token in gained + lost], rel=1e-3, abs=1e-4
    )
    for row in rows:
        token = study.dictionary.index(row["token"])
        assert row["nats"] == pytest.approx(nats[token], rel=1e-3, abs=1e-4)
        assert row["occurrences"] == (targets(REPORTED_ON) == token).sum()
        assert row["training_count"] == counts[token]
        assert row["mean_log_ratio"] == row["nats"] / row["occurrences"]


def test_training_counts_of_several_datastores(monkeypatch):
    monkeypatch.setattr(tables, "_BATCH_VALUES", 7)
    stores = [types.SimpleNamespace(values=VALUES.astype(np.uint16)) for _ in range(2)]
    counts = training_counts(stores, TYPES)
    assert np.array_equal(counts, 2 * np.bincount(VALUES, minlength=TYPES))
