"""Searching the FAISS index against brute force in float64."""

import faiss
import numpy as np
import pytest
import torch
from helpers.searching import search_index, values_for
from helpers.small import all_distances, assert_nearest, quiet, save_keys

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.probability.metrics import recall_at_k
from fairseq_knnlm.search import devices
from fairseq_knnlm.search.devices import choose_device
from fairseq_knnlm.search.index_build import build_index, load
from fairseq_knnlm.search.index_search import IndexSearch
from fairseq_knnlm.search.keys_index import KeysIndex

COUNT, METRICS = 1500, ["l2", "ip"]
FACTORIES = ["Flat", "IVF16,Flat", "IVF16,PQ8x4fs", "IVF16,PQ8", "IVF16,SQ8", "OPQ8,IVF16,PQ8"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("k", [1, 7, 300, COUNT])
def test_flat_equals_brute_force(keys, queries, index_path, metric, exact, k):
    stored = keys if exact else None
    found = search_index(index_path("Flat", metric), metric, stored, queries, k, 1)
    assert_nearest(found.distances, found.ids, all_distances(queries, keys, metric))


@pytest.mark.parametrize("exact", [True, False])
def test_flat_equals_brute_force_where_many_keys_are_the_same(tmp_path, exact):
    rng = np.random.default_rng(3)
    keys = save_keys(tmp_path, rng.integers(0, 2, size=(400, 4)).astype(np.float16))
    path = str(tmp_path / "index.faiss")
    build_index(keys, "Flat", "l2", path, str(tmp_path / "work"), quiet)
    queries = rng.integers(0, 2, size=(16, 4)).astype(np.float32)
    found = search_index(path, "l2", keys if exact else None, queries, 50, 1)
    assert_nearest(found.distances, found.ids, all_distances(queries, keys))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", FACTORIES)
def test_exact_distances_are_those_to_the_stored_keys(keys, queries, index_path, factory, metric):
    found = search_index(index_path(factory, metric), metric, keys, queries, 10, 16)
    every = all_distances(queries, keys, metric)
    expected = np.take_along_axis(every, found.ids, axis=1)
    np.testing.assert_allclose(
        found.distances, expected, rtol=1e-5, atol=1e-5 * np.abs(every).max()
    )
    assert (np.diff(found.distances, axis=1) >= 0).all(), "nearest first"
    assert all(len(set(ids)) == 10 for ids in found.ids.tolist())
    nearest = np.argsort(every, axis=1, kind="stable")[:, :10]
    assert recall_at_k(found.ids, nearest) > 0.9


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", FACTORIES)
def test_distances_of_the_index_are_near_and_nearest_first(
    keys, queries, index_path, factory, metric
):
    found = search_index(index_path(factory, metric), metric, None, queries, 10, 16)
    every = all_distances(queries, keys, metric)
    error = np.abs(found.distances - np.take_along_axis(every, found.ids, axis=1))
    assert error.mean() < 0.15 * np.ptp(every)
    assert (np.diff(found.distances, axis=1) >= 0).all()


def test_inner_products_are_negated(tmp_path):
    keys = save_keys(tmp_path, np.array([[1, 0], [3, 0], [-2, 0]], dtype=np.float16))
    path = str(tmp_path / "index.faiss")
    build_index(keys, "Flat", "ip", path, str(tmp_path / "work"), quiet)
    for stored in (keys, None):
        found = search_index(path, "ip", stored, np.array([[2, 5]], dtype=np.float32), 3, 1)
        assert found.ids.tolist() == [[1, 0, 2]]
        assert found.distances.tolist() == [[-6, -2, 4]]


@pytest.mark.parametrize("exact", [True, False])
def test_recall_does_not_fall_when_more_lists_are_visited(keys, queries, index_path, exact):
    nearest = np.argsort(all_distances(queries, keys), axis=1)[:, :20]
    stored = keys if exact else None
    found = [
        search_index(index_path("IVF16,Flat"), "l2", stored, queries, 20, nprobe)
        for nprobe in (1, 2, 4, 8, 16, 10**6)
    ]
    recalls = [recall_at_k(each.ids, nearest) for each in found]
    assert recalls == sorted(recalls)
    assert recalls[0] < recalls[-1] == 1.0
    farthest = np.stack([each.distances[:, -1] for each in found])
    assert (np.diff(farthest, axis=0)[np.isfinite(farthest[:-1])] <= 1e-3).all()


def test_exact_distances_never_find_less_than_the_index(keys, queries, index_path):
    nearest = np.argsort(all_distances(queries, keys), axis=1)[:, :20]
    for factory in ("IVF16,PQ8x4fs", "OPQ8,IVF16,PQ8"):
        quantised, exact = (
            recall_at_k(
                search_index(index_path(factory), "l2", stored, queries, 20, 16).ids, nearest
            )
            for stored in (None, keys)
        )
        assert quantised < exact


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,PQ8x4fs", "IVF16,PQ8"])
def test_where_there_is_no_neighbour_the_distance_is_infinite(
    keys, queries, index_path, factory, exact, metric
):
    stored = keys if exact else None
    found = search_index(index_path(factory, metric), metric, stored, queries, 400, 1)
    missing = found.ids == -1
    assert missing.any() and not missing.all()
    assert np.array_equal(np.isinf(found.distances), missing)
    assert (found.distances[missing] > 0).all()
    assert (np.diff(missing.astype(int), axis=1) >= 0).all(), "missing ones come last"
    every = all_distances(queries, keys, metric)
    if exact:
        expected = np.take_along_axis(every, np.where(missing, 0, found.ids), axis=1)
        np.testing.assert_allclose(
            found.distances[~missing], expected[~missing], rtol=1e-4, atol=1e-2
        )


@pytest.mark.parametrize("factory", ["IVF16,Flat", "OPQ8,IVF16,PQ8", "PCA8,IVF16,Flat"])
def test_nprobe_reaches_the_lists_behind_a_transform(queries, index_path, factory):
    few, all_lists = (
        search_index(index_path(factory), "l2", None, queries, 400, nprobe) for nprobe in (1, 16)
    )
    assert (few.ids == -1).any()
    assert not (all_lists.ids == -1).any()


@pytest.mark.parametrize("factory", ["IVF16,PQ8,RFlat", "HNSW8", "IVF16_HNSW8,PQ8", "SQ8", "PQ8"])
@pytest.mark.parametrize("exact", [True, False])
def test_other_kinds_of_index_can_be_searched(keys, queries, index_path, factory, exact):
    found = search_index(index_path(factory), "l2", keys if exact else None, queries, 10, 16)
    nearest = np.argsort(all_distances(queries, keys), axis=1)[:, :10]
    assert recall_at_k(found.ids, nearest) > 0.4


def test_keys_are_not_copied_to_be_searched(keys, index_path):
    inner = faiss.downcast_index(KeysIndex(keys, "l2").index)
    assert inner.codes.size() == keys.nbytes
    assert np.array_equal(
        np.fromfile(keys.filename, dtype=np.uint8)[:6], np.frombuffer(b"\x93NUMPY", np.uint8)
    )


def test_keys_that_faiss_cannot_read_in_place_are_refused(tmp_path):
    path = tmp_path / "keys.raw"
    path.write_bytes(np.zeros((3, 4), dtype=np.float16).tobytes())
    raw = np.memmap(path, dtype=np.float16, mode="r", shape=(3, 4))
    with pytest.raises(UserError, match="keys.raw has its keys at byte 0, FAISS needs"):
        KeysIndex(raw, "l2")


# -- on a GPU --------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "gpu_available", lambda: False)
    assert {choose_device(device, "IVF16,PQ8", 8, 32) for device in ("auto", "cpu")} == {"cpu"}
    with pytest.raises(UserError, match=r"device \(--knn-device\) cuda: FAISS sees no GPU"):
        choose_device("cuda", "IVF16,PQ8", 8, 32)


@pytest.mark.parametrize(
    "factory, k, nprobe, obstacle",
    [
        ("IVF16,PQ8", 2048, 2048, None),
        ("OPQ64_128,IVF16,PQ64", 8, 32, None),
        ("IVF16,SQ8", 8, 32, None),
        ("IVF16,PQ8", 2049, 32, r"at most 2048 neighbours on a GPU, k \(--knn-k\) is 2049"),
        ("IVF16,PQ8", 8, 2049, r"at most 2048 lists on a GPU, nprobe \(--knn-nprobe\) is 2049"),
        ("IVF16,PQ8x4fs", 8, 32, "no GPU version of the index IVF16,PQ8x4fs"),
        ("IVF16,PQ128", 8, 32, "8 bits and one of .* sub-quantisers, the index is IVF16,PQ128"),
        ("IVF16,PQ8x6", 8, 32, "8 bits and one of .* sub-quantisers, the index is IVF16,PQ8x6"),
    ],
)
def test_a_gpu_is_used_for_what_it_can_do(monkeypatch, factory, k, nprobe, obstacle):
    monkeypatch.setattr(devices, "gpu_available", lambda: True)
    assert choose_device("auto", factory, k, nprobe) == ("cpu" if obstacle else "cuda")
    if obstacle:
        with pytest.raises(UserError, match=f"cuda: FAISS.*{obstacle}.*; use cpu"):
            choose_device("cuda", factory, k, nprobe)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat", "OPQ8,IVF16,PQ8", "IVF16,PQ8x4fs"])
def test_tensors_find_what_arrays_find(queries, index_path, factory, metric):
    for nprobe in (1, 16):  # one list has fewer than 300 keys
        index = load(index_path(factory, metric))
        searcher = IndexSearch(None, values_for(COUNT), metric, index=index, nprobe=nprobe)
        found = searcher.search(torch.from_numpy(queries), 300)
        batches = list(searcher._device_batches(torch.from_numpy(queries), 300))
        assert [rows for rows, _ in batches] == [slice(0, len(queries))]
        for part, expected in zip(batches[0][1], found):
            np.testing.assert_array_equal(part, expected)
