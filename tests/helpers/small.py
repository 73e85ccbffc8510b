"""Small datastores and models, and what neighbours must be, in plain numpy."""

import os
import types

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from fairseq_knnlm.datastore import DatastoreWriter, value_dtype
from fairseq_knnlm.datastore.manifest import INDEX, KEYS, MANIFEST, POSITIONS, VALUES, read_manifest
from fairseq_knnlm.files import file_checksums, render
from fairseq_knnlm.search.index_build import build_index

FILES = (KEYS, VALUES, INDEX, MANIFEST)


def random_keys(seed, count, dimension):
    """Clustered vectors, shape (count, dimension), float16."""
    rng = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(0).normal(size=(20, dimension))
    return (centres[rng.integers(20, size=count)] + rng.normal(size=(count, dimension))).astype(
        np.float16
    )


def random_values(seed, count, vocabulary_size):
    """Token ids, shape (count,), in the dtype of a datastore."""
    rng = np.random.default_rng(seed)
    return rng.integers(vocabulary_size, size=count).astype(value_dtype(vocabulary_size))


def settings(**changed):
    """What the manifest of a datastore says of model, text and key."""
    return {
        "key": {"type": "ffn-input", "layer": 1, "layers": 2},
        "metric": "l2",
        "model": {"sha256": "a" * 64, "parameters": 12},
        "dictionary": {"sha256": "b" * 64, "types": 200},
        **changed,
    }


def write_chunks(writer, keys, values, chunk_sizes, only=None):
    """Write the chunks that are not done, or those of them in *only*."""
    ends = np.cumsum(chunk_sizes)
    for chunk, (size, end) in enumerate(zip(chunk_sizes, ends)):
        if chunk not in writer.done and (only is None or chunk in only):
            writer.write(chunk, keys[end - size : end], values[end - size : end])


def finish(writer, factory="Flat"):
    """Build the index and the manifest."""
    with writer.finishing() as missing:
        assert missing == ""
        description = build_index(
            writer.keys(),
            factory,
            writer.settings["metric"],
            writer.index_path,
            writer.work_path,
            report=lambda line: None,
        )
        writer.finish(description)


def make_datastore(path, keys, values, chunk_sizes=None, factory="Flat", **changed):
    """Write a whole datastore; returns its directory."""
    chunk_sizes = chunk_sizes or [len(keys)]
    with DatastoreWriter(
        str(path), settings(**changed), chunk_sizes, keys.shape[1], values.dtype
    ) as writer:
        write_chunks(writer, keys, values, chunk_sizes)
        finish(writer, factory)
    return str(path)


def edit_manifest(path, edit):
    """Change the manifest of a datastore and give it its new checksum.

    Args:
        edit (callable): takes the manifest, a dict, and changes it.
    """
    manifest = read_manifest(path)
    edit(manifest)
    with open(os.path.join(path, MANIFEST), "wb") as file:
        file.write(render(manifest))


def add_positions(path, positions):
    """Give a datastore a file that says where in the text the value of each row stands."""
    file = os.path.join(path, POSITIONS)
    np.save(file, np.asarray(positions, dtype=np.int64))
    entry = {
        "dtype": "int64",
        "size_bytes": os.path.getsize(file),
        "checksums": file_checksums(file),
    }
    edit_manifest(path, lambda manifest: manifest["files"].update({POSITIONS: entry}))


def contents(path):
    """The bytes of every file of a directory, by name."""
    return {
        name: open(os.path.join(path, name), "rb").read()
        for name in sorted(os.listdir(path))
        if os.path.isfile(os.path.join(path, name))
    }


def flip_byte(path, position):
    """Change one byte of a file."""
    with open(path, "r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def quiet(line):
    """Takes a line of progress."""


def save_keys(folder, keys):
    """Keys as a datastore has them: a memory-mapped file."""
    np.save(folder / "keys.npy", keys)
    return np.load(folder / "keys.npy", mmap_mode="r")


def all_distances(queries, keys, metric="l2"):
    """Shape (queries, keys), float64: squared L2, or minus the inner product."""
    queries, keys = queries.astype(np.float64), keys.astype(np.float64)
    if metric == "ip":
        return -queries @ keys.T
    return ((queries[:, None] - keys[None]) ** 2).sum(axis=2)


def assert_nearest(distances, ids, exact, rtol=1e-5):
    """Ids and distances are those of nearest entries, whichever of equal ones.

    Args:
        exact (ndarray): shape (N, entries), every distance.
    """
    k = ids.shape[1]
    tolerance = {"rtol": rtol, "atol": rtol * np.abs(exact).max()}
    assert all(len(set(row)) == k for row in ids.tolist()), "an entry was found twice"
    np.testing.assert_allclose(np.take_along_axis(exact, ids, axis=1), distances, **tolerance)
    np.testing.assert_allclose(distances, np.sort(exact, axis=1)[:, :k], **tolerance)


def make_dictionary(count):
    """A dictionary of *count* symbols besides fairseq's own four."""
    dictionary = Dictionary()
    for token in range(count):
        dictionary.add_symbol(f"w{token}")
    return dictionary


def make_model(pre_norm=True, layernorm_embedding=True, final_norm=True, seed=1):
    """A transformer_lm of 3 layers and 8 dimensions; random weights, layer norms included."""
    config = TransformerLanguageModelConfig(
        decoder_layers=3,
        decoder_embed_dim=8,
        decoder_input_dim=8,
        decoder_output_dim=8,
        decoder_ffn_embed_dim=12,
        decoder_attention_heads=2,
        decoder_normalize_before=pre_norm,
        layernorm_embedding=layernorm_embedding,
        no_decoder_final_norm=not final_norm,
        max_target_positions=32,
        dropout=0.5,
    )
    dictionary = make_dictionary(20)
    task = types.SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    model = TransformerLanguageModel.build_model(config, task).eval()
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.7, generator=rng)
    return model
