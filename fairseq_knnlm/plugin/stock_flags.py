"""What fairseq's own flags may be: for what cannot be, it ends in tracebacks or takes other values.

A task is given its own part of the configuration. What else was asked for stands in the whole that
the part belongs to, see ``whole_configuration``. So ``fairseq-eval-lm`` refuses here what our own
commands refuse, before any work.
"""

import ast
import os
from collections.abc import Iterator

from fairseq.data import plasma_utils

from ..errors import UserError
from ..scoring.compatibility import ensemble_fault
from .commands import runs

# Flags that choose what a model of fairseq is trained to predict.
_OTHER_TARGETS = ("self_target", "past_target")
# fairseq counts the tokens of a block in 32 bits.
_MOST_TOKENS = 2**31 - 1


def whole_configuration(flags):
    """The configuration of the command that the task's part belongs to.

    fairseq hands it to no task. omegaconf keeps it in ``_parent``, which fairseq itself relies on
    (``fairseq.dataclass.utils.merge_with_parent``). Fields of our own that interpolate every value
    would do as well, but would be saved in each checkpoint that the task trains.

    Args:
        flags: of the task.

    Returns:
        fairseq's configuration; None where the part was made by itself, in Python.
    """
    whole = flags.__dict__.get("_parent")
    return whole if whole is not None and "common_eval" in whole else None


def stock_faults(flags) -> Iterator[str]:
    """What is wrong with the flags of a command of fairseq that loads a checkpoint.

    Args:
        flags: of the task; its blocks are already shorter by the context window, as
            ``fairseq-eval-lm`` makes them.

    Yields:
        str: for each fault the flag, what it may be and what came.
    """
    whole = whole_configuration(flags)
    if whole is None:
        return
    if whole.common_eval.path is None:  # it trains, unless it is the command that cannot
        if runs("eval_lm"):
            yield "--path is missing: which checkpoint?"
        return
    yield from _data_faults(flags)
    yield from _checkpoint_faults(whole)
    yield from _target_faults(flags)
    yield from _block_faults(flags.tokens_per_sample, whole.eval_lm.context_window)
    yield from shard_faults(whole)
    if not whole.dataset.gen_subset:
        yield "--gen-subset must name a split of the data, got ''"
    for flag, value, least in (
        ("--softmax-batch", whole.eval_lm.softmax_batch, 0),
        ("--batch-size", whole.dataset.batch_size, 1),
        ("--max-tokens", whole.dataset.max_tokens, 1),
        ("--num-workers", whole.dataset.num_workers, 0),
        ("--data-buffer-size", whole.dataset.data_buffer_size, 0),
    ):
        if value is not None and value < least:
            yield f"{flag} must be >= {least}, got {value}"


def shard_faults(whole) -> Iterator[str]:
    """What is wrong with the numbers of processes, and with those that say which one this is.

    fairseq takes the larger of these flags and of the numbers of its launcher, which hides them.
    Of no processes it starts none, and ends as if all was done.

    Args:
        whole: fairseq's configuration.

    Yields:
        str: as ``stock_faults``.
    """
    num_shards, shard_id = whole.dataset.num_shards, whole.dataset.shard_id
    world_size = whole.distributed_training.distributed_world_size
    processes = max(num_shards, world_size)
    if world_size < 1:
        yield f"--distributed-world-size must be >= 1, got {world_size}"
    if num_shards < 1:
        yield f"--num-shards must be >= 1, got {num_shards}"
    else:
        rank = whole.distributed_training.distributed_rank
        for flag, number in (("--shard-id", shard_id), ("--distributed-rank", rank or 0)):
            if not 0 <= number < processes:
                yield (
                    f"{flag} must be in [0, {processes}), got {number}: it counts from 0 to "
                    "--num-shards or --distributed-world-size - 1"
                )


def refuse_impossible_shards(whole) -> None:
    """Refuse ``shard_faults``, before any process is started.

    Raises:
        UserError: naming all of them.
    """
    faults = "; ".join(shard_faults(whole))
    if faults:
        raise UserError(faults)


def model_overrides(text: str) -> dict:
    """``--model-overrides`` as a dictionary; ``fairseq-eval-lm`` evaluates it as Python code.

    Raises:
        UserError: if it is none.
    """
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


def _data_faults(flags) -> Iterator[str]:
    data = flags.data
    folder = (data or "").split(os.pathsep)[0]
    if flags.use_plasma_view and not plasma_utils.PYARROW_AVAILABLE:
        yield "--use-plasma-view needs pyarrow.plasma, which pyarrow 12 has dropped: drop the flag"
    if data is not None and not os.path.isfile(os.path.join(folder, "dict.txt")):
        yield f"{data or repr(data)} is no directory made by fairseq-preprocess: it has no dict.txt"


def _checkpoint_faults(whole) -> Iterator[str]:
    path = whole.common_eval.path
    checkpoints = path.split(os.pathsep)
    if len(checkpoints) > 1 and all(map(os.path.exists, checkpoints)):
        yield ensemble_fault(len(checkpoints))
    elif os.path.isdir(path):
        yield f"--path {path} is a directory, no checkpoint: name a file in it"
    elif _is_one_file(whole) and not os.path.exists(path):
        yield f"--path {path or repr(path)}: no such checkpoint"
    try:
        model_overrides(whole.common_eval.model_overrides)
    except UserError as error:
        yield str(error)


def _is_one_file(whole) -> bool:
    """Whether ``--path`` is the name of a file itself: no URL, nor the stem of several names."""
    parts = whole.checkpoint.checkpoint_suffix or whole.checkpoint.checkpoint_shard_count > 1
    return not parts and "://" not in whole.common_eval.path


def _target_faults(flags) -> Iterator[str]:
    given = [f"--{name.replace('_', '-')}" for name in _OTHER_TARGETS if flags[name]]
    if given:
        yield f"{', '.join(given)}: scoring needs next-token targets; drop these flags"


def _block_faults(tokens: int, context_window: int) -> Iterator[str]:
    if context_window < 0:
        yield f"--context-window must be >= 0, got {context_window}"
    elif not 1 <= tokens <= _MOST_TOKENS:
        yield (
            f"--tokens-per-sample must be in [1, {_MOST_TOKENS}] and more than --context-window, "
            f"of which a block is a part, got {tokens + context_window} and {context_window}"
        )
