"""Gates that weigh a search, leave some of it out, and are kept in a file."""

import io
import json
import math

import numpy as np
import pytest
import torch
from helpers.gates import DIMENSION, TYPES, K, make_gates, make_learned
from helpers.small import make_datastore, random_keys, random_values

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.gating import GatedSearch, Weights, from_bytes, to_bytes
from fairseq_knnlm.gating.gates import joined
from fairseq_knnlm.gating.ngram_counts import ORDERS
from fairseq_knnlm.probability import knn_log_probs, mix, vocabulary_log_probs
from fairseq_knnlm.search import Retriever

ROWS = 30
GATES = make_gates()


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    keys, values = random_keys(1, 500, DIMENSION), random_values(5, 500, TYPES)
    path = make_datastore(tmp_path_factory.mktemp("gated") / "d", keys, values)
    return Retriever.open([path], k=K)


@pytest.fixture
def queries():
    return torch.from_numpy(random_keys(2, ROWS, DIMENSION).astype(np.float32))


def before_of(gate, queries):
    rng = torch.Generator().manual_seed(4)
    contexts = torch.randint(0, TYPES, (ROWS, ORDERS), generator=rng)
    return gate.look(queries, torch.rand(ROWS, 2, generator=rng), contexts)


def over_vocabulary(rows, neighbors, temperature):
    return vocabulary_log_probs(neighbors.distances, neighbors.values, TYPES, temperature)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("skip", [0.0, 0.4, 1.0])
def test_probabilities_sum_to_1(retriever, queries, kind, skip):
    gate = GATES[kind]
    if skip and kind != "learned":
        pytest.skip("it cannot tell before a search")
    log_p_lm = torch.randn(ROWS, TYPES).log_softmax(dim=1)
    search = GatedSearch(retriever, gate, skip)
    log_p_knn, knn_lambda, _ = search.search(queries, before_of(gate, queries), over_vocabulary)
    log_p = mix(log_p_lm, log_p_knn, knn_lambda=knn_lambda)
    torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(ROWS))
    if skip == 1.0:
        assert log_p_knn is None and torch.equal(log_p, log_p_lm)


@pytest.mark.parametrize("with_cache", [False, True])
def test_a_learned_mixture_is_that_of_its_weights(retriever, queries, with_cache):
    gate = make_learned(with_cache)
    before, targets = before_of(gate, queries), torch.arange(ROWS) % TYPES
    neighbors = retriever.search(queries)
    weights = gate.weigh(before, neighbors.distances, neighbors.values)
    p_lm, p_cache = torch.rand(ROWS), torch.rand(ROWS)
    parts = [
        knn_log_probs(neighbors.distances, neighbors.values, targets, each).exp()
        for each in gate.temperatures
    ]
    expected = (weights.knn * torch.stack(parts, dim=1)).sum(dim=1) + weights.cache * p_cache
    expected += (1 - weights.knn_lambda - weights.cache) * p_lm

    def of_targets(rows, found, temperature):
        return knn_log_probs(found.distances, found.values, targets[rows], temperature)

    search = GatedSearch(retriever, gate, 0.0, with_cache)
    log_p_knn, *each = search.search(queries, before, of_targets)
    log_p = mix(p_lm.log(), log_p_knn, p_cache.log() if with_cache else None, *each)
    torch.testing.assert_close(log_p.exp(), expected)


def test_what_is_skipped_is_worth_least_and_more_is_skipped_the_higher_the_share(
    retriever, queries
):
    gate = make_learned()
    before = before_of(gate, queries)
    gate.quantiles = gate.worth(before).sort().values
    searched = torch.ones(ROWS, dtype=torch.bool)
    for skip in (0.1, 0.5, 0.9, 1.0):
        fewer = gate.wants(before, skip)
        assert not (fewer & ~searched).any()
        assert fewer.sum() == pytest.approx((1 - skip) * ROWS, abs=1)
        if fewer.any():
            assert gate.worth(before)[fewer].min() > gate.worth(before)[~fewer].max()
        _, knn_lambda, _ = GatedSearch(retriever, gate, skip).search(
            queries, before, over_vocabulary
        )
        assert torch.equal(knn_lambda > 0, fewer)
        searched = fewer


