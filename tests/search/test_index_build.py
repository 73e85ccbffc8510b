"""The FAISS index against brute force in float64."""

import os

import faiss
import numpy as np
import pytest
from helpers.searching import search_index
from helpers.small import all_distances, assert_nearest, quiet, random_keys, save_keys

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.search import index_build
from fairseq_knnlm.search.index_build import build_index, load, training_sample
from fairseq_knnlm.search.index_cost import estimate_bytes
from fairseq_knnlm.search.index_factory import (
    FLAT_BELOW,
    MAX_NLIST,
    default_index_factory,
    make_index,
    refuse_unbuildable,
)

COUNT, DIMENSION = 1500, 16
METRICS = ["l2", "ip"]
FACTORIES = ["Flat", "IVF16,Flat", "IVF16,PQ8x4fs", "IVF16,PQ8", "IVF16,SQ8", "OPQ8,IVF16,PQ8"]


# -- choosing --------------------------------------------------------------------------------------


def lists_of(factory):
    return 1 if factory == "Flat" else int(factory.split(",")[0][len("IVF") :])


def test_the_default_index_grows_with_the_datastore():
    assert default_index_factory(FLAT_BELOW - 1, 256) == "Flat"
    counts = [2**exponent for exponent in range(8, 38)]
    nlists = [lists_of(default_index_factory(count, 256)) for count in counts]
    assert nlists == sorted(nlists)
    for count, nlist in zip(counts, nlists):
        assert nlist <= 2 * np.sqrt(count)
        assert count / max(nlist, 1) >= 39, "fewer keys a list than FAISS wants to train"


def test_the_default_index_at_the_scale_of_the_paper():
    factory = default_index_factory(103_227_021, 1024)
    index = make_index(factory, 1024, "l2")
    assert index.nlist == MAX_NLIST == 4096
    assert index.sa_code_size() - index.coarse_code_size() == 64


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dimension", [16, 64, 96, 100, 256, 1024])
def test_every_default_index_can_be_built(tmp_path, dimension, metric):
    factory = default_index_factory(FLAT_BELOW, dimension)
    assert factory.startswith("IVF")
    keys = save_keys(tmp_path, random_keys(4, 600, dimension))
    path = str(tmp_path / "index.faiss")
    described = build_index(keys, factory, metric, path, str(tmp_path / "work"), quiet)
    assert described["nlist"] == lists_of(factory)
    assert load(path).ntotal == 600
    found = search_index(path, metric, keys, keys[:9].astype(np.float32), 5, 10**6)
    assert_nearest(found.distances[:, :1], found.ids[:, :1], all_distances(keys[:9], keys, metric))


@pytest.mark.parametrize("factory", FACTORIES)
def test_the_estimated_size_is_about_right(index_path, factory):
    size = os.path.getsize(index_path(factory))
    assert 0.5 * size < estimate_bytes(factory, COUNT, DIMENSION, "l2") < 1.5 * size


@pytest.mark.parametrize(
    "factory", ["", "nonsense", "IVF", "IVF16,PQ7", "IVF16,PQ8,nonsense", "pq"]
)
def test_a_factory_string_that_faiss_does_not_know_is_refused(factory):
    with pytest.raises(UserError, match=rf"'{factory}' \(--knn-index\) .* 16 dimensions"):
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


# -- building --------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill_at(monkeypatch, call):
    """Let the build end at its *call*-th moment, behind a line of progress or an added block.

    Returns:
        callable: takes the lines of progress.
    """
    calls, add = iter(range(call)), index_build._add

    def moment(line=None):
        if next(calls, None) is None:
            raise Killed(line)

    def added(index, block):
        add(index, block)
        moment()

    monkeypatch.setattr(index_build, "_add", added)
    return moment


@pytest.mark.parametrize("factory", ["IVF16,PQ8x4fs", "IVF16,PQ8", "IVF16,Flat", "Flat"])
def test_an_interrupted_build_ends_in_the_same_bytes(keys, tmp_path, monkeypatch, factory):
    monkeypatch.setattr(index_build, "PART_ROWS", 400)
    whole = tmp_path / "whole.faiss"
    build_index(keys, factory, "l2", str(whole), str(tmp_path / "whole"), quiet)
    for call in range(10):
        path = tmp_path / f"{call}.faiss"
        arguments = (keys, factory, "l2", str(path), str(tmp_path / f"{call}"))
        try:
            with monkeypatch.context() as patch:
                build_index(*arguments, kill_at(patch, call))
        except Killed:
            assert not path.exists()
            build_index(*arguments, quiet)
        else:
            break
        assert path.read_bytes() == whole.read_bytes()
    assert call >= 4


def test_half_written_files_are_written_again(keys, tmp_path, monkeypatch):
    monkeypatch.setattr(index_build, "PART_ROWS", 400)
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
    monkeypatch.setattr(index_build, "PART_ROWS", 400)
    path = tmp_path / "index.faiss"
    build_index(keys, factory, "l2", str(path), str(tmp_path / "work"), quiet)
    with open(index_path(factory), "rb") as one_piece:
        assert path.read_bytes() == one_piece.read()


def test_blocks_bound_the_memory_and_cover_every_key(
    keys, queries, index_path, tmp_path, monkeypatch
):
    monkeypatch.setattr(index_build, "BLOCK_BYTES", 100 * 4 * DIMENSION)
    path, blocks, add = str(tmp_path / "index.faiss"), [], index_build._add
    monkeypatch.setattr(
        index_build, "_add", lambda index, block: blocks.append(len(block)) or add(index, block)
    )
    build_index(keys, "Flat", "l2", path, str(tmp_path / "work"), quiet)
    assert blocks == 15 * [100]
    found = search_index(path, "l2", None, queries, 10, 1)
    assert_nearest(found.distances, found.ids, all_distances(queries, keys))


@pytest.mark.parametrize("factory", ["PQ8", "IVF16,PQ8", "IVF16,PQ8x8", "OPQ8,IVF16,PQ8", "PQ8x10"])
def test_no_time_goes_to_polysemous_training(factory):
    index = make_index(factory, DIMENSION, "l2")
    ivf = faiss.try_extract_index_ivf(index)
    assert not (faiss.downcast_index(ivf) if ivf else index).do_polysemous_training


@pytest.mark.parametrize("factory, said", [("IVF16,PQ8", True), ("Flat", False)])
def test_a_long_training_is_announced_with_its_duration(keys, tmp_path, monkeypatch, factory, said):
    """k-means does not tell how far it is."""
    lines = []

    def report_of(least_s):
        monkeypatch.setattr(index_build, "_WORTH_SAYING_S", least_s)
        work = str(tmp_path / f"{least_s}")
        build_index(keys, factory, "l2", str(tmp_path / "index.faiss"), work, lines.append)
        return lines[0]

    assert ("about 0.0 s" in report_of(0.0)) == said
    lines.clear()
    assert "about" not in report_of(60.0)


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
        index_build.save(make_index("Flat", 4, "l2"), str(tmp_path / "file" / "index.faiss"))


def test_what_is_no_index_is_refused(tmp_path):
    (tmp_path / "index.faiss").write_bytes(b"something else entirely")
    for path in ("index.faiss", "missing.faiss"):
        with pytest.raises(UserError, match=f"cannot read .*{path}"):
            load(str(tmp_path / path))


def test_a_training_sample_of_a_file_is_that_of_the_array(tmp_path):
    keys = random_keys(5, 500, 6)
    np.save(tmp_path / "keys.npy", keys)
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    assert np.array_equal(training_sample(mapped, 50), training_sample(keys, 50))
