"""The FAISS index against brute force in float64."""

import os

import faiss
import numpy as np
import pytest
from helpers import all_distances, assert_nearest, random_keys

from fairseq_knnlm import index as faiss_index
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.index import (
    FLAT_BELOW,
    MAX_NLIST,
    SearchIndex,
    build_index,
    choose_device,
    default_factory,
    estimate_bytes,
    load,
    make_index,
    refuse_unbuildable,
    training_sample,
)
from fairseq_knnlm.metrics import recall_at_k

COUNT, DIMENSION = 1500, 16
METRICS = ["l2", "ip"]
FACTORIES = ["Flat", "IVF16,Flat", "IVF16,PQ8x4fs", "IVF16,PQ8", "IVF16,SQ8", "OPQ8,IVF16,PQ8"]


def quiet(line):
    pass


def save_keys(folder, keys):
    """Keys as a datastore has them: a memory-mapped file."""
    np.save(folder / "keys.npy", keys)
    return np.load(folder / "keys.npy", mmap_mode="r")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return save_keys(tmp_path_factory.mktemp("keys"), random_keys(1, COUNT, DIMENSION))


@pytest.fixture(scope="module")
def queries():
    return random_keys(2, 60, DIMENSION).astype(np.float32)


@pytest.fixture(scope="module")
def index_path(keys, tmp_path_factory):
    """Builds an index once for each factory string and metric; gives the file."""
    folder, paths = tmp_path_factory.mktemp("indexes"), {}

    def path(factory, metric="l2"):
        if (factory, metric) not in paths:
            file = str(folder / f"{len(paths)}.faiss")
            build_index(keys, factory, metric, file, f"{file}.building", quiet)
            paths[factory, metric] = file
        return paths[factory, metric]

    return path


# -- searching -------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("k", [1, 7, 300, COUNT])
def test_flat_equals_brute_force(keys, queries, index_path, metric, exact, k):
    index = SearchIndex(index_path("Flat", metric), metric, keys if exact else None)
    found = index.search(queries, k, nprobe=1)
    assert_nearest(found.distances, found.ids, all_distances(queries, keys, metric))


@pytest.mark.parametrize("exact", [True, False])
def test_flat_equals_brute_force_where_many_keys_are_the_same(tmp_path, exact):
    chance = np.random.default_rng(3)
    keys = save_keys(tmp_path, chance.integers(0, 2, size=(400, 4)).astype(np.float16))
    path = str(tmp_path / "index.faiss")
    build_index(keys, "Flat", "l2", path, str(tmp_path / "work"), quiet)
    queries = chance.integers(0, 2, size=(16, 4)).astype(np.float32)
    found = SearchIndex(path, "l2", keys if exact else None).search(queries, 50, 1)
    assert_nearest(found.distances, found.ids, all_distances(queries, keys))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("factory", FACTORIES)
def test_exact_distances_are_those_to_the_stored_keys(keys, queries, index_path, factory, metric):
    index = SearchIndex(index_path(factory, metric), metric, keys)
    found = index.search(queries, 10, nprobe=16)
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
    found = SearchIndex(index_path(factory, metric), metric, None).search(queries, 10, nprobe=16)
    every = all_distances(queries, keys, metric)
    error = np.abs(found.distances - np.take_along_axis(every, found.ids, axis=1))
    assert error.mean() < 0.15 * np.ptp(every)
    assert (np.diff(found.distances, axis=1) >= 0).all()


def test_inner_products_are_negated(tmp_path):
    keys = save_keys(tmp_path, np.array([[1, 0], [3, 0], [-2, 0]], dtype=np.float16))
    path = str(tmp_path / "index.faiss")
    build_index(keys, "Flat", "ip", path, str(tmp_path / "work"), quiet)
    for stored in (keys, None):
        found = SearchIndex(path, "ip", stored).search(np.array([[2, 5]], dtype=np.float32), 3, 1)
        assert found.ids.tolist() == [[1, 0, 2]]
        assert found.distances.tolist() == [[-6, -2, 4]]


@pytest.mark.parametrize("exact", [True, False])
def test_recall_does_not_fall_when_more_lists_are_visited(keys, queries, index_path, exact):
    nearest = np.argsort(all_distances(queries, keys), axis=1)[:, :20]
    index = SearchIndex(index_path("IVF16,Flat"), "l2", keys if exact else None)
    found = [index.search(queries, 20, nprobe) for nprobe in (1, 2, 4, 8, 16, 10**6)]
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
                SearchIndex(index_path(factory), "l2", stored).search(queries, 20, 16).ids, nearest
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
    index = SearchIndex(index_path(factory, metric), metric, keys if exact else None)
    found = index.search(queries, 400, nprobe=1)
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
    index = SearchIndex(index_path(factory), "l2", None)
    few, all_lists = (index.search(queries, 400, nprobe) for nprobe in (1, 16))
    assert (few.ids == -1).any()
    assert not (all_lists.ids == -1).any()


