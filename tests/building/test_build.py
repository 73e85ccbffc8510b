"""Building from Python, without a command."""

import os

import numpy as np
import pytest
from helpers.small import contents

import fairseq_knnlm.building.build as build
from fairseq_knnlm.building import build_datastore, dump, finish, key_of, manifest_settings
from fairseq_knnlm.datastore import Datastore, DatastoreWriter, value_dtype
from fairseq_knnlm.encoding import extractor_of, make_samples
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.hub import from_pretrained


@pytest.fixture(params=["adaptive", "plain"])
def lm(request, data, checkpoints):
    folder, name = os.path.split(checkpoints[request.param])
    lm = from_pretrained(folder, name, str(data), tokens_per_sample=32)
    lm.architecture = request.param
    return lm.eval()


def blocks_of(lm, split="train"):
    lm.task.load_dataset(split)
    return lm.task.blocks(lm.task.dataset(split), context_window=0)


def settings_of(lm, **changed):
    settings = {
        "key": key_of(lm.models[0]),
        "metric": "l2",
        "data": {"split": "train", "sha256": "0" * 64},
        "context": {"tokens_per_sample": 32, "context_window": 0, "sample_break_mode": "none"},
        "versions": {},
    }
    return manifest_settings(lm.models[0], lm.task.target_dictionary, **{**settings, **changed})


def samples_of(blocks):
    return lambda chunks: make_samples(blocks, chunks.values(), max_tokens=36000)


def test_it_is_the_datastore_of_the_command(lm, datastores, tmp_path):
    blocks = blocks_of(lm)
    path = str(tmp_path / "datastore")
    assert build_datastore(
        path, lm.models[0], blocks, samples_of(blocks), settings_of(lm), index_factory="Flat"
    )
    made, expected = contents(path), contents(datastores[lm.architecture])
    for name in ("keys.npy", "values.npy", "index.faiss"):
        assert made[name] == expected[name], name
    opened, command = Datastore.open(path), Datastore.open(str(datastores[lm.architecture]))
    for name in ("key", "metric", "model", "dictionary", "count", "dimension", "temperature"):
        assert opened.manifest[name] == command.manifest[name], name
    assert list(opened.verify()) == []


def test_shares_of_several_processes_make_the_same_datastore(lm, datastores, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "JOURNAL_TOKENS", 400)
    blocks, path = blocks_of(lm), str(tmp_path / "datastore")
    complete = [
        build_datastore(
            path, lm.models[0], blocks, samples_of(blocks), settings_of(lm), "Flat", 3, shard
        )
        for shard in range(3)
    ]
    assert complete == [False, False, True]
    made, expected = contents(path), contents(datastores[lm.architecture])
    assert made["values.npy"] == expected["values.npy"]
    np.testing.assert_allclose(
        Datastore.open(path).keys,
        Datastore.open(str(datastores[lm.architecture])).keys,
        rtol=0.01, atol=0.01,
    )  # fmt: skip


def test_dump_and_finish_are_its_two_halves(lm, datastores, tmp_path):
    model, blocks = lm.models[0], blocks_of(lm)
    count = int(blocks.sizes.sum())
    dtype = value_dtype(len(lm.task.target_dictionary))
    path = str(tmp_path / "datastore")
    with extractor_of(model, key_of(model)) as extractor:
        with DatastoreWriter(path, settings_of(lm), [count], extractor.dimension, dtype) as writer:
            samples = make_samples(blocks, [range(len(blocks))], max_tokens=36000)
            dump(model, zip([0], samples), extractor, writer)
            assert finish(writer, "Flat", "l2") == ""
    expected = contents(datastores[lm.architecture])
    assert contents(path)["keys.npy"] == expected["keys.npy"]


def test_what_cannot_be_is_refused_before_any_work(lm, tmp_path):
    with pytest.raises(UserError, match="metric must be one of l2, ip, got 'cosine'"):
        settings_of(lm, metric="cosine")
    with pytest.raises(UserError, match="must be .* from -2 to 1, .* got 7"):
        key_of(lm.models[0], layer=7)
    blocks, path = blocks_of(lm), tmp_path / "datastore"
    for factory, fault in (("IVF99999,Flat", "needs 99,999 keys"), ("PQ", "is no FAISS index")):
        with pytest.raises(UserError, match=fault):
            build_datastore(
                str(path), lm.models[0], blocks, samples_of(blocks), settings_of(lm), factory
            )
        assert not path.exists()
