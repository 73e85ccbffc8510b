"""The file of neighbours: what is in it, and what is refused."""

import json

import numpy as np
import pytest
import torch

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.tuning import tuning_data
from fairseq_knnlm.tuning.tuning_data import TuningData

SETTINGS = {"model": "a" * 64, "data": {"sha256": "b" * 64, "split": "valid"}, "k": 11}


@pytest.fixture
def data():
    rng = np.random.default_rng(1)
    return TuningData(
        torch.from_numpy(-rng.random(7).astype(np.float32)),
        torch.from_numpy(np.sort(rng.random((7, 11)).astype(np.float32), axis=1)),
        torch.from_numpy(rng.random((7, 11)) < 0.3),
        torch.arange(7),
        np.array([0, 4]),
        torch.from_numpy(rng.integers(16, size=(7, 11)).astype(np.uint8)),
        torch.from_numpy(rng.normal(size=(7, 5)).astype(np.float32)),
        torch.from_numpy(rng.integers(7, size=(7, 11)).astype(np.int32)),
        torch.from_numpy(rng.random((7, 2)).astype(np.float32) * np.float32([-1, 1])),
        torch.from_numpy(rng.integers(-1, 7, size=(7, 4)).astype(np.int32)),
        np.array([1.5, 2.5]),
    )


@pytest.fixture
def path(data, tmp_path):
    path = str(tmp_path / "neighbors")
    tuning_data.save(path, data, SETTINGS)
    return path


def equal(result, expected):
    return all(np.array_equal(a, b) for a, b in zip(result, expected))


def test_what_is_saved_is_loaded(data, path):
    tuning_data.refuse_other(path, SETTINGS)
    result = tuning_data.load(path, 11)
    assert equal(result, data)
    assert [part.dtype for part in result] == [part.dtype for part in data]


def test_fewer_neighbours_are_the_nearest(data, path):
    tuning_data.refuse_other(path, {**SETTINGS, "k": 3})
    result = tuning_data.load(path, 3)
    expected = data._replace(
        distances=data.distances[:, :3],
        matches=data.matches[:, :3],
        parts=data.parts[:, :3],
        values=data.values[:, :3],
    )
    assert equal(result, expected)


def test_hidden_states_are_there_for_a_cache_only(data, path):
    data = data._replace(queries=None, values=None, confidence=None, contexts=None, seconds=None)
    tuning_data.save(path, data, SETTINGS)
    result = tuning_data.load(path, 11)
    assert result.queries is result.values is result.confidence is result.contexts is None
    assert equal(result[:6], data[:6])


def test_parts_are_of_equal_size_and_of_the_id_alone():
    ids = torch.arange(160_000)
    parts = tuning_data.parts_of(ids)
    assert torch.equal(tuning_data.parts_of(ids.flip(0)), parts.flip(0))
    sizes = np.bincount(parts.numpy(), minlength=tuning_data.PARTS)
    assert len(sizes) == tuning_data.PARTS and abs(sizes - 10_000).max() < 100
    far = torch.tensor([2**40, -1])
    assert (tuning_data.parts_of(far) < tuning_data.PARTS).all()


def test_it_is_read_as_documented(data, path):
    with np.load(path) as file:
        matches = np.unpackbits(file["matches"], axis=1, count=11).astype(bool)
        assert np.array_equal(matches, data.matches)
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
        tuning_data.refuse_other(path, {**SETTINGS, name: other})
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
        tuning_data.refuse_other(path, SETTINGS)
        tuning_data.load(path, 11)


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
        tuning_data.refuse_other(str(tmp_path / "other.npz"), SETTINGS)


def test_another_version_is_refused(data, path, monkeypatch):
    monkeypatch.setattr(tuning_data, "FORMAT_VERSION", 3)
    with pytest.raises(UserError, match="format version 2, this release reads version 3"):
        tuning_data.refuse_other(path, SETTINGS)


@pytest.mark.parametrize("name", ["values", "confidence", "contexts", "seconds", "queries"])
def test_what_a_gate_needs_is_all_there_or_refused(data, path, name):
    with pytest.raises(UserError, match=f"save: data lacks {name}"):
        tuning_data.save(path, data._replace(**{name: None}), SETTINGS)
    with np.load(path) as file:
        arrays = {part: file[part] for part in file.files if part not in ("checksum", name)}
    with open(path, "wb") as file:
        np.savez(file, checksum=np.array(tuning_data._checksum(arrays)), **arrays)
    with pytest.raises(UserError, match=f"is not, or no longer, what .*'{name}'"):
        tuning_data.load(path, 11)


