"""A language model and its datastore in Python: fairseq's hub interface, with neighbours."""

import enum
import os
import typing

from fairseq import hub_utils, tasks
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from .datastore.fingerprint import weights_fingerprint
from .errors import UserError
from .plugin.config import KNNLMConfig, check_settings
from .scoring.compatibility import refuse_broken_weights, refuse_other_model

__all__ = ["from_pretrained"]

# Commands print neighbours and write files, the hub interface does neither.
_NOT_HERE = ("knn_show_neighbors", "knn_output", "knn_output_tokens")
_KNOWN = [
    name
    for name in KNNLMConfig.__dataclass_fields__
    if name.startswith("knn_") and name not in _NOT_HERE
]
_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


def from_pretrained(
    model_name_or_path, checkpoint_file="model.pt", data_name_or_path=".", **settings
) -> hub_utils.GeneratorHubInterface:
    """Load a language model, of whichever task, with the datastore that was built of it.

    As ``from_pretrained`` of fairseq's models, with ``--knn-*`` settings.

    Args:
        model_name_or_path (str or Path): directory of the checkpoint; or an archive of one, or its
            URL.
        checkpoint_file (str): its name.
        data_name_or_path (str or Path): directory of ``dict.txt``; beginning with ".", from the
            checkpoint's.
        settings: ``knn_datastore``, ``knn_k``, ``knn_lambda``, ``knn_temperature`` and the other
            flags by these names; all others, as ``tokenizer="moses", moses_no_escape=True``, are
            fairseq's.

    Returns:
        GeneratorHubInterface: fairseq's. ``score(text)`` gives ``positional_scores`` (natural log)
        of its tokens, ``sample(text, beam=5, ...)`` continues it. Either takes ``knn=False``, which
        leaves the neighbours out of this call.

    Raises:
        UserError: for settings that cannot be, a checkpoint or a dictionary that is not there, or a
            datastore of another model or dictionary.

    >>> lm = from_pretrained(model, "checkpoint_last.pt", data, knn_datastore=directory, knn_k=8)
    >>> tokens = lm.encode("w1 w7 w49")
    >>> len(tokens)  # </s> is the last, and is not scored
    4
    >>> with_neighbors = lm.score("w1 w7 w49")["positional_scores"]
    >>> without = lm.score("w1 w7 w49", knn=False)["positional_scores"]
    >>> with_neighbors.shape == without.shape, bool((with_neighbors == without).any())
    (True, False)
    >>> lm.sample("w1 w7", beam=5, max_len_b=8).split()[:2]
    ['w1', 'w7']
    """
    ours = ("knn_", "trime_")
    knn = {name: settings.pop(name) for name in list(settings) if name.startswith(ours)}
    if isinstance(knn.get("knn_datastore"), os.PathLike):
        knn["knn_datastore"] = os.fspath(knn["knn_datastore"])
    _check_settings(knn)
    places = os.fspath(model_name_or_path), checkpoint_file, os.fspath(data_name_or_path)
    _check_places(*places)
    loaded = hub_utils.from_pretrained(*places, **settings)
    cfg, models = loaded["args"], loaded["models"]
    with open_dict(cfg):
        cfg.task = {**cfg.task, **knn, "_name": "knnlm_lm"}
    task = tasks.setup_task(cfg.task, from_checkpoint=True)
    for model in models:
        refuse_broken_weights(model)
        if task.retriever is not None:
            refuse_other_model(task.retriever, model, weights_fingerprint(model))
    return hub_utils.GeneratorHubInterface(cfg, task, models)


def _check_settings(knn: dict) -> None:
    """Refuse ``knn_*`` settings that are unknown, of another type, or out of their range.

    Raises:
        UserError: naming all of them, what they may be and what came.
    """
    unknown = sorted(set(knn) - set(_KNOWN))
    if unknown:
        raise UserError(
            f"no setting of the hub interface: {', '.join(unknown)}; there are {', '.join(_KNOWN)}"
        )
    flags, faults = OmegaConf.structured(KNNLMConfig), []
    for name, value in knn.items():
        try:
            flags[name] = value
        except (OmegaConfBaseException, ValueError):
            faults.append(f"{name} must be {_expected(name)}, got {value!r}")
    if faults:
        raise UserError("; ".join(faults))
    check_settings(flags)


def _expected(name: str) -> str:
    """What a setting may be, in words."""
    kind = typing.get_type_hints(KNNLMConfig)[name]
    (kind,) = [each for each in typing.get_args(kind) or [kind] if each is not type(None)]
    if issubclass(kind, enum.Enum):
        return "one of " + ", ".join(str(value) for value in kind)
    return _KINDS[kind]


def _check_places(model: str, checkpoint_file: str, data: str) -> None:
    """Refuse files that are not there; those of an archive or behind a URL are fairseq's to find.

    Raises:
        UserError: naming the argument and the file.
    """
    _require_place("model_name_or_path", model)
    if os.path.isdir(model):
        for name in checkpoint_file.split(os.pathsep):
            if not os.path.isfile(os.path.join(model, name)):
                raise UserError(f"checkpoint_file: there is no {name!r} in {model}")
    elif data.startswith("."):  # in the archive
        return
    data = os.path.join(model, data) if data.startswith(".") else data
    _require_place("data_name_or_path", data)
    if os.path.isdir(data) and not os.path.isfile(os.path.join(data, "dict.txt")):
        raise UserError(
            "data_name_or_path must be a directory made by fairseq-preprocess, got "
            f"{data!r}, which has no dict.txt"
        )


def _require_place(argument: str, place: str) -> None:
    if not os.path.exists(place) and "://" not in place:
        raise UserError(f"{argument} must be a directory, an archive or a URL, got {place!r}")
