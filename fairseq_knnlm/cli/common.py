"""What the commands share: the flags of ``fairseq-eval-lm``, logging, and loading as it loads."""

import logging
import os
import pickle
import sys
from typing import Callable, Optional

import torch
from fairseq import checkpoint_utils, distributed_utils, options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import progress_bar

import fairseq_knnlm

from ..config import check_settings, datastore_paths
from ..errors import UserError
from ..task import KNNLMTask


def configure_logging() -> None:
    """Log in fairseq's own format, to standard output."""
    logging.basicConfig(
        format="%(asctime)s | %(levelname)s | %(name)s | %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        level=os.environ.get("LOGLEVEL", "INFO").upper(),
        stream=sys.stdout,
        force=True,  # importing fairseq has configured it already, in another format
    )


def make_parser(description: str, gen_subset: str):
    """The parser of ``fairseq-eval-lm``, for the task ``knnlm_lm``."""
    parser = options.get_eval_lm_parser(default_task="knnlm_lm")
    parser.description = description
    parser.set_defaults(gen_subset=gen_subset, user_dir=os.path.dirname(fairseq_knnlm.__file__))
    return parser


def run(parser, main: Callable, argv: Optional[list[str]] = None) -> None:
    """Parse the command line and call ``main(cfg, args)`` in every process it asks for."""
    configure_logging()
    if {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
        KNNLMTask.add_args(parser)  # fairseq adds them too late for --help
    args = options.parse_args_and_arch(parser, input_args=argv)
    distributed_utils.call_main(convert_namespace_to_omegaconf(args), main, args=args)


def require_datastore(cfg) -> list[str]:
    """The directories that ``--knn-datastore`` names.

    Raises:
        UserError: if it is missing.
    """
    paths = datastore_paths(cfg.task)
    if not paths:
        raise UserError("fairseq_knnlm: --knn-datastore is missing: which directory?")
    return paths


def refuse_unwritable(flag: str, path: str) -> None:
    """Refuse, before any work, a file that could not be written after it.

    Raises:
        UserError: naming the flag.
    """
    directory = os.path.dirname(path) or "."
    if not path or os.path.isdir(path) or not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(
            f"fairseq_knnlm: {flag} {path} cannot be written: it must name a file in a directory "
            "that is there and writable"
        )


def load_task_and_model(cfg):
    """Task and model as ``fairseq-eval-lm`` sets them up.

    Returns:
        tuple: the task and the model, in evaluation mode, on the device that the flags ask for.

    Raises:
        UserError: if ``--path`` names no checkpoint, or several.
    """
    path = cfg.common_eval.path
    if not path:
        raise UserError("fairseq_knnlm: --path is missing: which checkpoint?")
    check_settings(cfg.task)
    if not os.path.exists(path):
        raise UserError(f"fairseq_knnlm: --path {path}: no such checkpoint")
    if not os.path.exists(os.path.join(cfg.task.data, "dict.txt")):
        raise UserError(
            f"fairseq_knnlm: {cfg.task.data} is no directory made by fairseq-preprocess: it has no "
            "dict.txt"
        )
    cfg.task.tokens_per_sample -= cfg.eval_lm.context_window
    task = tasks.setup_task(cfg.task)
    try:
        (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
            [path],
            arg_overrides=eval(cfg.common_eval.model_overrides),  # as fairseq-eval-lm reads it
            suffix=cfg.checkpoint.checkpoint_suffix,
            strict=cfg.checkpoint.checkpoint_shard_count == 1,
            num_shards=cfg.checkpoint.checkpoint_shard_count,
            task=task,
        )
    except (pickle.UnpicklingError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"fairseq_knnlm: --path {path} is no checkpoint: {reason}") from error
    if cfg.common.fp16:
        model.half()
    if torch.cuda.is_available() and not cfg.common.cpu:
        torch.cuda.set_device(cfg.distributed_training.device_id)
        model.cuda()
    model.prepare_for_inference_(cfg)
    model.eval()  # returns None after prepare_for_inference_
    return task, model


def to_device(sample, device):
    """Move a sample to the model's device."""
    return utils.move_to_cuda(sample, device=device) if device.type == "cuda" else sample


def max_tokens(cfg) -> int:
    """``--max-tokens``, or the default of ``fairseq-eval-lm``."""
    return cfg.dataset.max_tokens or 36000


def max_positions(model) -> int:
    """Longest input of the model."""
    return utils.resolve_max_positions(model.max_positions())


def context_settings(cfg) -> dict:
    """How the text is cut into blocks and fed, as it is asked for on the command line."""
    return {
        "tokens_per_sample": cfg.task.tokens_per_sample + cfg.eval_lm.context_window,
        "context_window": cfg.eval_lm.context_window,
        "sample_break_mode": str(cfg.task.sample_break_mode),
        "add_bos_token": cfg.task.add_bos_token,
        "fp16": cfg.common.fp16,
    }


def with_progress(cfg, iterator, prefix: str):
    """fairseq's progress bar in the form that ``--log-format`` asks for, and its TensorBoard.

    What is logged needs a step: TensorBoard has no other.
    """
    master = distributed_utils.is_master(cfg.distributed_training)
    return progress_bar.progress_bar(
        iterator,
        log_format=cfg.common.log_format,
        log_interval=cfg.common.log_interval,
        prefix=prefix,
        tensorboard_logdir=cfg.common.tensorboard_logdir if master else None,
        default_log_format="simple" if cfg.common.no_progress_bar else "tqdm",
    )


def load_split(task, cfg, split: str):
    """Load a split of the data.

    Raises:
        UserError: if there is none of that name.
    """
    try:
        task.load_dataset(split)
    except FileNotFoundError:
        raise UserError(
            f"fairseq_knnlm: {cfg.task.data} has no split {split!r}: see --gen-subset and, of "
            "fairseq-knnlm-tune, --report-subset"
        ) from None
    return task.dataset(split)


def evaluation_samples(cfg, task, model, dataset):
    """Iterate over a loaded split for scoring, as the flags of ``fairseq-eval-lm`` say."""
    return task.evaluation_samples(
        dataset,
        max_tokens=max_tokens(cfg),
        batch_size=cfg.dataset.batch_size,
        max_positions=max_positions(model),
        num_workers=cfg.dataset.num_workers,
        data_buffer_size=cfg.dataset.data_buffer_size,
        context_window=cfg.eval_lm.context_window,
    )
