"""The file of neighbours: what is in it, and what is refused."""

import json

import numpy as np
import pytest
import torch

from fairseq_knnlm import neighbors_file
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.neighbors_file import Retrieved

SETTINGS = {"model": "a" * 64, "data": {"sha256": "b" * 64, "split": "valid"}, "k": 11}


@pytest.fixture
def retrieved():
    chance = np.random.default_rng(1)
    return Retrieved(
        torch.from_numpy(chance.normal(size=7).astype(np.float32)),
        torch.from_numpy(np.sort(chance.random((7, 11)).astype(np.float32), axis=1)),
        torch.from_numpy(chance.random((7, 11)) < 0.3),
        torch.arange(7),
        np.array([0, 4]),
        torch.from_numpy(chance.integers(16, size=(7, 11)).astype(np.uint8)),
        torch.from_numpy(chance.normal(size=(7, 5)).astype(np.float32)),
    )


@pytest.fixture
def path(retrieved, tmp_path):
    path = str(tmp_path / "neighbors")
    neighbors_file.save(path, retrieved, SETTINGS)
    return path


def equal(found, expected):
    return all(np.array_equal(a, b) for a, b in zip(found, expected))


def test_what_is_saved_is_loaded(retrieved, path):
    neighbors_file.refuse_other(path, SETTINGS)
    found = neighbors_file.load(path, 11)
    assert equal(found, retrieved)
    assert [part.dtype for part in found] == [part.dtype for part in retrieved]


def test_fewer_neighbours_are_the_nearest(retrieved, path):
    neighbors_file.refuse_other(path, {**SETTINGS, "k": 3})
    found = neighbors_file.load(path, 3)
    expected = retrieved._replace(
        distances=retrieved.distances[:, :3],
        matches=retrieved.matches[:, :3],
        parts=retrieved.parts[:, :3],
    )
    assert equal(found, expected)


def test_hidden_states_are_there_for_a_cache_only(retrieved, path):
    neighbors_file.save(path, retrieved._replace(queries=None), SETTINGS)
    found = neighbors_file.load(path, 11)
    assert found.queries is None and equal(found[:-1], retrieved[:-1])


def test_parts_are_of_equal_size_and_of_the_id_alone():
    ids = torch.arange(160_000)
    parts = neighbors_file.parts_of(ids)
    assert torch.equal(neighbors_file.parts_of(ids.flip(0)), parts.flip(0))
    sizes = np.bincount(parts.numpy(), minlength=neighbors_file.PARTS)
    assert len(sizes) == neighbors_file.PARTS and abs(sizes - 10_000).max() < 100
    far = torch.tensor([2**40, -1])
    assert (neighbors_file.parts_of(far) < neighbors_file.PARTS).all()


def test_it_is_read_as_documented(retrieved, path):
    with np.load(path) as file:
        matches = np.unpackbits(file["matches"], axis=1, count=11).astype(bool)
        assert np.array_equal(matches, retrieved.matches)
        assert json.loads(str(file["settings"]))["model"] == "a" * 64


@pytest.mark.parametrize(
    "name, other",
    [
        ("model", "c" * 64),
        ("data", {"sha256": "b" * 64, "split": "test"}),
        ("k", 12),
        ("nprobe", 32),
    ],
)
def test_other_settings_are_refused(path, name, other):
    with pytest.raises(UserError) as error:
        neighbors_file.refuse_other(path, {**SETTINGS, name: other})
    was = json.dumps(SETTINGS.get(name))
    assert f"{name} was {was}, is {json.dumps(other)}" in str(error.value)
    assert path in str(error.value)


def damage(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "change", [lambda data: data[:-9], damage, lambda data: b"text", lambda data: b""]
)
def test_a_damaged_file_is_refused(path, change):
    data = open(path, "rb").read()
    with open(path, "wb") as file:
        file.write(change(data))
    with pytest.raises(UserError, match="--knn-neighbors .* is not, or no longer, what"):
        neighbors_file.refuse_other(path, SETTINGS)
        neighbors_file.load(path, 11)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"settings": np.array("7")},
        {"settings": np.array("{"), "log_p_lm": np.zeros(3)},
        {"settings": np.array({}, dtype=object)},
    ],
)
def test_an_npz_of_something_else_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(UserError, match="is not, or no longer, what"):
        neighbors_file.refuse_other(str(tmp_path / "other.npz"), SETTINGS)


def test_another_version_is_refused(retrieved, path, monkeypatch):
    monkeypatch.setattr(neighbors_file, "FORMAT_VERSION", 2)
    with pytest.raises(UserError, match="format version 1, this release reads version 2"):
        neighbors_file.refuse_other(path, SETTINGS)


def test_a_file_that_cannot_be_written(retrieved, tmp_path):
    with pytest.raises(UserError, match="cannot write --knn-neighbors .*nonesuch"):
        neighbors_file.save(str(tmp_path / "nonesuch" / "n.npz"), retrieved, SETTINGS)


def test_a_write_that_fails_leaves_what_was_there(retrieved, path, monkeypatch):
    before = open(path, "rb").read()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(UserError, match="disk full"):
        neighbors_file.save(path, retrieved, SETTINGS)
    assert open(path, "rb").read() == before


def test_beside():
    assert neighbors_file.beside("a/valid.npz", "test") == "a/valid.test.npz"
    assert neighbors_file.beside("a.b/valid", "test") == "a.b/valid.test"
