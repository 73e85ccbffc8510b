"""Every field of a manifest: one that is missing, of another type or out of range is named."""

import copy as copying
import re

import pytest
from helpers.small import edit_manifest, make_datastore, settings
from helpers.writing import COUNT, DIMENSION, make_rows, open_writer

from fairseq_knnlm.datastore import Datastore, DatastoreWriter, read_manifest
from fairseq_knnlm.datastore.manifest import INDEX, KEYS, VALUES
from fairseq_knnlm.datastore.schema import refuse_faulty, require
from fairseq_knnlm.errors import UserError

SHA = "c" * 64
CONTEXT = {"tokens_per_sample": 256, "context_window": 0, "sample_break_mode": "none"}
# What a builder says, and the small datastore of these tests does not.
MORE = {
    "data": {"split": "train", "sha256": SHA},
    "context": CONTEXT,
    "versions": {"python": "3.11.7"},
    "temperature": {"value": 16.0, "queries": 2048, "k": 1024, "nprobe": 32},
}


MISSING = "(missing)"  # a text, so that the names of the cases are the same in every process


def put(fields, name, value):
    """Set or, for ``MISSING``, remove a field; *name* has slashes between its parts."""
    *groups, last = name.split("/")
    for group in groups:
        fields = fields[group]
    if value is MISSING:
        del fields[last]
    else:
        fields[last] = value


# By field: what it says, and what the error says of it.
FAULTS = [
    # type
    ("format_version", True, "format_version must be 1, got True"),
    ("format_version", 1.0, "format_version must be 1, got 1.0"),
    ("format_version", "1", "format_version must be 1, got '1'"),
    ("count", float(COUNT), f"count must be a whole number >= 0, got {COUNT}.0"),
    ("count", True, "count must be a whole number >= 0, got True"),
    ("count", -1, "count must be a whole number >= 0, got -1"),
    ("count", 10**30, "count must be a whole number >= 0, got 1000"),
    ("count", MISSING, "count is missing, it must be a whole number >= 0"),
    ("dimension", MISSING, "dimension is missing"),
    ("dimension", 0, "dimension must be a whole number >= 1"),
    ("dimension", "8", "dimension must be a whole number >= 1.*got '8'"),
    ("model_dimension", None, "model_dimension must be a whole number >= 1.*got None"),
    ("files", [], "files must be a dict, got []"),
    (f"files/{KEYS}", MISSING, "files.keys.npy is missing"),
    (f"files/{KEYS}/dtype", "float32", "files.keys.npy.dtype must be one of float16"),
    (f"files/{VALUES}/dtype", MISSING, "files.values.npy.dtype is missing"),
    (f"files/{VALUES}/dtype", "int8", "files.values.npy.dtype must be one of uint8"),
    (f"files/{VALUES}/dtype", ["u1"], "files.values.npy.dtype must be one of uint8"),
    (f"files/{INDEX}", MISSING, "files.index.faiss is missing"),
    (f"files/{INDEX}/size_bytes", "9", "files.index.faiss.size_bytes must be a whole number"),
    (f"files/{INDEX}/checksums", MISSING, "files.index.faiss.checksums is missing"),
    (f"files/{INDEX}/checksums", ["xyz"], "files.index.faiss.checksums must be a list of checks"),
    ("files/other", 3, "files.other must be a dict, got 3"),
    ("files/..", {"size_bytes": 1}, "files must have names of files in the directory, got '..'"),
    ("chunks", MISSING, "chunks is missing, it must be a dict"),
    ("chunks", "all", "chunks must be a dict, got 'all'"),
    ("chunks/rows", MISSING, "chunks.rows is missing"),
    ("chunks/rows", [1.5], "chunks.rows must be a list of whole numbers >= 0"),
    ("chunks/rows", {}, "chunks.rows must be a list of whole numbers >= 0"),
    (f"chunks/{KEYS}", None, "chunks.keys.npy must be a list of checksums"),
    ("index", MISSING, "index is missing, it must be a dict"),
    ("index", "Flat", "index must be a dict, got 'Flat'"),
    ("index/factory", MISSING, "index.factory is missing"),
    ("index/factory", 7, "index.factory must be a text that is not empty, got 7"),
    ("index/metric", "cosine", "index.metric must be one of l2, ip, got 'cosine'"),
    ("index/nlist", 0, "index.nlist must be a whole number >= 1, or null, got 0"),
    ("index/faiss_version", None, "index.faiss_version must be a text"),
    ("metric", "cosine", "metric must be one of l2, ip, got 'cosine'"),
    ("metric", ["l2"], "metric must be one of l2, ip"),
    ("key", "output", "key must be a dict, got 'output'"),
    ("key/type", MISSING, "key.type is missing"),
    ("key/layer", -1, "key.layer must be a whole number >= 0, got -1"),
    ("key/layer", "1", "key.layer must be a whole number >= 0, got '1'"),
    ("key/layers", MISSING, "key.layers is missing"),
    ("model/sha256", "abc", "model.sha256 must be 64 hexadecimal digits, got 'abc'"),
    ("model/parameters", 1.5, "model.parameters must be a whole number"),
    ("dictionary", None, "dictionary must be a dict, got None"),
    ("dictionary/types", "200", "dictionary.types must be a whole number >= 1, got '200'"),
    ("data/split", 3, "data.split must be a text"),
    ("context/tokens_per_sample", "256", "context.tokens_per_sample must be a whole number >= 1"),
    ("context/sample_break_mode", None, "context.sample_break_mode must be a text"),
    ("context/add_bos_token", 0, "context.add_bos_token must be true or false, got 0"),
    ("versions", ["3.11"], "versions must be a dict of texts"),
    ("versions", {"python": 3}, "versions must be a dict of texts"),
    ("temperature", 16.0, "temperature must be a dict, got 16.0"),
    ("temperature/value", 0, "temperature.value must be a finite number > 0, got 0"),
    ("temperature/value", True, "temperature.value must be a finite number > 0, got True"),
    ("temperature/value", MISSING, "temperature.value is missing"),
    # what belongs together
    ("count", COUNT + 1, f"chunks.rows must end with {COUNT + 1}.*got {COUNT}"),
    ("dimension", DIMENSION + 1, "files.keys.npy.size_bytes must be .* for (173, 9) float16"),
    (f"files/{KEYS}/size_bytes", 5, "files.keys.npy.size_bytes must be .* got 5"),
    (f"files/{VALUES}/dtype", "uint16", "files.values.npy.size_bytes must be"),
    (f"files/{INDEX}/checksums", [], "files.index.faiss.checksums must be 1, .* got 0"),
    ("chunks/rows", [], f"chunks.rows must end with {COUNT}, .* got 0"),
    ("chunks/rows", [COUNT, 3, COUNT], "chunks.rows must not decrease"),
    (f"chunks/{VALUES}", [], "chunks.values.npy must have a checksum for each of the 6"),
    ("metric", "ip", "index.metric must be ip, as metric says, got l2"),
    ("index/metric", "ip", "index.metric must be l2, as metric says, got ip"),
    ("key/layer", 2, "key.layer must be < 2, which key.layers is, got 2"),
    ("context/context_window", 256, "context.context_window must be < 256, which .* is, got 256"),
]  # fmt: skip


