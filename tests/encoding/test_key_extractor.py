"""Every key of every layer against the same state computed step by step from the modules."""

import functools
import math

import pytest
import torch
from fairseq.models.lstm import LSTMDecoder
from helpers import small as helpers

from fairseq_knnlm.encoding.key_extractor import KEY_TYPES, KeyExtractor, resolve_layer
from fairseq_knnlm.errors import UserError

LAYERS, DIMENSION = 3, 8
make_model = functools.lru_cache(maxsize=None)(helpers.make_model)


def feed_forward(layer, x):
    return layer.fc2(torch.relu(layer.fc1(x)))


def attend(layer, x, mask):
    return layer.self_attn(query=x, key=x, value=x, attn_mask=mask)[0]


@torch.no_grad()
def states_by_hand(decoder, tokens):
    """Every state of every layer, shape (T, B, D) each, by (key, layer)."""
    length, states = tokens.size(1), {}
    mask = torch.full((length, length), -math.inf).triu(1)
    embedded = math.sqrt(DIMENSION) * decoder.embed_tokens(tokens) + decoder.embed_positions(tokens)
    x_before_norm = embedded.transpose(0, 1)
    x = decoder.layernorm_embedding(x_before_norm)
    for i, layer in enumerate(decoder.layers):
        if layer.normalize_before:
            states["attn-input-before-norm", i] = x
            states["attn-input", i] = layer.self_attn_layer_norm(x)
            states["output-after-norm", i - 1] = states["attn-input", i]
            x = x + attend(layer, states["attn-input", i], mask)
            states["ffn-input-before-norm", i] = x
            states["ffn-input", i] = layer.final_layer_norm(x)
            x = x + feed_forward(layer, states["ffn-input", i])
            states["output", i] = x
        else:
            states["attn-input-before-norm", i] = x_before_norm
            states["attn-input", i] = x
            states["ffn-input-before-norm", i] = x + attend(layer, x, mask)
            x = states["ffn-input", i] = layer.self_attn_layer_norm(
                states["ffn-input-before-norm", i]
            )
            x_before_norm = states["output", i] = x + feed_forward(layer, x)
            x = states["output-after-norm", i] = layer.final_layer_norm(x_before_norm)
    if decoder.layer_norm is not None:
        states["output-after-norm", LAYERS - 1] = decoder.layer_norm(x)
    return states


def make_tokens(length=6, batch=3):
    return torch.randint(4, 24, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def extract(model, tokens, key, layer):
    with KeyExtractor(model.decoder, key, layer) as extractor:
        model(tokens, src_lengths=None, features_only=True)
        return extractor.keys


@pytest.mark.parametrize("pre_norm", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("key", KEY_TYPES)
def test_equals_the_state_computed_by_hand(key, layer, pre_norm):
    model, tokens = make_model(pre_norm), make_tokens()
    expected = states_by_hand(model.decoder, tokens)
    found = extract(model, tokens, key, layer)
    assert found.shape == (6, 3, DIMENSION)
    torch.testing.assert_close(found, expected[key, layer])
    torch.testing.assert_close(extract(model, tokens, key, layer - LAYERS), found)


@pytest.mark.parametrize("pre_norm", [True, False], ids=["pre-norm", "post-norm"])
def test_the_states_differ(pre_norm):
    # or else the test above would not see one taken for another
    states = states_by_hand(make_model(pre_norm).decoder, make_tokens())
    last = [states[key, LAYERS - 1] for key in KEY_TYPES]
    for i, state in enumerate(last):
        assert all((state - other).abs().max() > 0.1 for other in last[:i])


def test_the_output_after_norm_is_what_the_softmax_reads():
    for pre_norm in (True, False):
        model, tokens = make_model(pre_norm), make_tokens()
        features = model(tokens, src_lengths=None, features_only=True)[0]
        found = extract(model, tokens, "output-after-norm", -1)
        torch.testing.assert_close(found.transpose(0, 1), features)


def test_padding_on_the_right_changes_no_key():
    model, tokens = make_model(True), make_tokens()
    padded = torch.cat([tokens, torch.full((3, 2), model.decoder.padding_idx)], dim=1)
    padded[0, 4:] = model.decoder.padding_idx
    whole, found = extract(model, tokens, "ffn-input", -1), extract(model, padded, "ffn-input", -1)
    torch.testing.assert_close(found[:6, 1:], whole[:, 1:])
    torch.testing.assert_close(found[:4, 0], whole[:4, 0])


def test_keys_are_of_the_last_forward_pass_and_of_its_size():
    model = make_model(True)
    with KeyExtractor(model.decoder) as extractor, torch.no_grad():
        assert extractor.dimension == DIMENSION
        for tokens in (make_tokens(length=6), make_tokens(length=4, batch=2)):
            model(tokens, src_lengths=None, features_only=True)
        assert extractor.keys.shape == (4, 2, DIMENSION)


def hooks(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks, *module._forward_pre_hooks)
    ]


@pytest.mark.parametrize("key", KEY_TYPES)
def test_hooks_are_removed_on_the_way_out(key):
    model = make_model(False)
    with pytest.raises(RuntimeError, match="stop"):
        with KeyExtractor(model.decoder, key) as extractor:
            assert len(hooks(model)) == 1
            model(make_tokens(), src_lengths=None, features_only=True)
            raise RuntimeError("stop")
    assert hooks(model) == []
    model(make_tokens(), src_lengths=None, features_only=True)
    assert extractor.keys is None


def test_an_extractor_changes_no_output():
    model, tokens = make_model(True), make_tokens()
    before = model(tokens, src_lengths=None)[0]
    for key in KEY_TYPES:
        with KeyExtractor(model.decoder, key, 1):
            assert torch.equal(model(tokens, src_lengths=None)[0], before)


@pytest.mark.parametrize("layer", [LAYERS, -LAYERS - 1])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(UserError, match=f"from -3 to 2, .* 3 layers, got {layer}"):
        resolve_layer(make_model(True).decoder, layer)


def test_another_kind_of_decoder_is_refused():
    decoder = LSTMDecoder(
        helpers.make_dictionary(20), embed_dim=8, hidden_size=8, out_embed_dim=8, attention=False
    )
    with pytest.raises(UserError, match="LSTMDecoder has no transformer decoder layers"):
        KeyExtractor(decoder)
    with pytest.raises(UserError, match="Linear has no transformer decoder layers"):
        resolve_layer(torch.nn.Linear(1, 1), -1)


def test_a_norm_that_the_model_lacks_is_refused():
    without_final = make_model(True, final_norm=False)
    with pytest.raises(
        UserError, match="output-after-norm .* layer 2 .* pre-norm .* no layer norm"
    ):
        KeyExtractor(without_final.decoder, "output-after-norm", -1)
    KeyExtractor(without_final.decoder, "output-after-norm", 0)

    plain_embedding = make_model(False, layernorm_embedding=False)
    with pytest.raises(UserError, match="attn-input-before-norm .* layer 0 .* post-norm"):
        KeyExtractor(plain_embedding.decoder, "attn-input-before-norm", 0)
    KeyExtractor(plain_embedding.decoder, "attn-input-before-norm", 1)