@pytest.mark.parametrize("factory", ["IVF16,PQ8,RFlat", "HNSW8", "IVF16_HNSW8,PQ8", "SQ8", "PQ8"])
@pytest.mark.parametrize("exact", [True, False])
def test_other_kinds_of_index_can_be_searched(keys, queries, index_path, factory, exact):
    index = SearchIndex(index_path(factory), "l2", keys if exact else None)
    found = index.search(queries, 10, nprobe=16)
    nearest = np.argsort(all_distances(queries, keys), axis=1)[:, :10]
    assert recall_at_k(found.ids, nearest) > 0.4


# -- choosing --------------------------------------------------------------------------------------


def lists_of(factory):
    return 1 if factory == "Flat" else int(factory.split(",")[0][len("IVF") :])


def test_the_default_index_grows_with_the_datastore():
    assert default_factory(FLAT_BELOW - 1, 256) == "Flat"
    counts = [2**exponent for exponent in range(8, 38)]
    nlists = [lists_of(default_factory(count, 256)) for count in counts]
    assert nlists == sorted(nlists)
    for count, nlist in zip(counts, nlists):
        assert nlist <= 2 * np.sqrt(count)
        assert count / max(nlist, 1) >= 39, "fewer keys a list than FAISS wants to train"


def test_the_default_index_at_the_scale_of_the_paper():
    factory = default_factory(103_227_021, 1024)
    index = make_index(factory, 1024, "l2")
    assert index.nlist == MAX_NLIST == 4096
    assert index.sa_code_size() - index.coarse_code_size() == 64


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dimension", [16, 64, 96, 100, 256, 1024])
def test_every_default_index_can_be_built(tmp_path, dimension, metric):
    factory = default_factory(FLAT_BELOW, dimension)
    assert factory.startswith("IVF")
    keys = save_keys(tmp_path, random_keys(4, 600, dimension))
    path = str(tmp_path / "index.faiss")
    described = build_index(keys, factory, metric, path, str(tmp_path / "work"), quiet)
    assert described["nlist"] == lists_of(factory)
    assert load(path).ntotal == 600
    found = SearchIndex(path, metric, keys).search(keys[:9].astype(np.float32), 5, 10**6)
    assert_nearest(found.distances[:, :1], found.ids[:, :1], all_distances(keys[:9], keys, metric))


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_estimated_size_is_about_right(index_path, factory):
    size = os.path.getsize(index_path(factory))
    assert 0.5 * size < estimate_bytes(factory, COUNT, DIMENSION, "l2") < 1.5 * size


@pytest.mark.parametrize(
    "factory", ["", "nonsense", "IVF", "IVF16,PQ7", "IVF16,PQ8,nonsense", "pq"]
)
def test_a_factory_string_that_faiss_does_not_know_is_refused(factory):
    with pytest.raises(UserError, match=f"--knn-index '{factory}' .* 16 dimensions"):
        make_index(factory, DIMENSION, "l2")


@pytest.mark.parametrize("factory", ["IVF64,Flat", "IVF4,PQ4"])
def test_too_few_keys_to_train_are_refused(tmp_path, factory):
    keys = save_keys(tmp_path, random_keys(5, 40, DIMENSION))
    path = tmp_path / "index.faiss"
    with pytest.raises(UserError, match="cannot train this --knn-index on 40 keys"):
        build_index(keys, factory, "l2", str(path), str(tmp_path / "work"), quiet)
    assert not path.exists()
    with pytest.raises(UserError, match="the split has 40"):
        refuse_unbuildable(factory, 40, DIMENSION, "l2")


@pytest.mark.parametrize(
    "factory", [*FACTORIES, "HNSW8", "PQ8x4", "OPQ8,IVF16,PQ8x4fs,Refine(SQ8)"]
)
def test_enough_keys_to_train_are_accepted(factory):
    refuse_unbuildable(factory, 256, DIMENSION, "l2")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(faiss_index, "gpu_available", lambda: False)
    assert choose_device("auto", "IVF16,PQ8", 8) == choose_device("cpu", "IVF16,PQ8", 8) == "cpu"
    with pytest.raises(UserError, match="--knn-device cuda: FAISS sees no GPU"):
        choose_device("cuda", "IVF16,PQ8", 8)


@pytest.mark.parametrize(
    "factory, k, device",
    [("IVF16,PQ8", 2048, "cuda"), ("IVF16,PQ8", 2049, "cpu"), ("IVF16,PQ8x4fs", 8, "cpu")],
)
def test_a_gpu_is_used_for_what_it_can_do(monkeypatch, factory, k, device):
    monkeypatch.setattr(faiss_index, "gpu_available", lambda: True)
    assert choose_device("auto", factory, k) == device
    if device == "cpu":
        with pytest.raises(UserError, match="use --knn-device cpu"):
            choose_device("cuda", factory, k)


# -- building --------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def killed_at(call):
    """A report that ends the build at its *call*-th line."""
    calls = iter(range(call))

    def report(line):
        if next(calls, None) is None:
            raise Killed(line)

    return report


