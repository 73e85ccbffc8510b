"""A language model and its datastore in Python: fairseq's hub interface, with neighbours."""

from fairseq import hub_utils, tasks
from omegaconf import open_dict

from .config import KNNLMConfig
from .errors import UserError
from .fingerprint import weights_fingerprint

# printed by fairseq's commands; the hub interface prints nothing
_NOT_HERE = ("knn_show_neighbors",)


def from_pretrained(
    model_name_or_path, checkpoint_file="model.pt", data_name_or_path=".", **settings
):
    """Load a language model, of whichever task, with the datastore that was built of it.

    As ``from_pretrained`` of fairseq's models, with ``--knn-*`` settings.

    Args:
        model_name_or_path (str): directory of the checkpoint.
        checkpoint_file (str): its name.
        data_name_or_path (str): directory of ``dict.txt``; beginning with ".", from the
            checkpoint's.
        settings: ``knn_datastore``, ``knn_k``, ``knn_lambda``, ``knn_temperature`` and the other
            flags by these names; all others, as ``tokenizer="moses"``, are fairseq's.

    Returns:
        GeneratorHubInterface: fairseq's. ``score(text)`` gives ``positional_scores`` (natural log)
        of its tokens, ``sample(text, beam=5, ...)`` continues it. Either takes ``knn=False``, which
        leaves the neighbours out of this call.

    Raises:
        UserError: for settings that cannot be, or a datastore of another model or dictionary.

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
    knn = {name: settings.pop(name) for name in list(settings) if name.startswith("knn_")}
    known = [name for name in KNNLMConfig.__dataclass_fields__ if name.startswith("knn_")]
    unknown = sorted(set(knn) - set(known) | set(knn) & set(_NOT_HERE))
    if unknown:
        raise UserError(
            f"fairseq_knnlm: no setting of the hub interface: {', '.join(unknown)}; there are "
            f"{', '.join(name for name in known if name not in _NOT_HERE)}"
        )
    loaded = hub_utils.from_pretrained(
        model_name_or_path, checkpoint_file, data_name_or_path, **settings
    )
    cfg, models = loaded["args"], loaded["models"]
    with open_dict(cfg):
        cfg.task = {**cfg.task, **knn, "_name": "knnlm_lm"}
    task = tasks.setup_task(cfg.task, from_checkpoint=True)
    for model in models:
        if task.retriever is not None:
            task.retriever.check_model(model, weights_fingerprint(model))
    return hub_utils.GeneratorHubInterface(cfg, task, models)