@pytest.mark.parametrize("name, value, message", FAULTS, ids=str)
def test_what_a_manifest_cannot_say_is_named(copy, name, value, message):
    edit_manifest(
        copy, lambda manifest: (manifest.update(copying.deepcopy(MORE)), put(manifest, name, value))
    )
    with pytest.raises(UserError, match="no manifest that this release reads") as error:
        Datastore.open(str(copy))
    for part in message.split(".*"):
        assert part in str(error.value)


def test_what_a_builder_says_and_own_fields_are_read(copy):
    own = {"corpus": {"license": "CC0", "languages": ["en"]}, "notes": None}
    edit_manifest(copy, lambda manifest: manifest.update(MORE, **own))
    manifest = read_manifest(str(copy))
    assert {name: manifest[name] for name in (*MORE, *own)} == {**MORE, **own}


def test_all_faults_are_named_at_once(copy):
    edit_manifest(copy, lambda manifest: manifest.update(metric="x", dimension=0))
    with pytest.raises(UserError, match="dimension must be .*; metric must be "):
        Datastore.open(str(copy))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format_version": NaN}', '{"a": 1e999}', "7"])
def test_json_that_is_no_manifest_is_damaged(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="manifest.json is damaged"):
        Datastore.open(str(copy))


# -- the writer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"metric": "cosine"}, "in settings, metric must be one of l2, ip, got 'cosine'"),
        ({"key": {"type": "output"}}, "in settings, key.layer is missing"),
        ({"model": "m"}, "in settings, model must be a dict, got 'm'"),
        ({"context": {**CONTEXT, "context_window": 300}}, "context.context_window must be <"),
    ],
)
def test_settings_that_no_reader_takes_are_refused_before_anything_is_written(
    tmp_path, changed, message
):
    with pytest.raises(UserError, match=re.escape(message)):
        open_writer(tmp_path / "d", **changed)
    assert not (tmp_path / "d").exists()


def test_an_index_that_no_reader_takes_is_not_finished(tmp_path):
    keys, values = make_rows()
    with DatastoreWriter(str(tmp_path), settings(), [COUNT], DIMENSION, values.dtype) as writer:
        writer.write(0, keys, values)
        (tmp_path / INDEX).write_bytes(b"an index")
        with pytest.raises(UserError, match="index.factory is missing"):
            writer.finish({"metric": "l2", "nlist": None, "faiss_version": "1"})
    assert not (tmp_path / "manifest.json").exists()


def test_a_datastore_of_own_settings_opens(tmp_path):
    """Settings that leave things out, as a program of its own may write them."""
    keys, values = make_rows()
    path = make_datastore(tmp_path / "d", keys, values, corpus="mine")
    edit_manifest(path, lambda manifest: [manifest.pop(name) for name in settings()])
    assert len(Datastore.open(path)) == COUNT
    with pytest.raises(UserError, match="does not say key, model, which scoring needs"):
        require(path, read_manifest(path), ["count", "key", "model"], "scoring")
    with pytest.raises(UserError, match="it must be a dict, got 3"):
        refuse_faulty(path, 3)
