"""When and with what a command ran, for a report: model, context and versions."""

import time

from ..plugin.results import versions
from ..search.faiss_import import faiss_version
from .command_line import context_settings


def describe_run(cfg, model) -> dict:
    """What ``reporting.report.write`` says beside the results.

    Args:
        cfg: fairseq's configuration.
        model: from ``load_task_and_model``.

    Returns:
        dict: ``date``, in UTC; ``model``, ``context`` and ``versions``, dicts of names and values.
    """
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "model": _model(cfg.common_eval.path, model),
        "context": context_settings(cfg),
        "versions": {**versions(), "faiss": faiss_version()},
    }


def _model(path: str, model) -> dict:
    layers = model.decoder.layers
    return {
        "checkpoint": path,
        "architecture": type(model).__name__,
        "layers": len(layers),
        "dimension": model.decoder.embed_dim,
        "feed_forward": layers[0].fc1.out_features,
        "heads": layers[0].self_attn.num_heads,
        "softmax": "full" if model.decoder.adaptive_softmax is None else "adaptive",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