def first_set_to(value):
    def change(array):
        array = array.copy()
        array.flat[0] = value
        return array

    return change


@pytest.mark.parametrize(
    "name, change, what",
    [
        ("log_p_lm", first_set_to(np.nan), "a log-probability is not finite"),
        ("log_p_lm", first_set_to(3.0), "a log-probability is more than 0"),
        ("targets", first_set_to(-1), "a target is no word"),
        ("targets", first_set_to(7), "a target is no word"),
        ("distances", first_set_to(np.nan), "a distance is no number"),
        ("distances", first_set_to(2.0), "not nearest first"),
        ("document_starts", first_set_to(1), "documents begin nowhere"),
        ("parts", first_set_to(16), "not below 16"),
        ("queries", first_set_to(np.inf), "a hidden state is not finite"),
        ("values", first_set_to(7), "values has no word"),
        ("values", lambda array: array[:, :3].copy(), "values is int32 of shape (7, 3)"),
        ("contexts", first_set_to(-2), "contexts has no word"),
        ("confidence", first_set_to(0.1), "a maximum or an entropy of p_lm cannot be"),
        ("confidence", first_set_to(np.nan), "a maximum or an entropy of p_lm cannot be"),
        ("seconds", first_set_to(-1.0), "a duration is below 0"),
        ("distances", lambda array: array.astype(np.float64), "distances is float64"),
        ("targets", lambda array: array[:-1], "targets is int64 of shape"),
        ("settings", lambda array: np.array('{"format_version": 2, "k": "11"}'), "its k is '11'"),
    ],
)
def test_what_no_pass_gives_is_refused(path, name, change, what):
    """Though the checksum is that of the content."""
    with np.load(path) as file:
        arrays = {part: file[part] for part in file.files if part != "checksum"}
    arrays[name] = change(arrays[name])
    with open(path, "wb") as file:
        np.savez(file, checksum=np.array(tuning_data._checksum(arrays)), **arrays)
    with pytest.raises(UserError, match="is not, or no longer, what") as error:
        tuning_data.load(path, 11, types=7)
    assert what in str(error.value)


def test_a_file_whose_content_was_exchanged_is_refused(path):
    with np.load(path) as file:
        arrays = {part: file[part] for part in file.files}
    arrays["log_p_lm"] = arrays["log_p_lm"] * 2
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(UserError, match="its checksum is not that of its content"):
        tuning_data.load(path, 11)


def test_more_neighbours_than_there_are_are_refused(path):
    with pytest.raises(UserError, match="k must be a whole number >= 0 and <= 11, got 12"):
        tuning_data.load(path, 12)


@pytest.mark.parametrize(
    "changed, settings, what",
    [
        ({"parts": None, "targets": None}, SETTINGS, "save: data lacks targets, parts"),
        ({}, {}, "save: settings.k is missing"),
        ({}, {"k": 3}, r"save: distances is float32 of shape \(7, 11\), no float32 of shape"),
        ({"queries": torch.zeros(6, 5)}, SETTINGS, "save: queries is float32 of shape"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(data, tmp_path, changed, settings, what):
    path = tmp_path / "n.npz"
    with pytest.raises(UserError, match=what):
        tuning_data.save(str(path), data._replace(**changed), settings)
    assert not path.exists()


def test_a_file_that_cannot_be_written(data, tmp_path):
    with pytest.raises(UserError, match="cannot write --knn-neighbors .*nonesuch"):
        tuning_data.save(str(tmp_path / "nonesuch" / "n.npz"), data, SETTINGS)


def test_a_write_that_fails_leaves_what_was_there(data, path, monkeypatch):
    before = open(path, "rb").read()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(UserError, match="disk full"):
        tuning_data.save(path, data, SETTINGS)
    assert open(path, "rb").read() == before


def test_beside():
    assert tuning_data.beside("a/valid.npz", "test") == "a/valid.test.npz"
    assert tuning_data.beside("a.b/valid", "test") == "a.b/valid.test"
