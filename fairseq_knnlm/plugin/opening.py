"""What the flags open: settings, datastores and gates; and which models fit the task."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Optional

from fairseq import models
from fairseq.models import FairseqLanguageModel
from fairseq.models.transformer import TransformerDecoderBase

from ..datastore.schema import require
from ..datastore.tuned import find_tuned, in_words, read_gate, tuned_for
from ..errors import UserError
from ..gating.gated_search import refuse_blind
from ..gating.gates import Gate
from ..gating.store import from_bytes
from ..scoring.compatibility import NEEDED_FIELDS, refuse_unexpected_flags
from ..scoring.in_effect import InEffect
from ..scoring.settings import Settings, flag_of, with_temperature
from ..scoring.tuned_settings import neighbors_alone, settings_of_tuned
from .config import datastore_paths, given_settings, refuse_other_than_tuned

if TYPE_CHECKING:  # FAISS is loaded where a datastore is opened: training needs none
    from ..search.retriever import Retriever


class Opened(NamedTuple):
    """What the flags of a task open.

    in_effect (InEffect): settings, as given, else as tuned, else defaults.
    retriever (Retriever): searches the datastores; None without any.
    alone (dict): the best setting of neighbours alone, where one with a cache was tuned and is in
        effect; None elsewhere.
    unused (str): what lies tuned in the datastore and is not in effect, in words; None: nothing.
    gate (Gate): that was tuned, and weighs the neighbours of each token; None without one.
    """

    in_effect: InEffect
    retriever: Optional["Retriever"] = None
    alone: Optional[dict] = None
    unused: Optional[str] = None
    gate: Optional[Gate] = None

    def without_cache(self, what: str) -> InEffect:
        """What is in effect where there can be no cache: of what was tuned, neighbours alone.

        Args:
            what (str): knows no cache, for the message.

        Raises:
            UserError: if a flag asks for a cache, or nothing was tuned without one.
        """
        if not self.in_effect.settings.cache_size:
            return self.in_effect
        if self.alone is not None:
            return self.in_effect.without_cache(self.alone)
        raise UserError(
            f"{what} knows no continuous cache, which --knn-cache-size asks for, or --knn-tuned "
            "where it was tuned with one: drop the flag, or run fairseq-knnlm-tune again, which "
            "keeps the best setting of neighbours alone as well"
        )

    def lines(self, in_effect: InEffect) -> Iterator[str]:
        """What to log of the settings.

        Args:
            in_effect (InEffect): those of the command that runs.
        """
        yield in_effect.line()
        if self.gate is not None:
            yield f"a {self.gate.kind} gate weighs each token, in place of lambda (tuned)"
        if in_effect.settings.cache_size < self.in_effect.settings.cache_size:
            yield "tuned with a continuous cache, which is not used here: the best without it"
        if self.unused is not None:
            yield self.unused


def open_datastores(flags) -> Opened:
    """What the flags ask for, once for a task.

    Args:
        flags: of the task.

    Raises:
        UserError: if a datastore is not whole, or does not fit the flags or what was tuned.
    """
    paths, given = datastore_paths(flags), given_settings(flags)
    if not paths:
        return Opened(InEffect.of(given, searched=False))
    tuned = alone = gate = None
    if flags.knn_tuned:
        stored = tuned_for(paths)
        tuned, alone = settings_of_tuned(stored, paths[0]), neighbors_alone(stored, paths[0])
        refuse_other_than_tuned(flags, tuned)
        gate = _gate(paths[0], stored, given.get("skip", 0.0))
    in_effect = InEffect.of(given, tuned)
    retriever = _open_retriever(flags, paths, in_effect.settings)
    settings = with_temperature(in_effect.settings, retriever.datastores[0])
    in_effect = in_effect.with_auto(settings)
    if tuned is None:
        return Opened(in_effect, retriever, unused=_unused(paths, settings))
    return Opened(in_effect, retriever, None if "cache_size" in given else alone, gate=gate)


def _gate(path: str, stored: dict, skip: float) -> Optional[Gate]:
    """The gate among what was tuned; None where none is.

    Raises:
        UserError: if it cannot be read, or is none that tells which searches to leave out although
            some are to be.
    """
    data = read_gate(path, stored)
    if data is not None:
        gate = from_bytes(data)
        refuse_blind(gate, skip)
        return gate
    if skip:
        raise UserError(
            f"--knn-skip {skip}: what was tuned has no gate, which tells which searches to leave "
            "out: run fairseq-knnlm-tune --knn-gate learned"
        )
    return None


def _open_retriever(flags, paths: list[str], settings: Settings) -> "Retriever":
    # Imported here, because training needs no FAISS.
    from ..search.retriever import Retriever

    retriever = Retriever.open(
        paths,
        verify=str(flags.knn_verify) == "read",
        k=settings.k,
        nprobe=settings.nprobe,
        distances=settings.distances,
        device=str(flags.knn_device),
    )
    for datastore in retriever.datastores:
        require(datastore.path, datastore.manifest, NEEDED_FIELDS, "the task knnlm_lm")
    fixed = ("knn_key", "knn_key_layer", "knn_metric", "knn_index")
    refuse_unexpected_flags(retriever, {flag_of(name): getattr(flags, name) for name in fixed})
    return retriever


def _unused(paths: list[str], settings: Settings) -> Optional[str]:
    tuned = find_tuned(paths)
    if tuned is None:
        return None
    try:
        stored = settings_of_tuned(tuned, paths[0])
    except UserError as error:  # it is not used: no reason to end here
        return str(error)
    if "gate" not in tuned and InEffect.of({}, stored).settings == settings:
        return None
    return f"tuned settings lie in {paths[0]} ({in_words(tuned)}): --knn-tuned uses them"


def refuse_other_models(args) -> None:
    """Refuse an architecture that is no decoder-only language model, before it is built.

    Args:
        args: the model's part of fairseq's configuration.

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
