"""TRIME by its formula: plain loops in float64 over tokens and their memories."""

import copy
import math
import types

import torch
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from helpers.small import make_dictionary

PAD = 1
WORDS = 20
KINDS = ("plain", "tied", "adaptive", "adaptive-tied")


def make_model(kind, dropout=0.0, seed=1):
    """A transformer_lm of 2 layers and 8 dimensions with one of four kinds of softmax."""
    adaptive = {"adaptive_softmax_cutoff": "8,14", "adaptive_softmax_factor": 2}
    inputs = {"adaptive_input": True, "adaptive_input_cutoff": "8,14", "adaptive_input_factor": 2}
    softmax = {
        "plain": {},
        "tied": {"share_decoder_input_output_embed": True},
        "adaptive": adaptive,
        "adaptive-tied": {
            **adaptive, **inputs, "tie_adaptive_weights": True, "tie_adaptive_proj": True,
        },
    }[kind]  # fmt: skip
    config = TransformerLanguageModelConfig(
        decoder_layers=2, decoder_embed_dim=8, decoder_input_dim=8, decoder_output_dim=8,
        decoder_ffn_embed_dim=12, decoder_attention_heads=2, max_target_positions=64,
        decoder_normalize_before=True, dropout=dropout, adaptive_softmax_dropout=dropout, **softmax,
    )  # fmt: skip
    dictionary = make_dictionary(WORDS)
    task = types.SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    model = TransformerLanguageModel.build_model(config, task)
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5, generator=rng)
    return model


def make_sample(lengths=(7, 7, 5), seed=3):
    """A batch of fairseq's ``MonolingualDataset``, few of whose words occur once."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.full((len(lengths), max(lengths) + 1), PAD)
    for row, length in enumerate(lengths):
        tokens[row, : length + 1] = torch.randint(4, 4 + WORDS, (length + 1,), generator=rng)
    source, target = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    for row, length in enumerate(lengths):
        source[row, length:] = PAD
    return {
        "id": torch.arange(len(lengths)),
        "net_input": {"src_tokens": source, "src_lengths": torch.tensor(lengths)},
        "ntokens": sum(lengths),
        "nsentences": len(lengths),
        "target": target,
    }


def sees(memory, own=None):
    """Which token (row, position) may look at which, by the words of the paper."""
    return {
        "none": lambda at, other: False,
        "local": lambda at, other: other[0] == at[0] and other[1] < at[1],
        "long": lambda at, other: other < at,
        "external": lambda at, other: other[0] != at[0] or (other[1] < at[1] and bool(own[at[0]])),
    }[memory]


def loop_loss(model, sample, may_see):
    """The summed loss and the gradients of a copy of the model, all in float64.

    Returns:
        tuple: a float, and a dict of Tensor by the name of the parameter.
    """
    model = copy.deepcopy(model).double().eval()
    caught = []
    hook = model.decoder.layers[-1].fc1.register_forward_pre_hook(
        lambda module, inputs: caught.append(inputs[0])
    )
    features = model(**sample["net_input"], features_only=True)[0]
    hook.remove()
    (states,) = caught  # (T, B, D)
    target = sample["target"]
    log_p = _log_probs(model, features)
    logits = _normalised_logits(model, features)
    places = [tuple(place) for place in (target != PAD).nonzero().tolist()]
    loss = 0.0
    for at in places:
        word = target[at]
        whole = logits[at].exp().sum()
        share = whole * log_p[at][word].exp()
        for other in places:
            if may_see(at, other):
                product = states[at[1], at[0]] @ states[other[1], other[0]]
                weight = (product / math.sqrt(states.size(-1))).exp()
                whole = whole + weight
                share = share + weight * (target[other] == word)
        loss = loss - (share / whole).log()
    loss.backward()
    gradients = {name: part.grad for name, part in model.named_parameters()}
    return loss.item(), gradients


def _log_probs(model, features):
    """Of every word, shape (B, T, V)."""
    softmax = model.decoder.adaptive_softmax
    if softmax is None:
        return model.decoder.output_layer(features).log_softmax(dim=-1)
    # fairseq's own get_log_prob changes in place what gradients need
    flat = features.reshape(-1, features.size(-1))
    head = softmax.head(flat).log_softmax(dim=-1)
    words = softmax.cutoff[0]
    parts = [head[:, :words]]
    for cluster, tail in enumerate(softmax.tail):
        parts.append(head[:, words + cluster, None] + tail(flat).log_softmax(dim=-1))
    return torch.cat(parts, dim=-1).view(*features.shape[:2], -1)


def _normalised_logits(model, features):
    """All logits, or those of the head of an adaptive softmax."""
    if model.decoder.adaptive_softmax is not None:
        head = model.decoder.adaptive_softmax.head(features.contiguous())
        return head.view(*features.shape[:2], -1)
    return model.decoder.output_layer(features)


@torch.no_grad()
def joint_nll(model, blocks, size, temperature=1.0, by_block=False, retrieve=None):
    """Minus log p of the tokens of a text, by one softmax over words and the last *size* tokens.

    Args:
        model: a fairseq language model, of which a float64 copy is used.
        blocks (list): pairs of LongTensor, the tokens that are fed and those to be predicted.
        retrieve (callable): takes a state, shape (D,), and gives further memories: their states,
            shape (n, D), and their tokens, shape (n,); None: there are none.

    Returns:
        Tensor: shape (N,), float64.
    """
    model = copy.deepcopy(model).double().eval()
    nll, states, words = [], [], []
    for source, target in blocks:
        if by_block:
            states, words = [], []
        caught = []
        hook = model.decoder.layers[-1].fc1.register_forward_pre_hook(
            lambda module, inputs, caught=caught: caught.append(inputs[0][:, 0])
        )
        lengths = torch.tensor([len(source)])
        features = model(source[None], src_lengths=lengths, features_only=True)[0]
        hook.remove()
        log_p, logits = _log_probs(model, features)[0], _normalised_logits(model, features)[0]
        for at, word in enumerate(target.tolist()):
            state = caught[0][at]
            whole = logits[at].exp().sum()
            share = whole * log_p[at, word].exp()
            memories = list(zip(states, words))[-size:]
            if retrieve is not None:
                memories += zip(*retrieve(state))
            for memory, followed in memories:
                weight = (state @ memory / (temperature * math.sqrt(len(state)))).exp()
                whole = whole + weight
                share = share + weight * (int(followed) == word)
            nll.append(-(share / whole).log())
            states, words = [*states, state], [*words, word]
    return torch.stack(nll)
