"""Whatever way keys, values and index are read in a search, a damaged one is refused by name."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from helpers.small import edit_manifest, flip_byte, make_datastore, random_keys, random_values

from fairseq_knnlm.datastore import Datastore
from fairseq_knnlm.datastore.manifest import INDEX, KEYS, VALUES
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.search import Retriever
from fairseq_knnlm.search.index_build import build_index
from fairseq_knnlm.search.index_check import index_faults
from fairseq_knnlm.search.index_factory import make_index

COUNT, DIMENSION = 1200, 16
CHUNKS = [300] * 4
MANY = 60  # queries, enough for visiting each list once
HEADER = 128


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "d"
    keys, values = random_keys(1, COUNT, DIMENSION), random_values(1, COUNT, 200)
    return make_datastore(path, keys, values, CHUNKS, "IVF8,SQ8")


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def search(path, queries=MANY, k=32, verify=True, **settings):
    """Neighbours of some queries, every list visited."""
    retriever = Retriever.open([str(path)], verify=verify, k=k, nprobe=8, **settings)
    return retriever.search(torch.from_numpy(random_keys(7, queries, DIMENSION)))


# By lists, by candidates, all keys.
WAYS = {
    "lists": {},
    "candidates": {"k": 8},
    "few": {"queries": 3},
    "exhaustive": {"distances": "exhaustive"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_key_is_refused_by_who_reads_it(whole, copy, way):
    for chunk in range(4):
        first = HEADER + 300 * chunk * 2 * DIMENSION
        # The number at this place becomes another one, or with bit 6 of its upper byte a large one.
        for byte in (first + 600, first + 601):
            flip_byte(copy / KEYS, byte)
            with pytest.raises(UserError, match=f"{KEYS} is damaged between bytes {first} and"):
                for seed_queries in (WAYS[way].get("queries", MANY), MANY):
                    search(copy, **{**WAYS[way], "queries": seed_queries})
            flip_byte(copy / KEYS, byte)
    expected, found = search(whole, **WAYS[way]), search(copy, **WAYS[way])
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("way", ["lists", "candidates"])
def test_a_key_that_became_nan_is_refused(copy, way):
    keys = np.load(copy / KEYS, mmap_mode="r+")
    keys[:, 3] = np.nan
    keys.flush()
    with pytest.raises(UserError, match=f"{KEYS} is damaged"):
        search(copy, **WAYS[way])


def test_keys_that_are_not_read_are_not_verified(whole, copy):
    flip_byte(copy / KEYS, HEADER + 5)
    expected, found = (search(path, distances="index") for path in (whole, copy))
    assert all(torch.equal(a, b) for a, b in zip(expected, found))


@pytest.mark.parametrize("way", [*WAYS, "index"])
@pytest.mark.parametrize("name", [VALUES, INDEX])
def test_damaged_values_and_index_are_refused_when_they_are_loaded(copy, name, way):
    settings = WAYS.get(way, {"distances": "index"})
    if way == "exhaustive" and name == INDEX:
        flip_byte(copy / name, 2000)
        search(copy, **settings)  # reads no index
        return
    flip_byte(copy / name, 300)
    with pytest.raises(UserError, match=f"{name} is damaged between bytes"):
        search(copy, **settings)


@pytest.mark.parametrize("way", WAYS)
def test_verification_can_be_turned_off(whole, copy, way):
    flip_byte(copy / KEYS, HEADER + 4)
    found = search(copy, verify=False, **WAYS[way])
    assert found.ids.shape == search(whole, **WAYS[way]).ids.shape


def test_a_build_refuses_keys_that_are_not_what_was_written(copy, tmp_path):
    datastore = Datastore.open(str(copy))
    arguments = datastore.keys, "Flat", "l2", str(tmp_path / "i"), str(tmp_path / "w"), str
    build_index(*arguments, datastore.check_rows)
    flip_byte(copy / KEYS, HEADER + 4)
    os.remove(tmp_path / "i")
    shutil.rmtree(tmp_path / "w")
    with pytest.raises(UserError, match=f"{KEYS} is damaged"):
        build_index(*arguments, Datastore.open(str(copy)).check_rows)
    assert not os.path.exists(tmp_path / "i")


# -- the index of the manifest ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"metric": "ip"}, "index.metric is ip, of the index l2"),
        ({"factory": "IVF8,Flat"}, "index.factory is IVF8,Flat, which is IndexIVFFlat"),
        ({"factory": "IVF16,SQ8"}, "nlist=16"),
        ({"factory": "Flat"}, "which is IndexFlat"),
        ({"factory": "nonsense"}, "'nonsense' (--knn-index) is no FAISS index"),
    ],
)
def test_another_index_than_the_manifest_says_is_refused(copy, changed, message):
    def edit(manifest):
        manifest["index"].update(changed)
        manifest["metric"] = manifest["index"]["metric"]

    edit_manifest(copy, edit)
    with pytest.raises(UserError) as error:
        search(copy)
    assert message in str(error.value)


def test_an_index_of_other_keys_is_refused(whole):
    index = make_index("IVF8,SQ8", DIMENSION, "l2")
    with open(os.path.join(whole, "manifest.json")) as file:
        manifest = json.load(file)
    assert list(index_faults(index, manifest)) == [f"count is {COUNT}, of the index 0"]
    other = make_index("Flat", DIMENSION + 1, "l2")
    other.add(np.zeros((COUNT, DIMENSION + 1), np.float32))
    assert list(index_faults(other, manifest)) == [
        f"dimension is {DIMENSION}, of the index {DIMENSION + 1}"
    ]


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize(
    "factory",
    [
        "Flat", "SQfp16", "PQ4x4", "IVF8,Flat", "IVF8,PQ4x4fs", "IVF8,RaBitQ", "IVF8,RaBitQfs",
        "HNSW8", "IVF8_HNSW8,Flat", "OPQ4_8,IVF8,PQ4x4", "PCA8,IVF8,SQ8", "IVF8,PQ4x4,RFlat",
        "IVF8,PQ4x4,Refine(SQfp16)", "L2norm,IVF8,Flat", "RQ2x4", "IDMap,Flat",
    ],
)  # fmt: skip
def test_an_index_is_the_one_that_its_factory_makes(tmp_path, factory, metric):
    """However FAISS names the classes that it reads back."""
    from fairseq_knnlm.search.index_build import load, save

    index = make_index(factory, DIMENSION, metric)
    keys = random_keys(1, 400, DIMENSION).astype(np.float32)
    index.train(keys)
    if factory.startswith("IDMap"):
        index.add_with_ids(keys, np.arange(400))
    else:
        index.add(keys)
    save(index, str(tmp_path / "i"))
    manifest = {
        "count": 400, "dimension": DIMENSION, "index": {"factory": factory, "metric": metric}
    }  # fmt: skip
    assert list(index_faults(load(str(tmp_path / "i")), manifest)) == []


def test_a_datastore_without_a_metric_is_not_searched(copy):
    edit_manifest(copy, lambda manifest: manifest.pop("metric"))
    with pytest.raises(UserError, match="does not say metric, which searching needs"):
        search(copy)
