"""What the commands share: model, data and samples, loaded as ``fairseq-eval-lm`` loads them."""

import ast
import os
import pickle

import torch
from fairseq import checkpoint_utils, tasks, utils

from ..errors import UserError
from ..plugin.config import check_settings
from .command_line import max_tokens


def load_task_and_model(cfg):
    """Task and model as ``fairseq-eval-lm`` sets them up.

    Returns:
        tuple: the task and the model, in evaluation mode, on the device that the flags ask for.

    Raises:
        UserError: if ``--path`` names no checkpoint, or several, or another flag cannot be.
    """
    path = cfg.common_eval.path
    if not path:
        raise UserError("--path is missing: which checkpoint?")
    check_settings(cfg.task)
    if cfg.task.knn_output_tokens is not None:
        raise UserError("--knn-output-tokens is for fairseq-eval-lm: drop it")
    overrides = _model_overrides(cfg.common_eval.model_overrides)
    if not os.path.exists(path):
        raise UserError(f"--path {path}: no such checkpoint")
    if not os.path.exists(os.path.join(cfg.task.data, "dict.txt")):
        raise UserError(
            f"{cfg.task.data} is no directory made by fairseq-preprocess: it has no dict.txt"
        )
    cfg.task.tokens_per_sample -= cfg.eval_lm.context_window
    task = tasks.setup_task(cfg.task)
    try:
        (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
            [path],
            arg_overrides=overrides,
            suffix=cfg.checkpoint.checkpoint_suffix,
            strict=cfg.checkpoint.checkpoint_shard_count == 1,
            num_shards=cfg.checkpoint.checkpoint_shard_count,
            task=task,
        )
    except (pickle.UnpicklingError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"--path {path} is no checkpoint: {reason}") from error
    if cfg.common.fp16:
        model.half()
    if torch.cuda.is_available() and not cfg.common.cpu:
        torch.cuda.set_device(cfg.distributed_training.device_id)
        model.cuda()
    model.prepare_for_inference_(cfg)
    model.eval()  # returns None after prepare_for_inference_
    return task, model


def _model_overrides(text: str) -> dict:
    """``--model-overrides`` as a dictionary; fairseq-eval-lm evaluates it as Python code."""
    try:
        overrides = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        overrides = None
    if not isinstance(overrides, dict):
        raise UserError(
            "--model-overrides must be a Python dictionary of names and plain values, such as "
            f"\"{{'attention_dropout': 0.0}}\", got {text!r}"
        )
    return overrides


def max_positions(model) -> int:
    """Longest input of the model."""
    return utils.resolve_max_positions(model.max_positions())


def load_split(task, cfg, split: str):
    """Load a split of the data.

    Args:
        task: a ``KNNLMTask``.
        cfg: fairseq's configuration, for the name of the data.
        split (str): its name, such as ``valid``.

    Returns:
        the loaded split, as fairseq's ``language_modeling`` makes it.

    Raises:
        UserError: if there is none of that name.
    """
    try:
        task.load_dataset(split)
    except FileNotFoundError:
        raise UserError(
            f"{cfg.task.data} has no split {split!r}: see --gen-subset and, of "
            "fairseq-knnlm-tune, --report-subset"
        ) from None
    return task.dataset(split)


def evaluation_samples(cfg, task, model, dataset):
    """Iterate over a loaded split for scoring, as the flags of ``fairseq-eval-lm`` say.

    Args:
        cfg: fairseq's configuration.
        task: a ``KNNLMTask``.
        model: the model that scores, whose longest text bounds the blocks.
        dataset: from ``load_split``.

    Raises:
        UserError: if a block is longer than the model or a batch takes.
    """
    return task.evaluation_samples(
        dataset,
        max_tokens=max_tokens(cfg),
        batch_size=cfg.dataset.batch_size,
        max_positions=max_positions(model),
        num_workers=cfg.dataset.num_workers,
        data_buffer_size=cfg.dataset.data_buffer_size,
        context_window=cfg.eval_lm.context_window,
    )
