"""Which hidden state is the key, and the hook that catches it on its way through the decoder.

Khandelwal et al. (2020), section 5 and Table 5, compare six states of a transformer layer; the
input of the last layer's feed-forward network after its layer norm is the best. Works for every
decoder made of fairseq's ``TransformerDecoderLayer``, pre-norm and post-norm.
"""

from typing import Callable, NamedTuple, Optional

import torch

from ..errors import UserError
from ..fields import is_whole
from ..options import DEFAULT_KEY


class _Tap(NamedTuple):
    """One end of one module: what flows in (``output=False``) or out of it.

    Layers see states of shape (T, B, D), the modules before the first of them (B, T, D).
    """

    module: Optional[torch.nn.Module]
    output: bool
    batch_first: bool = False


def _ffn_input(decoder, layer, pre_norm):
    return _Tap(decoder.layers[layer].fc1, output=False)


def _ffn_input_before_norm(decoder, layer, pre_norm):
    module = decoder.layers[layer]
    return _Tap(module.final_layer_norm if pre_norm else module.self_attn_layer_norm, output=False)


def _attn_input(decoder, layer, pre_norm):
    module = decoder.layers[layer]
    return (
        _Tap(module.self_attn_layer_norm, output=True) if pre_norm else _Tap(module, output=False)
    )


def _attn_input_before_norm(decoder, layer, pre_norm):
    if pre_norm:
        return _Tap(decoder.layers[layer].self_attn_layer_norm, output=False)
    if layer > 0:
        return _Tap(decoder.layers[layer - 1].final_layer_norm, output=False)
    return _Tap(decoder.layernorm_embedding, output=False, batch_first=True)


def _output(decoder, layer, pre_norm):
    module = decoder.layers[layer]
    return _Tap(module, output=True) if pre_norm else _Tap(module.final_layer_norm, output=False)


def _output_after_norm(decoder, layer, pre_norm):
    if not pre_norm:
        return _Tap(decoder.layers[layer], output=True)
    if layer + 1 < len(decoder.layers):
        return _Tap(decoder.layers[layer + 1].self_attn_layer_norm, output=True)
    return _Tap(decoder.layer_norm, output=True)


_TAPS: dict[str, Callable] = {
    "ffn-input": _ffn_input,
    "ffn-input-before-norm": _ffn_input_before_norm,
    "attn-input": _attn_input,
    "attn-input-before-norm": _attn_input_before_norm,
    "output": _output,
    "output-after-norm": _output_after_norm,
}
KEY_TYPES = tuple(_TAPS)


def resolve_layer(decoder, layer: int) -> int:
    """Index of a decoder layer from 0.

    Args:
        decoder: a fairseq decoder.
        layer (int): counted from 0, or negative from the top.

    Raises:
        UserError: if the decoder is not a transformer or has no such layer.
    """
    layers = getattr(decoder, "layers", None)
    if not layers or not all(hasattr(module, "fc1") for module in layers):
        raise UserError(
            f"a {type(decoder).__name__} has no transformer decoder layers to take "
            "keys from; expected a model of the transformer_lm family"
        )
    if not is_whole(layer, -len(layers), len(layers) - 1):
        raise UserError(
            f"layer (--knn-key-layer) must be a whole number from {-len(layers)} to "
            f"{len(layers) - 1}, the model having {len(layers)} layers, got {layer!r}"
        )
    return layer % len(layers)


def extractor_of(model, key: dict) -> "KeyExtractor":
    """An extractor of the state that a datastore's keys are.

    Args:
        model: a fairseq decoder-only language model.
        key (dict): ``type`` and ``layer``, as the manifest has them (``Retriever.key``).

    Raises:
        UserError: if the model has no such state.
    """
    return KeyExtractor(model.decoder, key["type"], key["layer"])


class KeyExtractor:
    """Catches the keys of each forward pass, as a context manager.

    Args:
        decoder: a fairseq transformer decoder.
        key (str): one of ``KEY_TYPES``.
        layer (int): decoder layer, negative from the top.

    Attributes:
        key (str), layer (int): which state, the layer counted from 0.
        dimension (int): D, size of a key.
        keys (Tensor): of the last forward pass, shape (T, B, D), the model's dtype.

    Raises:
        UserError: if the model has no such state.
    """

    def __init__(self, decoder, key: str = DEFAULT_KEY, layer: int = -1):
        layer = resolve_layer(decoder, layer)
        pre_norm = decoder.layers[layer].normalize_before
        if key not in _TAPS:
            raise UserError(f"KeyExtractor: key must be one of {', '.join(KEY_TYPES)}, got {key!r}")
        self._tap = _TAPS[key](decoder, layer, pre_norm)
        if self._tap.module is None:
            raise UserError(
                f"key (--knn-key) {key} does not exist at layer {layer} of this "
                f"{'pre' if pre_norm else 'post'}-norm model: there is no layer norm there"
            )
        self.key, self.layer = key, layer
        self.dimension = decoder.layers[layer].embed_dim
        self.keys = None
        self._handle = None

    def __enter__(self):
        if self._tap.output:
            self._handle = self._tap.module.register_forward_hook(self._catch_output)
        else:
            self._handle = self._tap.module.register_forward_pre_hook(self._catch_input)
        return self

    def __exit__(self, *exc_info):
        self._handle.remove()
        self._handle = None
        self.keys = None

    def _catch_input(self, module, args):
        self._keep(args[0])

    def _catch_output(self, module, args, output):
        self._keep(output[0] if isinstance(output, tuple) else output)

    def _keep(self, state):
        self.keys = state.transpose(0, 1) if self._tap.batch_first else state
