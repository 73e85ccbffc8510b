"""What the flags open: settings and datastores; and which models fit the task."""

from fairseq import models
from fairseq.models import FairseqLanguageModel
from fairseq.models.transformer import TransformerDecoderBase

from ..datastore.schema import require
from ..datastore.tuned import tuned_for
from ..errors import UserError
from ..scoring.compatibility import NEEDED_FIELDS, refuse_unexpected_flags
from ..scoring.settings import AUTO, Settings, flag_of, starting_temperature
from ..scoring.tuned_settings import settings_of_tuned
from .config import datastore_paths, given_settings, refuse_other_than_tuned


def settings_and_retriever(args):
    """What the flags ask for, once for a task.

    Args:
        args: the task's part of the command line.

    Returns:
        tuple: ``Settings``, as given, else as tuned, else defaults, and the ``Retriever``; None
        without a datastore.

    Raises:
        UserError: if a datastore is not whole, or does not fit the flags or what was tuned.
    """
    paths, given = datastore_paths(args), given_settings(args)
    if not paths:
        return Settings(**given), None
    # Imported here, because training needs no FAISS.
    from ..search.retriever import Retriever

    if args.knn_tuned:
        given = settings_of_tuned(tuned_for(paths), paths[0])
        refuse_other_than_tuned(args, given)
    settings = Settings(**given)
    retriever = Retriever.open(
        paths,
        verify=str(args.knn_verify) == "read",
        k=settings.k,
        nprobe=settings.nprobe,
        distances=settings.distances,
        device=str(args.knn_device),
    )
    for datastore in retriever.datastores:
        require(datastore.path, datastore.manifest, NEEDED_FIELDS, "the task knnlm_lm")
    fixed = ("knn_key", "knn_key_layer", "knn_metric", "knn_index")
    refuse_unexpected_flags(retriever, {flag_of(name): getattr(args, name) for name in fixed})
    if settings.temperature == AUTO:
        temperature = starting_temperature(retriever.datastores[0])
        settings = settings._replace(temperature=temperature)
    return settings, retriever


def refuse_other_models(args) -> None:
    """Refuse an architecture that is no decoder-only language model, before it is built.

    Raises:
        UserError: naming it.
    """
    name = getattr(args, "_name", None) or getattr(args, "arch", None)
    cls = models.MODEL_REGISTRY.get(name) or models.ARCH_MODEL_REGISTRY.get(name)
    if cls is not None and not issubclass(cls, FairseqLanguageModel):
        raise UserError(
            f"the checkpoint's architecture {name} is no decoder-only language "
            "model; expected one of the transformer_lm family"
        )


def refuse_other_decoders(model) -> None:
    """Refuse a model whose decoder has no states to take keys from.

    Raises:
        UserError: naming its class.
    """
    if not isinstance(model.decoder, TransformerDecoderBase):
        raise UserError(
            f"the checkpoint's decoder, a {type(model.decoder).__name__}, is no "
            "transformer; expected a model of the transformer_lm family (--task language_modeling "
            "evaluates others, without neighbours)"
        )
