"""Which datastores, dictionaries, models and flags fit each other."""

import pytest
import torch
from helpers.parts import VOCABULARY
from helpers.small import edit_manifest, make_datastore, make_model, random_keys, random_values

from fairseq_knnlm.datastore.fingerprint import weights_fingerprint
from fairseq_knnlm.encoding.key_extractor import extractor_of
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.scoring.compatibility import (
    refuse_ensemble,
    refuse_other_dictionary,
    refuse_other_model,
    refuse_unexpected_flags,
)
from fairseq_knnlm.search.retriever import Retriever


@pytest.mark.parametrize(
    "flag, fits, does_not",
    [
        ("--knn-key", "ffn-input", "output"),
        ("--knn-key-layer", 1, 0),
        ("--knn-key-layer", -1, 0),
        ("--knn-metric", "l2", "ip"),
        ("--knn-index", "Flat", "IVF4,Flat"),
    ],
)
def test_a_flag_that_the_datastore_does_not_fit_is_refused(whole, parts, flag, fits, does_not):
    retriever = Retriever.open([whole], k=1)
    refuse_unexpected_flags(retriever, {flag: fits})
    refuse_unexpected_flags(Retriever.open(parts, k=1), {flag: None})
    with pytest.raises(UserError, match=f"{flag} {does_not} does not fit .* built with"):
        refuse_unexpected_flags(retriever, {flag: does_not})


def test_a_flag_must_fit_every_datastore(make):
    paths = [make(0, 100), make(100, 200, factory="IVF2,Flat")]
    with pytest.raises(UserError, match=f"--knn-index Flat does not fit the datastore {paths[1]}"):
        refuse_unexpected_flags(Retriever.open(paths, k=1), {"--knn-index": "Flat"})


def test_another_dictionary_is_refused(whole):
    retriever = Retriever.open([whole], k=1)
    refuse_other_dictionary(retriever, "b" * 64)
    with pytest.raises(UserError, match=f"{'c' * 12}.* not that of .*200 types, sha256 {'b' * 12}"):
        refuse_other_dictionary(retriever, "c" * 64)


def test_another_checkpoint_is_refused(make):
    model, other = make_model(), make_model(seed=2)
    right = weights_fingerprint(model)
    path = make(0, 20, model={"sha256": right, "parameters": 1})
    retriever = Retriever.open([path], k=1)
    refuse_other_model(retriever, model, right)
    wrong = weights_fingerprint(other)
    with pytest.raises(UserError, match=f"{wrong[:12]}.* not those .*{right[:12]}"):
        refuse_other_model(retriever, other, wrong)


def test_a_model_of_other_dimensions_is_refused(tmp_path):
    path = make_datastore(tmp_path / "d", random_keys(1, 10, 4), random_values(1, 10, VOCABULARY))
    with pytest.raises(UserError, match="keys have 8 dimensions, those of the datastore .*d 4"):
        refuse_other_model(Retriever.open([path], k=1), make_model(), "a" * 64)


def test_one_changed_weight_changes_the_fingerprint():
    model, again = make_model(), make_model()
    assert weights_fingerprint(model) == weights_fingerprint(again)
    again.decoder.layers[1].fc2.bias.data[3] += 1e-6
    assert weights_fingerprint(model) != weights_fingerprint(again)


def test_queries_are_the_state_that_the_keys_are(make):
    model = make_model()
    path = make(0, 20, key={"type": "attn-input", "layer": 1, "layers": 2})
    tokens = torch.tensor([[4, 5, 6]])
    key = Retriever.open([path], k=1).key
    with extractor_of(model, key) as extractor, torch.no_grad():
        states = []
        hook = model.decoder.layers[1].self_attn_layer_norm.register_forward_hook(
            lambda module, arguments, output: states.append(output)
        )
        model(tokens, src_lengths=None)
        hook.remove()
        assert torch.equal(extractor.keys, states[0])


def test_several_models_are_refused():
    refuse_ensemble(1)
    for count in (0, 2):
        with pytest.raises(UserError, match=f"an ensemble of {count} models is not supported"):
            refuse_ensemble(count)


def test_the_dimension_that_counts_is_the_models_not_that_of_the_stored_keys(tmp_path):
    # A projection before the index stores fewer numbers than the model's states have.
    path = make_datastore(tmp_path / "d", random_keys(1, 10, 4), random_values(1, 10, VOCABULARY))
    edit_manifest(path, lambda manifest: manifest.update(model_dimension=8))
    model = make_model()
    with pytest.raises(UserError, match="the weights of --path"):
        refuse_other_model(Retriever.open([path], k=1), model, "b" * 64)
    refuse_other_model(Retriever.open([path], k=1), model, "a" * 64)