@pytest.mark.parametrize("factory", ["IVF16,PQ8x4fs", "IVF16,PQ8", "IVF16,Flat", "Flat"])
def test_an_interrupted_build_ends_in_the_same_bytes(keys, tmp_path, monkeypatch, factory):
    monkeypatch.setattr(faiss_index, "PART_ROWS", 400)
    whole = tmp_path / "whole.faiss"
    build_index(keys, factory, "l2", str(whole), str(tmp_path / "whole"), quiet)
    for call in range(10):
        path = tmp_path / f"{call}.faiss"
        arguments = (keys, factory, "l2", str(path), str(tmp_path / f"{call}"))
        try:
            build_index(*arguments, killed_at(call))
        except Killed:
            assert not path.exists()
            build_index(*arguments, quiet)
        else:
            break
        assert path.read_bytes() == whole.read_bytes()
    assert call >= 4


def test_half_written_files_are_written_again(keys, tmp_path, monkeypatch):
    monkeypatch.setattr(faiss_index, "PART_ROWS", 400)
    path, work = tmp_path / "index.faiss", tmp_path / "work"
    arguments = (keys, "IVF16,PQ8x4fs", "l2", str(path), str(work), quiet)
    build_index(*arguments)
    whole = path.read_bytes()
    for name in os.listdir(work):
        (work / name).unlink()
        (work / f"{name}.tmp").write_bytes(b"half of it")
    (tmp_path / "index.faiss.tmp").write_bytes(b"half of it")
    path.unlink()
    build_index(*arguments)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "factory", ["Flat", "IVF16,Flat", "IVF16,PQ8x4fs", "IVF16,PQ8", "IVF16,PQ8,RFlat", "PCA8,Flat"]
)
def test_saving_on_the_way_changes_no_byte(keys, index_path, tmp_path, monkeypatch, factory):
    monkeypatch.setattr(faiss_index, "PART_ROWS", 400)
    path = tmp_path / "index.faiss"
    build_index(keys, factory, "l2", str(path), str(tmp_path / "work"), quiet)
    with open(index_path(factory), "rb") as one_piece:
        assert path.read_bytes() == one_piece.read()


def test_blocks_bound_the_memory_and_cover_every_key(
    keys, queries, index_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(faiss_index, "_BLOCK_BYTES", 100 * 4 * DIMENSION)
    path, lines = str(tmp_path / "index.faiss"), []
    build_index(keys, "Flat", "l2", path, str(tmp_path / "work"), lines.append)
    assert lines[-1] == "indexed 1,500 of 1,500 keys" and len(lines) == 15
    found = SearchIndex(path, "l2", None).search(queries, 10, 1)
    assert_nearest(found.distances, found.ids, all_distances(queries, keys))


@pytest.mark.parametrize("factory", ["PQ8", "IVF16,PQ8", "IVF16,PQ8x8", "OPQ8,IVF16,PQ8", "PQ8x10"])
def test_no_time_goes_to_polysemous_training(factory):
    index = make_index(factory, DIMENSION, "l2")
    ivf = faiss.try_extract_index_ivf(index)
    assert not (faiss.downcast_index(ivf) if ivf else index).do_polysemous_training


def test_the_training_sample_is_drawn_without_replacement(keys):
    sample = training_sample(keys, 500)
    assert sample.dtype == np.float32 and sample.shape == (500, DIMENSION)
    ids = all_distances(sample, keys).argmin(axis=1)
    assert (np.diff(ids) > 0).all(), "in the order of the file"
    assert np.array_equal(sample, keys[ids].astype(np.float32))
    assert ids.max() > 0.9 * COUNT and ids.min() < 0.1 * COUNT
    assert np.array_equal(training_sample(keys, 10**6), keys.astype(np.float32))


def test_a_place_that_cannot_be_written_is_refused(keys, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write .*file.* again to go on"):
        faiss_index.save(make_index("Flat", 4, "l2"), str(tmp_path / "file" / "index.faiss"))


def test_what_is_no_index_is_refused(tmp_path):
    (tmp_path / "index.faiss").write_bytes(b"something else entirely")
    for path in ("index.faiss", "missing.faiss"):
        with pytest.raises(UserError, match=f"cannot read .*{path}"):
            load(str(tmp_path / path))


def test_keys_are_not_copied_to_be_searched(keys, index_path):
    index = SearchIndex(index_path("Flat"), "l2", keys)
    inner = faiss.downcast_index(index._keys.index)
    assert inner.codes.size() == keys.nbytes
    assert np.array_equal(
        np.fromfile(keys.filename, dtype=np.uint8)[:6], np.frombuffer(b"\x93NUMPY", np.uint8)
    )


def test_a_training_sample_of_a_file_is_that_of_the_array(tmp_path):
    keys = random_keys(5, 500, 6)
    np.save(tmp_path / "keys.npy", keys)
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    assert np.array_equal(training_sample(mapped, 50), training_sample(keys, 50))
