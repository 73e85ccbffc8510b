"""What fits: a datastore, a dictionary, a model and the flags that fix how a datastore is built."""

from typing import TYPE_CHECKING, Optional

import torch

from ..encoding.key_extractor import KeyExtractor
from ..errors import UserError

# What the checks below compare: fields that a manifest must have for them.
NEEDED_FIELDS = ("key", "metric", "model", "dictionary")

if TYPE_CHECKING:  # FAISS is loaded where a datastore is opened: training needs none
    from ..search.retriever import Retriever


def refuse_ensemble(count: int) -> None:
    """Refuse several models.

    Raises:
        UserError: unless there is exactly one.
    """
    fault = ensemble_fault(count)
    if fault:
        raise UserError(fault)


def ensemble_fault(count: int) -> Optional[str]:
    """What is wrong with that many models; None: nothing, it is one."""
    if count == 1:
        return None
    return (
        f"an ensemble of {count} models is not supported: a datastore belongs to one model; pass "
        "one checkpoint as --path"
    )


def refuse_other_dictionary(retriever: "Retriever", fingerprint: str) -> None:
    """Refuse a dictionary that is not the datastore's.

    Args:
        retriever (Retriever): of the datastore.
        fingerprint (str): of the dictionary, see ``datastore.dictionary_fingerprint``.

    Raises:
        UserError: naming both.
    """
    expected = retriever.manifest["dictionary"]
    if fingerprint != expected["sha256"]:
        raise UserError(
            f"the dictionary of the data (sha256 {fingerprint[:12]}) is not that of the datastore "
            f"{retriever.name} ({expected['types']} types, sha256 {expected['sha256'][:12]}): "
            "token ids would mean other words"
        )


def refuse_other_model(retriever: "Retriever", model, fingerprint: str) -> None:
    """Refuse a model whose hidden states the keys are not.

    Args:
        retriever (Retriever): of the datastore.
        model: a fairseq decoder-only language model.
        fingerprint (str): of its weights, see ``datastore.weights_fingerprint``.

    Raises:
        UserError: naming both.
    """
    dimension = KeyExtractor(model.decoder).dimension
    expected = retriever.datastores[0].model_dimension
    if dimension != expected:
        raise UserError(
            f"the model's keys have {dimension} dimensions, those of the datastore "
            f"{retriever.name} {expected}: it was built with another model"
        )
    expected = retriever.manifest["model"]["sha256"]
    if fingerprint != expected:
        raise UserError(
            f"the weights of --path (sha256 {fingerprint[:12]}) are not those that the datastore "
            f"{retriever.name} was built with (sha256 {expected[:12]}): use its checkpoint, or "
            "build a datastore for this one"
        )


def refuse_broken_weights(model) -> None:
    """Refuse a model that a weight is infinite or not a number in: nothing it says is.

    Args:
        model: a fairseq decoder-only language model.

    Raises:
        UserError: naming the first such tensor.
    """
    for name, parameter in model.named_parameters():
        broken = int((~torch.isfinite(parameter)).sum())
        if broken:
            raise UserError(
                f"the checkpoint of --path is broken: {broken:,} of the {parameter.numel():,} "
                f"numbers of its weight {name} are infinite or not a number"
            )


def refuse_unexpected_flags(retriever: "Retriever", given: dict) -> None:
    """Refuse flags that say something else than what a datastore was built with.

    Args:
        retriever (Retriever): of the datastores.
        given (dict): values by flag, of ``--knn-key``, ``--knn-key-layer``, ``--knn-metric`` and
            ``--knn-index``; None where a flag was not given.

    Raises:
        UserError: naming the flag, the datastore and both values.
    """
    for datastore in retriever.datastores:
        key = datastore.manifest["key"]
        built_with = {
            "--knn-key": key["type"],
            "--knn-key-layer": key["layer"],
            "--knn-metric": datastore.manifest["metric"],
            "--knn-index": datastore.manifest["index"]["factory"],
        }
        for flag, value in given.items():
            from_the_top = flag == "--knn-key-layer" and value is not None
            if from_the_top and -key["layers"] <= value < 0:
                value += key["layers"]
            if value is not None and str(value) != str(built_with[flag]):
                raise UserError(
                    f"{flag} {value} does not fit the datastore {datastore.path}, which was built "
                    f"with {built_with[flag]}: drop the flag, or build with it"
                )
