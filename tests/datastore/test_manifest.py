"""What a manifest says, and refusing to read what is not as it says."""

import json
import os

import numpy as np
import pytest
from helpers.writing import COUNT, DIMENSION, SIZES

from fairseq_knnlm.datastore import Datastore, read_manifest
from fairseq_knnlm.datastore.manifest import (
    INDEX,
    KEYS,
    MANIFEST,
    PARTS,
    VALUES,
    npy_bytes,
    npy_header,
    refuse_part,
)
from fairseq_knnlm.errors import UserError


def test_what_is_no_datastore_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        Datastore.open(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="no datastore: it has no manifest.json"):
        Datastore.open(str(tmp_path))


@pytest.mark.parametrize("name", [KEYS, VALUES, INDEX])
def test_a_file_of_another_size_is_refused(copy, name):
    size = os.path.getsize(copy / name)
    for other in (size - 1, 0, size + 1):
        os.truncate(copy / name, other)
        with pytest.raises(UserError, match=f"{name} has {other} bytes .* manifest says {size}"):
            Datastore.open(str(copy))


@pytest.mark.parametrize("name", [KEYS, VALUES, INDEX])
def test_a_missing_file_is_refused(copy, name):
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Datastore.open(str(copy))


@pytest.mark.parametrize("name, size", [(KEYS, 2 * DIMENSION * COUNT), (VALUES, COUNT)])
def test_another_array_of_the_same_size_is_refused(copy, name, size):
    before = os.path.getsize(copy / name)
    np.save(
        copy / name,
        np.zeros(size // 2 if name == KEYS else size, dtype="i2" if name == KEYS else "i1"),
    )
    assert os.path.getsize(copy / name) == before
    with pytest.raises(UserError, match=f"{name} is no .* array of shape"):
        Datastore.open(str(copy))


def test_an_edited_manifest_is_refused(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    for name, value in (("count", COUNT - 1), ("metric", "ip"), ("added", 1)):
        (copy / MANIFEST).write_text(
            json.dumps({**manifest, name: value}, indent=1, sort_keys=True)
        )
        with pytest.raises(UserError, match="damaged or was edited"):
            Datastore.open(str(copy))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", "\xff\xfe"])
def test_a_broken_manifest_is_refused(copy, text):
    (copy / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="manifest.json is damaged"):
        Datastore.open(str(copy))


def test_another_format_is_refused_by_its_number(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(UserError, match="format version 2, this release reads version 1"):
        Datastore.open(str(copy))


# -- what it says ----------------------------------------------------------------------------------


def test_it_says_what_lies_beside_it(finished):
    manifest = read_manifest(finished)
    assert manifest["count"] == COUNT
    assert manifest["dimension"] == manifest["model_dimension"] == DIMENSION
    assert manifest["chunks"]["rows"] == np.cumsum(SIZES).tolist()
    assert len(manifest["chunks"][KEYS]) == len(manifest["chunks"][VALUES]) == len(SIZES)
    assert sorted(manifest["files"]) == sorted([KEYS, VALUES, INDEX])
    for name, entry in manifest["files"].items():
        assert entry["size_bytes"] == os.path.getsize(os.path.join(finished, name))


@pytest.mark.parametrize("shape", [(0,), (7,), (7, 3), (0, 3)])
@pytest.mark.parametrize("dtype", ["float16", "uint32"])
def test_the_size_of_an_array_is_known_before_it_is_written(tmp_path, shape, dtype):
    np.save(tmp_path / "a.npy", np.zeros(shape, dtype))
    written = (tmp_path / "a.npy").read_bytes()
    assert npy_bytes(shape, np.dtype(dtype)) == len(written)
    assert written.startswith(npy_header(shape, np.dtype(dtype)))


def test_no_output_replaces_a_file_of_a_datastore(copy, tmp_path, monkeypatch):
    for name in PARTS:
        refuse_part("--knn-output", str(tmp_path / name))  # no datastore there
        with pytest.raises(UserError, match=f"--knn-output .*{name} would replace a file of the d"):
            refuse_part("--knn-output", str(copy / name))
    refuse_part("--knn-output", str(copy / "results.json"))
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match=f"tuned.json would replace .* {copy}: write it elsewhere"):
        refuse_part("--knn-output", "tuned.json")
