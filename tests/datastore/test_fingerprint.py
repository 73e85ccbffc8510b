"""Fingerprints differ where what they are of does, and only there."""

import hashlib

import torch
from helpers.small import make_dictionary, make_model

from fairseq_knnlm.datastore import (
    dictionary_fingerprint,
    file_fingerprint,
    weights_fingerprint,
)


def test_every_weight_of_a_model_counts():
    model = make_model(seed=1)
    fingerprint = weights_fingerprint(model)
    assert len(fingerprint) == 64
    assert weights_fingerprint(make_model(seed=1)) == fingerprint
    assert weights_fingerprint(make_model(seed=2)) != fingerprint
    with torch.no_grad():
        model.decoder.layers[0].fc1.bias[3] += 1e-6
    assert weights_fingerprint(model) != fingerprint


def test_names_and_shapes_of_weights_count():
    def model(name, *shape):
        module = torch.nn.Module()
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(*shape)))
        return module

    models = [model("a", 2, 3), model("b", 2, 3), model("a", 3, 2), model("a", 6)]
    assert len(set(map(weights_fingerprint, models))) == 4


def test_the_symbols_of_a_dictionary_count_in_their_order():
    dictionary, other = make_dictionary(5), make_dictionary(5)
    other.count[4] += 7
    assert dictionary_fingerprint(other) == dictionary_fingerprint(dictionary)
    other.symbols[4], other.symbols[5] = other.symbols[5], other.symbols[4]
    assert dictionary_fingerprint(other) != dictionary_fingerprint(dictionary)
    assert dictionary_fingerprint(make_dictionary(6)) != dictionary_fingerprint(dictionary)


def test_files_are_read_one_after_another(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    paths = str(tmp_path / "a"), str(tmp_path / "b")
    assert file_fingerprint(*paths) == hashlib.sha256(b"onetwo").hexdigest()
    assert file_fingerprint(*reversed(paths)) == hashlib.sha256(b"twoone").hexdigest()
