"""Training the networks of the learned gate on a text that is tuned on.

Whole documents are held out, another fifth of the text for each network: it is trained on the rest,
and the epoch is taken with which what is held out is likeliest. What the gate uses is the mean of
all networks, so that no document is only ever held out.

The networks that look after the search learn the weights of the mixture. Those that look before it
learn what that mixture gains, in nats, of tokens that were held out. He et al. (2021) skip where
the weight of p_knn is low, but it is also high where model and neighbours say the same.
"""

import math
from typing import Callable, NamedTuple

import torch

from ..gating.features import after_search
from ..gating.learned import Learned, mean_output
from ..gating.network import GateNetwork
from ..gating.ngram_counts import NgramCounts
from ..probability.mixture import mix
from ..probability.weights import best_weights
from .gate_data import FOLDS, LEAST_LOG_P, GateData

# Temperatures whose p_knn the gate weighs, as multiples of the one that was tuned: a mixture of
# them gives each token its own.
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)
_EPOCHS, _BATCH, _LEARNING_RATE, _WEIGHT_DECAY = 8, 1024, 3e-3, 1e-2
_SEED = 1
_LEAST_WEIGHT = 1e-3
# Gains are cut to these, in nats: a few tokens would count for more than all others.
_GAINS = (-2.0, 6.0)
# Steps of the quantiles of what a search is worth.
_QUANTILES = 1000


class _Stage(NamedTuple):
    """What the networks of one stage learn.

    features (Tensor): shape (N, F), float32, the hidden state last.
    targets (Tensor): shape (N,) or (N, outputs), float32, what *loss* compares outputs with.
    states (int): D, numbers of the hidden state.
    loss (callable): takes outputs, shape (n, outputs), and targets of the same rows.
    bias (Tensor): shape (outputs,), float32, the best outputs that are the same for all tokens.
    """

    features: torch.Tensor
    targets: torch.Tensor
    states: int
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    bias: torch.Tensor


def train_gate(
    data: GateData, k: int, temperature: float, counts: NgramCounts, states: int
) -> tuple[Learned, torch.Tensor]:
    """Train a gate.

    Args:
        data (GateData): of the text that is tuned on, with p_knn at each of ``TEMPERATURES`` times
            *temperature*.
        k (int): neighbours.
        temperature (float): T > 0.
        counts (NgramCounts): of the datastore's text.
        states (int): D, numbers of the hidden state, which come last in what is known before.

    Returns:
        tuple: the gate, and log p of each token by the networks that it was held out from, shape
        (N,). Both are the same for the same data, on one machine.
    """
    temperatures = [factor * temperature for factor in TEMPERATURES]
    log_probs = data.log_probs.nan_to_num(nan=LEAST_LOG_P).clamp(min=LEAST_LOG_P)
    weights = best_weights(log_probs.unbind(dim=1))
    after = _Stage(
        torch.cat([_after_search(data, temperature), data.before], dim=1),
        log_probs,
        states,
        _mixture_loss,
        torch.from_numpy(weights).clamp(min=_LEAST_WEIGHT).log().float(),
    )
    after_networks, outputs = _cross_fit(after, data.folds)
    log_p = (outputs.log_softmax(dim=1) + log_probs).logsumexp(dim=1)
    cache_share, alone = _without_neighbors(data.log_probs, len(temperatures))
    gains = (log_p - alone).clamp(*_GAINS)
    before = _Stage(data.before, gains, states, _gain_loss, gains.mean().unsqueeze(0))
    before_networks, _ = _cross_fit(before, data.folds)
    worth = mean_output(before_networks, data.before)[:, 0]
    quantiles = worth.quantile(torch.linspace(0.0, 1.0, _QUANTILES + 1))
    gate = Learned(
        k,
        temperatures,
        temperature,
        counts,
        before_networks,
        after_networks,
        quantiles,
        cache_share,
    )
    return gate, log_p


def _mixture_loss(outputs: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Mean of -ln p of the targets by the mixture."""
    return -(outputs.log_softmax(dim=1) + log_probs).logsumexp(dim=1).mean()


def _gain_loss(outputs: torch.Tensor, gains: torch.Tensor) -> torch.Tensor:
    """Mean squared error, whose minimum is the expected gain."""
    return (outputs[:, 0] - gains).square().mean()


def _without_neighbors(log_probs: torch.Tensor, count: int) -> tuple[float, torch.Tensor]:
    """What is left where a search is not made.

    Args:
        log_probs (Tensor): as in ``GateData``, with p_knn at *count* temperatures.

    Returns:
        tuple: the best weight of p_cache beside p_lm, 0 without a cache, and log p of each target,
        shape (N,).
    """
    log_p_lm = log_probs[:, 0]
    if log_probs.size(1) == 1 + count:
        return 0.0, log_p_lm
    log_p_cache = log_probs[:, 1 + count]
    share = float(best_weights([log_p_lm, log_p_cache])[1])
    share = min(share, 1.0 - _LEAST_WEIGHT)
    return share, mix(log_p_lm, None, log_p_cache, cache_lambda=share)


def _after_search(data: GateData, temperature: float) -> torch.Tensor:
    pieces = data.pieces()
    return torch.cat([after_search(each.distances, each.values, temperature) for each in pieces])


def _cross_fit(stage: _Stage, folds) -> tuple[list[GateNetwork], torch.Tensor]:
    """A network for each fold, trained without it, and its outputs for that fold's rows."""
    networks, outputs = [], torch.empty(len(folds), len(stage.bias))
    for fold in range(FOLDS):
        held_out = torch.from_numpy(folds == fold)
        if not held_out.any():
            continue
        network = _train(stage, held_out, _SEED + fold)
        with torch.no_grad():
            outputs[held_out] = network(stage.features[held_out])
        networks.append(network)
    return networks, outputs


def _train(stage: _Stage, held_out: torch.Tensor, seed: int) -> GateNetwork:
    """The network of the epoch that is the best for what is held out.

    Args:
        stage (_Stage): of the whole text.
        held_out (BoolTensor): shape (N,), rows that it does not learn from.
        seed (int): of its first weights, of the order of rows, and of what is dropped.
    """
    rows = (~held_out).nonzero().squeeze(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _new_network(stage, rows)
        optimiser = torch.optim.AdamW(
            network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
        )
        steps = _EPOCHS * math.ceil(len(rows) / _BATCH)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        best, best_state = math.inf, network.state_dict()
        for _ in range(_EPOCHS):
            network.train()
            for batch in rows[torch.randperm(len(rows))].split(_BATCH):
                optimiser.zero_grad()
                _loss(network, stage, batch).backward()
                optimiser.step()
                schedule.step()
            network.eval()
            with torch.no_grad():
                loss = _loss(network, stage, held_out).item()
            if loss < best:
                state = network.state_dict().items()
                best, best_state = loss, {name: tensor.clone() for name, tensor in state}
    network.load_state_dict(best_state)
    return network


def _new_network(stage: _Stage, rows: torch.Tensor) -> GateNetwork:
    """A network that begins with the best outputs that are the same for all tokens."""
    scalars = stage.features.size(1) - stage.states
    network = GateNetwork(scalars, stage.states, outputs=len(stage.bias))
    network.standardise(stage.features[rows])
    torch.nn.init.zeros_(network.output.weight)
    network.output.bias.data = stage.bias.clone()
    return network


def _loss(network: GateNetwork, stage: _Stage, rows: torch.Tensor) -> torch.Tensor:
    return stage.loss(network(stage.features[rows]), stage.targets[rows])
