"""kNN-LM perplexity by brute force in float64 numpy, with nothing of ours.

Blocks are scored one at a time with fairseq's stock datasets and stock softmax; keys are caught by
a hook of our own; every distance is computed.
"""

import contextlib
import types

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, tasks
from fairseq.tasks.language_modeling import LanguageModelingConfig


@contextlib.contextmanager
def numpy_compat():
    """Stock fairseq's break mode eos needs a name that numpy 2 has dropped."""
    with pytest.MonkeyPatch.context() as patch:
        if not hasattr(np, "compat"):
            patch.setattr(np, "compat", types.SimpleNamespace(long=np.int64), raising=False)
        yield


def load(data, checkpoint, tokens_per_sample, break_mode="none"):
    """Task and model, set up by fairseq alone."""
    config = LanguageModelingConfig(
        data=str(data), tokens_per_sample=tokens_per_sample, sample_break_mode=break_mode
    )
    config._name = "language_modeling"
    config.dataset_impl, config.use_plasma_view = None, False
    task = tasks.get_task("language_modeling").setup_task(config)
    (model,), _ = checkpoint_utils.load_model_ensemble([str(checkpoint)], task=task)
    return task, model.eval()


@torch.no_grad()
def score(task, model, split, context_window=0):
    """Keys, targets and log p_lm of a split, in corpus order.

    Returns:
        tuple of ndarray: shapes (N, D), (N,), (N,), float32, int64 and float64.
    """
    with numpy_compat():
        task.load_dataset(split)
    dataset = task.dataset(split)
    caught = []
    hook = model.decoder.layers[-1].fc1.register_forward_pre_hook(
        lambda module, arguments: caught.append(arguments[0])
    )
    keys, targets, log_probs, context = [], [], [], torch.zeros(0, dtype=torch.long)
    for index in range(len(dataset)):
        source, target = dataset[index]["source"], dataset[index]["target"]
        fed = torch.cat([context, source])
        sample = {
            "target": torch.cat([torch.full_like(context, task.target_dictionary.pad()), target])[
                None
            ]
        }
        output = model(fed[None], src_lengths=torch.tensor([len(fed)]))
        all_log_probs = model.get_normalized_probs(output, log_probs=True, sample=sample)[0]
        scored = all_log_probs[len(context) :].double()
        keys.append(caught.pop()[len(context) :, 0])
        targets.append(target)
        log_probs.append(scored.gather(1, target[:, None])[:, 0])
        if context_window:
            context = fed[-context_window:]
    hook.remove()
    return tuple(torch.cat(parts).numpy() for parts in (keys, targets, log_probs))


def knn_log_probs(keys, values, queries, targets, k, temperature, metric="l2"):
    """log p_knn of the targets, every distance computed in float64."""
    result = []
    keys = keys.astype(np.float16).astype(np.float64)
    for query, target in zip(queries.astype(np.float64), targets):
        distances = ((keys - query) ** 2).sum(axis=1) if metric == "l2" else -(keys @ query)
        nearest = np.argsort(distances, kind="stable")[:k]
        weights = np.exp(-(distances[nearest] - distances[nearest].min()) / temperature)
        with np.errstate(divide="ignore"):
            result.append(np.log(weights[values[nearest] == target].sum() / weights.sum()))
    return np.array(result)


def one_token_at_a_time(states, targets, size, theta, metric="ip", resets=(), predicted=None):
    """log p_cache by its formula, in float64; nan where there is nothing to look back on.

    It is that of the targets, or of one token at every position: *predicted*.
    """
    states, targets = np.asarray(states, dtype=np.float64), np.asarray(targets)
    result, first = np.full(len(targets), np.nan), 0
    for t in range(len(targets)):
        first = t if t in resets else first
        past = slice(max(first, t - size), t)
        if past.start == t:
            continue
        if metric == "ip":
            log_weights = theta * states[past] @ states[t]
        else:
            log_weights = -theta * ((states[past] - states[t]) ** 2).sum(axis=1)
        matched = log_weights[targets[past] == (targets[t] if predicted is None else predicted)]
        result[t] = -np.inf
        if len(matched):
            result[t] = np.logaddexp.reduce(matched) - np.logaddexp.reduce(log_weights)
    return result


def perplexity(log_p_lm, log_p_knn, knn_lambda):
    """Of the mixture."""
    mixed = (1 - knn_lambda) * np.exp(log_p_lm) + knn_lambda * np.exp(log_p_knn)
    return float(np.exp(-np.log(mixed).mean()))
