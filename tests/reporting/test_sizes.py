"""The curve over datastore sizes against plain numpy."""

import math

import numpy as np
import pytest
import torch
from helpers.oracle import perplexity
from helpers.study import (
    ENTRIES,
    KEYS,
    REPORTED_ON,
    VALUES,
    K,
    expected_perplexity,
    log_p_knn,
)

from fairseq_knnlm.reporting.sizes import SizePoint, log_p_knn_of_part, size_curve
from fairseq_knnlm.tuning.tuning_data import PARTS, parts_of


def test_a_part_of_the_datastore_has_the_neighbours_of_a_smaller_one(study):
    parts = parts_of(torch.arange(ENTRIES)).numpy()
    rows = study.tables["size"]
    assert [row["entries"] for row in rows] == [125, 250, 500, 1000, 2000] * 2
    for row in rows:
        if row["k"] is None:
            continue
        within = parts < row["share"] * PARTS
        assert within.sum() == pytest.approx(row["entries"], rel=0.1)
        scores = log_p_knn(
            REPORTED_ON, row["k"], study.best.temperature, KEYS[within], VALUES[within]
        )
        # these are exact where as many were known, and only there
        log_p_lm = study.reported_on.log_p_lm.numpy()
        got = log_p_knn_of_part(
            study.reported_on, round(row["share"] * PARTS), row["k"], study.best.temperature
        )
        known = (study.reported_on.parts.numpy() < row["share"] * PARTS).sum(axis=1)
        enough = known >= row["k"]
        assert row["queries_with_fewer"] == pytest.approx(1 - enough.mean())
        np.testing.assert_allclose(got.numpy()[enough], scores[enough], rtol=1e-3, atol=1e-4)
        if enough.all():
            assert row["perplexity"] == pytest.approx(
                perplexity(log_p_lm, scores, row["knn_lambda"]), rel=1e-4
            )


def test_the_whole_datastore_is_the_part_that_has_all(study):
    (row,) = (row for row in study.tables["size"] if row["share"] == 1 and row["k"] is None)
    assert row["mean_neighbors"] == K
    setting = {"k": K, "temperature": study.best.temperature, "knn_lambda": row["knn_lambda"]}
    assert row["perplexity"] == pytest.approx(expected_perplexity(REPORTED_ON, setting), rel=1e-4)


def test_missing_neighbours_are_in_no_part(study):
    distances = study.reported_on.distances.clone()
    distances[:, 5:] = math.inf
    fewer = study.reported_on._replace(distances=distances)
    (row,) = size_curve(fewer, [SizePoint(PARTS, None, 0.1)], 1.0, ENTRIES)
    assert row["mean_neighbors"] == 5


def test_a_query_of_which_no_neighbour_is_known_gains_nothing(study):
    """Its p_knn counts as 0: others would be found, and what they would say is not known."""
    parts = study.reported_on.parts.clone()
    parts[:, :] = PARTS - 1
    parts[1:, 0] = 0
    only_one = study.reported_on._replace(parts=parts)
    scores = log_p_knn_of_part(only_one, 1, None, 1.0)
    assert scores[0] == -math.inf and not scores.isnan().any()
    (row,) = size_curve(only_one, [SizePoint(1, None, 0.5)], 1.0, ENTRIES)
    assert math.isfinite(row["perplexity"])
    assert row["mean_neighbors"] == pytest.approx((len(parts) - 1) / len(parts))
