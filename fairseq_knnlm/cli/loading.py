"""What the commands share: model, data and samples, loaded as ``fairseq-eval-lm`` loads them."""

from typing import NamedTuple

import torch
from fairseq import checkpoint_utils, tasks, utils
from fairseq.models import FairseqLanguageModel

from ..datastore.fingerprint import weights_fingerprint
from ..errors import UserError
from ..plugin.stock_flags import model_overrides
from ..plugin.task import KNNLMTask
from .command_line import max_tokens


class Loaded(NamedTuple):
    """What a command works with.

    task (KNNLMTask): set up by the flags.
    model: in evaluation mode, on the device that the flags ask for.
    model_sha256 (str): of its weights as they were in the checkpoint, see
        ``datastore.weights_fingerprint``; in half precision they are others.
    """

    task: KNNLMTask
    model: FairseqLanguageModel
    model_sha256: str


def load_task_and_model(cfg) -> Loaded:
    """Task and model as ``fairseq-eval-lm`` sets them up.

    Raises:
        UserError: if ``--path`` names no checkpoint, or several, or another flag cannot be.
    """
    path = cfg.common_eval.path
    if not path:
        raise UserError("--path is missing: which checkpoint?")
    cfg.task.tokens_per_sample -= max(0, cfg.eval_lm.context_window)
    if cfg.task.knn_output_tokens is not None:
        raise UserError("--knn-output-tokens is for fairseq-eval-lm: drop it")
    task = tasks.setup_task(cfg.task)
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
        [path],
        arg_overrides=model_overrides(cfg.common_eval.model_overrides),
        suffix=cfg.checkpoint.checkpoint_suffix,
        strict=cfg.checkpoint.checkpoint_shard_count == 1,
        num_shards=cfg.checkpoint.checkpoint_shard_count,
        task=task,
    )
    if task.retriever is None:
        sha256 = weights_fingerprint(model)
    else:  # the task has refused others
        sha256 = task.retriever.manifest["model"]["sha256"]
    if cfg.common.fp16:
        model.half()
    if torch.cuda.is_available() and not cfg.common.cpu:
        torch.cuda.set_device(cfg.distributed_training.device_id)
        model.cuda()
    model.prepare_for_inference_(cfg)
    model.eval()  # returns None after prepare_for_inference_
    return Loaded(task, model, sha256)


def max_positions(model) -> int:
    """Longest input of the model."""
    return utils.resolve_max_positions(model.max_positions())


def load_split(task, split: str):
    """Load a split of the data.

    Args:
        task: a ``KNNLMTask``.
        split (str): its name, such as ``valid``.

    Returns:
        the loaded split, as fairseq's ``language_modeling`` makes it.

    Raises:
        UserError: if there is none of that name.
    """
    task.load_dataset(split)
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
