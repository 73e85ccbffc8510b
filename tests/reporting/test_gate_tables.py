"""Whom a gate trusts and helps, against plain numpy."""

import math

import numpy as np
import pytest
from helpers.study import TYPES, VALUES

from fairseq_knnlm.gating.gates import Nest
from fairseq_knnlm.reporting.gate_tables import make_gate_tables
from fairseq_knnlm.scoring.settings import Settings
from fairseq_knnlm.tuning.choice import Chosen


@pytest.fixture(scope="module")
def chosen(study):
    gate = Nest(study.best.k, study.best.temperature, alpha=0.6, tau=0.2, cache_share=0.0)
    return Chosen(Settings(), study.best, gate=gate)


@pytest.fixture(scope="module")
def tables(study, chosen):
    return make_gate_tables(chosen, study.reported_on, np.bincount(VALUES, minlength=TYPES))


@pytest.mark.parametrize("name", ["gate_frequency", "gate_quality"])
def test_groups_hold_every_token_once(study, chosen, tables, name):
    data = study.reported_on
    assert sum(row["tokens"] for row in tables[name]) == len(data.log_p_lm)
    bounds = [bound for row in tables[name] for bound in (row["lowest"], row["highest"])]
    assert bounds == sorted(bounds)
    for column, log_p in chosen.log_probs(data).items():
        column = {"base": "base", "knn": "constant", "gate": "gate"}[column]
        total = sum(row["tokens"] * math.log(row[f"{column}_perplexity"]) for row in tables[name])
        assert total == pytest.approx(-log_p.double().sum().item(), rel=1e-6)
    weighted = sum(row["tokens"] * row["knn_lambda"] for row in tables[name])
    assert weighted == pytest.approx(chosen.weigh(data).knn_lambda.sum().item(), rel=1e-5)


def test_frequencies_are_in_powers_of_ten(study, tables):
    counts = np.bincount(VALUES, minlength=TYPES)[study.reported_on.targets.numpy()]
    for row in tables["gate_frequency"]:
        digits = len(str(row["highest"]).split(".")[0]) if row["highest"] else 0
        low, high = (10 ** (digits - 1), 10**digits - 1) if digits else (0, 0)
        assert row["tokens"] == ((counts >= low) & (counts <= high)).sum()


def test_trust_falls_with_the_ratio_of_the_distances(tables):
    lambdas = [row["knn_lambda"] for row in tables["gate_quality"]]
    assert lambdas == sorted(lambdas, reverse=True) and lambdas[0] > lambdas[-1]


def test_helped_and_hurt(study, chosen, tables):
    log_probs = chosen.log_probs(study.reported_on)
    for row, name in zip(tables["gate_helped_or_hurt"], ("knn", "gate")):
        gain = (log_probs[name].double() - log_probs["base"].double()).numpy()
        assert (row["helped"], row["hurt"]) == ((gain > 0).mean(), (gain < 0).mean())


def test_speed_is_of_one_retrieval(study, chosen, monkeypatch):
    points = [{"skip": s, "skipped": s, "perplexity": 9.0} for s in (0.0, 0.5, 1.0)]
    monkeypatch.setattr(Chosen, "skip_curve", lambda *args: points)
    data = study.reported_on._replace(seconds=np.array([2.0, 6.0]))
    rows = make_gate_tables(chosen, data, np.bincount(VALUES, minlength=TYPES))["gate_skip"]
    count = len(data.log_p_lm)
    assert [row["tokens_per_s"] for row in rows] == [count / 8, count / 5, count / 2]
    data = data._replace(seconds=None)
    rows = make_gate_tables(chosen, data, np.bincount(VALUES, minlength=TYPES))["gate_skip"]
    assert [row["tokens_per_s"] for row in rows] == [None] * 3
