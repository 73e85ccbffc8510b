"""Neighbours from one or several datastores, and which datastores fit each other."""

import re

import numpy as np
import pytest
import torch
from helpers.parts import CUTS, DIMENSION, SIZES, VOCABULARY
from helpers.small import (
    all_distances,
    assert_nearest,
    make_datastore,
    random_keys,
    random_values,
)

from fairseq_knnlm.datastore.datastore import Datastore
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.search import devices
from fairseq_knnlm.search.retriever import Retriever


@pytest.fixture(scope="module")
def queries():
    return torch.from_numpy(random_keys(2, 40, DIMENSION).astype(np.float32))


def test_queries_are_tensors_or_arrays(whole, queries):
    retriever = Retriever.open([whole], k=5)
    expected = retriever.search(queries)
    own = retriever.datastores[0].keys[:3]  # may not be written to, float16
    for given in (queries.numpy(), np.asfortranarray(queries.numpy()), queries.double().numpy()):
        assert all(map(torch.equal, retriever.search(given), expected))
    assert retriever.search(own, k=1).distances.tolist() == [[0.0]] * 3
    rows = [rows for rows, _ in retriever.batches(queries.numpy())]
    assert (rows[0].start, rows[-1].stop) == (0, len(queries))
    with pytest.raises(
        UserError, match=r"shape \(N, 8\).* float type, got \(40, 8\) of torch.int64"
    ):
        retriever.search(queries.long())


def assert_neighbours(found, rows, queries, k, metric="l2"):
    keys, values = rows
    assert found.distances.dtype == torch.float32
    assert found.values.dtype == found.ids.dtype == torch.int64
    assert found.distances.shape == found.values.shape == found.ids.shape == (len(queries), k)
    exact = all_distances(queries.float().numpy(), keys, metric)
    assert_nearest(found.distances.numpy(), found.ids.numpy(), exact)
    assert np.array_equal(found.values.numpy(), values[found.ids.numpy()])


@pytest.mark.parametrize("distances", ["exact", "index", "exhaustive"])
@pytest.mark.parametrize("k", [1, 20, sum(SIZES)])
def test_one_datastore_equals_brute_force(whole, rows, queries, k, distances):
    found = Retriever.open([whole], k=k, distances=distances).search(queries)
    assert_neighbours(found, rows, queries, k)


def test_queries_in_half_precision(whole, rows, queries):
    found = Retriever.open([whole], k=9).search(queries.half())
    assert_neighbours(found, rows, queries.half(), 9)


@pytest.mark.parametrize("distances", ["exact", "index", "exhaustive"])
@pytest.mark.parametrize("k", [1, 5, 20, 400, sum(SIZES)])
def test_several_datastores_are_searched_as_one(parts, whole, rows, queries, k, distances):
    found = Retriever.open(parts, k=k, distances=distances).search(queries)
    assert_neighbours(found, rows, queries, k)
    one = Retriever.open([whole], k=k, distances=distances).search(queries)
    torch.testing.assert_close(found.distances, one.distances, rtol=1e-5, atol=1e-4)


def test_inner_products_of_several_datastores(make, rows, queries):
    parts = [make(start, stop, metric="ip") for start, stop in zip(CUTS, CUTS[1:])]
    found = Retriever.open(parts, k=30).search(queries)
    assert_neighbours(found, rows, queries, 30, "ip")


def test_each_datastore_may_have_its_own_index(make, rows, queries):
    paths = [make(0, 300, factory="IVF4,PQ4"), make(300, 307), make(307, factory="IVF8,Flat")]
    found = Retriever.open(paths, k=10, nprobe=8).search(queries)
    exact = all_distances(queries.numpy(), rows[0])
    nearest = np.sort(exact, axis=1)[:, :10]
    assert np.isclose(found.distances.numpy(), nearest, rtol=1e-4).mean() > 0.95
    np.testing.assert_allclose(
        found.distances, np.take_along_axis(exact, found.ids.numpy(), axis=1), rtol=1e-4, atol=1e-3
    )
    assert np.array_equal(found.values.numpy(), rows[1][found.ids.numpy()])