def test_where_it_is_not_searched_the_cache_keeps_its_share(retriever, queries):
    gate = make_learned(with_cache=True)
    before = before_of(gate, queries)
    _, knn_lambda, cache_lambda = GatedSearch(retriever, gate, 1.0, True).search(
        queries, before, over_vocabulary
    )
    assert not knn_lambda.any() and torch.equal(cache_lambda, torch.full((ROWS,), 0.2))
    weights = Weights(torch.tensor([[0.3]]), torch.tensor([0.4])).without_cache()
    assert weights.knn_lambda.item() == pytest.approx(0.5)


def test_temperatures_are_joined_in_proportion_to_their_weights():
    weights = Weights(torch.tensor([[0.1, 0.3], [0.0, 0.0], [0.2, 0.2]]), torch.zeros(3))
    p = [torch.tensor([0.8, 0.2, math.nan]), torch.tensor([0.4, 0.6, math.nan])]
    found = joined(weights, [each.log() for each in p]).exp()
    assert found[:2].tolist() == pytest.approx([0.5, 0.4]) and found[2].isnan()


@pytest.mark.parametrize("gate", [*GATES.values(), make_learned(True)], ids=lambda gate: gate.kind)
def test_a_file_keeps_a_gate(retriever, queries, gate):
    data = to_bytes(gate)
    assert data == to_bytes(gate)
    again = from_bytes(data)
    neighbors = retriever.search(queries)
    found = [
        each.weigh(before_of(each, queries), neighbors.distances, neighbors.values)
        for each in (gate, again)
    ]
    assert all(torch.equal(*pair) for pair in zip(*found))
    assert (again.k, again.temperatures) == (gate.k, gate.temperatures)
    if gate.looks_before:
        before = before_of(gate, queries)
        assert torch.equal(gate.wants(before, 0.3), again.wants(before, 0.3))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 no archive", to_bytes(GATES["nest"])[:-30]])
def test_what_is_no_gate_is_refused(data):
    with pytest.raises(UserError, match="damaged"):
        from_bytes(data)


def test_a_gate_is_refused_for_another_k_and_where_it_cannot_tell(retriever):
    with pytest.raises(UserError, match="fitted with k = 8 neighbours, 4 are searched"):
        GatedSearch(Retriever(retriever.datastores, k=4), GATES["nest"])
    for kind in ("buckets", "nest"):
        with pytest.raises(UserError, match=f"--knn-skip 0.5: a gate of the kind '{kind}'"):
            GatedSearch(retriever, GATES[kind], 0.5)


IMPOSSIBLE = [
    ("nest", {"k": 0}, {}, "k must be a whole number >= 1"),
    ("nest", {"temperature": "hot"}, {}, "temperature must be in"),
    ("nest", {"tau": -0.1}, {}, "tau must be"),
    ("buckets", {"measure": "taste"}, {}, "measure must be one of nearest, ratio"),
    ("buckets", {}, {"edges": np.float32([0.6, 0.3])}, "edges must be"),
    ("buckets", {}, {"knn_lambdas": np.float32([0.9, 0.5])}, "each bucket must have"),
    ("buckets", {}, {"knn_lambdas": np.float32([0.9, 1.5, 0.0])}, "at most 1 together"),
    ("learned", {"unit": 0}, {}, "unit must be"),
    ("learned", {"k": 64}, {}, "after the search are of other sizes"),
    ("learned", {"temperatures": [1.0] * 3}, {}, "after the search are of other sizes"),
    ("learned", {}, {"quantiles": np.float32([1.0, 0.0])}, "quantiles must be"),
    ("learned", {}, {"grams.2": np.int64([5, 3])}, "grams.2 must be"),
    ("learned", {}, {"after.0.output.bias": np.float32([np.nan] * 3)}, "not finite"),
    ("learned", {}, {"after.0.output.bias": np.zeros((2, 2), np.float32)}, "size mismatch"),
]


@pytest.mark.parametrize("kind, about, arrays, message", IMPOSSIBLE)
def test_numbers_that_no_gate_has_are_refused_by_name(kind, about, arrays, message):
    with np.load(io.BytesIO(to_bytes(GATES[kind]))) as file:
        parts = {name: file[name] for name in file.files}
    parts["about"] = np.array(json.dumps({**json.loads(str(parts["about"])), **about}))
    file = io.BytesIO()
    np.savez(file, **{**parts, **arrays})
    with pytest.raises(UserError, match=f"the gate is damaged.*{message}"):
        from_bytes(file.getvalue())
