"""What generation with neighbours cannot do, and what it prints beside its hypotheses."""

from typing import TYPE_CHECKING, Optional

from ..errors import UserError
from ..inspection.tokens import Inspector
from ..scoring.settings import Settings
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
    faults = []
    if flags.knn_output is not None or flags.knn_output_tokens is not None:
        faults.append("--knn-output and --knn-output-tokens are of an evaluation: drop them")
    if not with_neighbors:
        if flags.knn_show_neighbors:
            faults.append("--knn-show-neighbors needs --knn-datastore and --knn-lambda above 0")
    elif getattr(args, "print_alignment", None):
        faults.append("--print-alignment: a language model has no source to align with")
    elif getattr(args, "constraints", None):
        faults.append("--constraints: fairseq has them for translation only")
    if faults:
        raise UserError("; ".join(faults))


def make_memories(
    flags, args, retriever: "Retriever", settings: Settings, dictionary
) -> Optional[Memories]:
    """What ``--knn-show-neighbors`` asks for; None where it does not.

    Args:
        flags: of the task.
        args: settings of the generation.
        retriever (Retriever): searches the datastores.
        settings (Settings): weight and temperature.
        dictionary: fairseq's, of the targets.
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
    )
    return Memories(inspector, args.nbest, len(datastores))
