"""What generation with neighbours cannot do, and what it prints beside its hypotheses."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Optional

from ..errors import UserError
from ..gating.gates import Gate
from ..inspection.tokens import Inspector
from ..scoring.settings import Settings
from .commands import runs
from .print_patch import Memories

if TYPE_CHECKING:  # FAISS is loaded where a datastore is opened: training needs none
    from ..search.retriever import Retriever


def refuse_generation(flags, args, with_neighbors: bool) -> None:
    """Refuse what cannot be generated.

    Args:
        flags: of the task.
        args: settings of the generation.
        with_neighbors (bool): whether neighbours are mixed in.

    Raises:
        UserError: naming every flag that cannot be.
    """
    faults = list(_range_faults(args))
    if runs("generate") and _continues_blocks(flags, args):
        faults.append(
            "--sample-break-mode must be eos for more than one --beam, got "
            f"{flags.sample_break_mode}: prompts are lines, and fairseq fails behind the end of one"
        )
    if flags.knn_output is not None or flags.knn_output_tokens is not None:
        faults.append("--knn-output and --knn-output-tokens are of an evaluation: drop them")
    if not with_neighbors:
        if flags.knn_show_neighbors:
            faults.append("--knn-show-neighbors needs --knn-datastore and --knn-lambda above 0")
    else:
        if flags.knn_show_neighbors and flags.knn_skip:
            faults.append("--knn-show-neighbors makes every search: drop it or --knn-skip")
        if getattr(args, "print_alignment", None):
            faults.append("--print-alignment: a language model has no source to align with")
        if getattr(args, "constraints", None):
            faults.append("--constraints: fairseq has them for translation only")
    if faults:
        raise UserError("; ".join(faults))


def _range_faults(args) -> Iterator[str]:
    """What is wrong with numbers that fairseq takes as they come."""
    for name, least in (("beam", 1), ("nbest", 1), ("max_len_b", 0)):
        value = getattr(args, name, least)
        if value < least:
            yield f"--{name.replace('_', '-')} must be >= {least}, got {value}"
    for name in ("temperature", "lenpen", "unkpen", "max_len_a"):
        value = getattr(args, name, 1.0)
        if not math.isfinite(value):
            yield f"--{name.replace('_', '-')} must be a finite number, got {value}"
    if getattr(args, "temperature", 1.0) <= 0:
        yield f"--temperature must be > 0, got {args.temperature}"
    groups = getattr(args, "diverse_beam_groups", -1)
    if groups > 0 and args.beam % groups:
        yield f"--diverse-beam-groups must divide --beam {args.beam}, got {groups}"
    if getattr(args, "max_len_a", 1) == 0 and not args.match_source_len:
        if 0 <= args.max_len_b < args.min_len:
            yield f"--min-len must be at most --max-len-b {args.max_len_b}, got {args.min_len}"
    if getattr(args, "score_reference", False) and runs("interactive"):
        yield "--score-reference: fairseq-interactive has no references to score"


def _continues_blocks(flags, args) -> bool:
    """Whether prompts are blocks of the text, with ends of lines in them, for several beams."""
    are_blocks = str(flags.sample_break_mode) != "eos" and not args.score_reference
    return are_blocks and args.beam > 1


def make_memories(
    flags,
    args,
    retriever: "Retriever",
    settings: Settings,
    dictionary,
    gate: Optional[Gate] = None,
) -> Optional[Memories]:
    """What ``--knn-show-neighbors`` asks for; None where it does not.

    Args:
        flags: of the task.
        args: settings of the generation.
        retriever (Retriever): searches the datastores.
        settings (Settings): weight and temperature.
        dictionary: fairseq's, of the targets.
        gate (Gate): weighs the neighbours of each token; None: the weight is that of *settings*.
    """
    if not flags.knn_show_neighbors:
        return None
    datastores = retriever.datastores
    inspector = Inspector(
        datastores,
        dictionary,
        settings.knn_lambda,
        settings.temperature,
        flags.knn_show_neighbors,
        gate=gate,
    )
    return Memories(inspector, args.nbest, len(datastores))