def test_results_do_not_depend_on_the_batch_of_queries(parts, queries):
    retriever = Retriever.open(parts, k=10)
    together = retriever.search(queries)
    for piece, queries_of_piece in zip(
        zip(*(part.split(7) for part in together)), queries.split(7)
    ):
        alone = retriever.search(queries_of_piece)
        torch.testing.assert_close(alone.distances, piece[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("distances", ["exact", "index"])
def test_missing_neighbours_are_marked_and_come_last(make, rows, queries, distances):
    paths = [make(0, 400, factory="IVF16,Flat"), make(400, factory="IVF16,Flat")]
    found = Retriever.open(paths, k=300, nprobe=1, distances=distances).search(queries)
    missing = found.ids == -1
    assert missing.any() and not missing.all()
    assert torch.equal(found.distances.isposinf(), missing)
    assert (found.values[missing] == 0).all()
    assert (missing.int().diff(dim=1) >= 0).all()
    for ids in found.ids.tolist():
        present = [i for i in ids if i >= 0]
        assert len(set(present)) == len(present)


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["parts", "whole"])
def test_more_neighbours_than_entries_are_refused(request, name):
    paths = request.getfixturevalue(name)
    paths = paths if isinstance(paths, list) else [paths]
    with pytest.raises(UserError, match="must be at most 807, the entries of .*got 808") as caught:
        Retriever.open(paths, k=808)
    assert all(path in str(caught.value) for path in paths)


@pytest.mark.parametrize(
    "name, other",
    [
        ("metric", "ip"),
        ("key", {"type": "output", "layer": 1, "layers": 2}),
        ("key", {"type": "ffn-input", "layer": 0, "layers": 2}),
        ("dictionary", {"sha256": "e" * 64, "types": 200}),
        ("model", {"sha256": "e" * 64, "parameters": 12}),
    ],
)
def test_datastores_that_differ_are_refused(make, name, other):
    one, different = make(0, 20), make(20, 40, **{name: other})
    with pytest.raises(UserError, match=f"the {name} of ") as caught:
        Retriever.open([one, one, different], k=3)
    for side in (one, different, *(other.values() if isinstance(other, dict) else [other])):
        assert str(side) in str(caught.value)


def test_datastores_of_other_dimensions_are_refused(make, tmp_path):
    narrow = make_datastore(tmp_path / "d", random_keys(1, 10, 4), random_values(1, 10, VOCABULARY))
    with pytest.raises(UserError, match="the dimension of .* is 8, of .* 4"):
        Retriever.open([make(0, 20), narrow], k=3)


def test_datastores_of_other_texts_and_indexes_fit(make):
    one = make(0, 100, data={"split": "train"})
    other = make(100, 200, data={"split": "valid"}, factory="IVF2,Flat")
    assert len(Retriever.open([one, other], k=3)) == 200


def test_every_index_must_fit_the_gpu(make, monkeypatch):
    monkeypatch.setattr(devices, "gpu_available", lambda: True)
    paths = [make(0, 100, factory="IVF2,Flat"), make(100, 200, factory="IVF2,PQ4x4fs")]
    with pytest.raises(UserError, match="no GPU version of the index IVF2,PQ4x4fs"):
        Retriever.open(paths, k=1, device="cuda")


def test_whole_numbers_of_numpy_will_do(whole):
    retriever = Retriever.open([whole], k=np.int64(3), nprobe=np.uint8(2))
    assert (retriever.k, retriever.nprobe) == (3, 2)
    assert type(retriever.k) is type(retriever.nprobe) is int  # JSON knows no others


@pytest.mark.parametrize(
    "arguments, fault",
    [
        ({"k": 0}, "k must be a whole number >= 1, got 0"),
        ({"k": 2.0}, "k must be a whole number >= 1, got 2.0"),
        ({"k": True}, "k must be a whole number >= 1, got True"),
        ({"nprobe": 0}, "nprobe must be a whole number >= 1, got 0"),
        ({"distances": "exat"}, "distances must be one of exact, index, exhaustive, got 'exat'"),
        ({"device": "gpu"}, "device must be one of auto, cpu, cuda, got 'gpu'"),
        ({"datastores": []}, "datastores must be a list of one or more Datastore, got none"),
        ({"datastores": ["dir"]}, "datastores must be a list of one or more Datastore, got str"),
    ],
)
def test_arguments_that_cannot_be_are_refused(whole, arguments, fault):
    with pytest.raises(UserError, match=f"Retriever: .*{re.escape(fault)}"):
        Retriever(**{"datastores": [Datastore.open(whole)], "k": 3, **arguments})


def test_all_faults_are_told_at_once(whole):
    with pytest.raises(UserError, match="k must be.*; nprobe must be.*; distances must be"):
        Retriever([Datastore.open(whole)], k=-1, nprobe=-1, distances="")


@pytest.mark.parametrize("k", [0, 6])
@pytest.mark.parametrize("method", ["search", "batches"])
def test_more_neighbours_than_the_retriever_was_made_for_are_refused(whole, queries, method, k):
    with pytest.raises(UserError, match=f"k must be in .1, 5., got {k}"):
        getattr(Retriever.open([whole], k=5), method)(queries, k)


def test_queries_of_another_dimension_are_refused(whole, queries):
    with pytest.raises(UserError, match=r"queries must have shape \(N, 8\), .*got \(40, 7\)"):
        Retriever.open([whole], k=5).search(queries[:, :7])


@pytest.mark.parametrize("distances", ["exact", "index", "exhaustive"])
def test_batches_are_the_search_in_order(parts, whole, queries, distances):
    for paths in ([whole], parts):
        retriever = Retriever.open(paths, k=9, distances=distances)
        batches = list(retriever.batches(queries))
        assert [row for rows, _ in batches for row in range(rows.start, rows.stop)] == list(
            range(len(queries))
        )
        together = retriever.search(queries)
        for column, expected in zip(zip(*(neighbors for _, neighbors in batches)), together):
            assert torch.equal(torch.cat(column), expected)


def test_no_queries(whole):
    neighbors = Retriever.open([whole], k=4).search(torch.empty(0, DIMENSION))
    assert all(part.shape == (0, 4) for part in neighbors)
