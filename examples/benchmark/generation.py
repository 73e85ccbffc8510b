"""Generation: what a decoding step costs with neighbours and without."""

import argparse

import torch
from timing import Stopwatch, interleaved, median, was_held_up

from fairseq_knnlm.cli.loading import max_positions
from fairseq_knnlm.plugin.generator import KNNGenerator, KNNModel
from fairseq_knnlm.plugin.task import KNNLMTask
from fairseq_knnlm.search.retriever import Retriever

WAYS = {
    "beam of 5": {"beam": 5},
    "sampling": {"beam": 1, "sampling": True, "sampling_topk": 50},
}
PROMPTS, PROMPT_TOKENS = 2, 8
_SEED = 1


def measure_generation(evaluation, datastore, settings):
    """Speed of ``fairseq-interactive``, one prompt at a time, of the model alone and with each k.

    Every text is as long as any other, so that all take as many steps.

    Args:
        evaluation (Evaluation): the model, and the text that prompts are taken from.
        datastore (dict): of the largest datastore, from ``make_datastores``.
        settings (Namespace): of the command line.

    Returns:
        list of dict: a row for each.
    """
    retrievers = {
        k: Retriever.open(
            [datastore["path"]], k=k, nprobe=settings.knn_nprobe, device=settings.knn_device
        )
        for k in settings.k
    }
    prompts = evaluation.prompts(PROMPTS, PROMPT_TOKENS)
    longest = max_positions(evaluation.model) - 1
    length = min(PROMPT_TOKENS + settings.generated, longest)
    measurements = {
        (way, k): _generating(evaluation, prompts, length, retrievers.get(k), WAYS[way])
        for way in WAYS
        for k in (None, *settings.k)
    }
    rows = []
    for (way, k), runs in interleaved(measurements, settings.repeats).items():
        step_ms = 1e3 * median(runs, "seconds") / runs[0]["tokens"]
        if k is None:
            alone_ms = step_ms
        rows.append(
            {
                "name": way,
                "k": k,
                "entries": datastore["entries"] if k else None,
                "tokens": runs[0]["tokens"],
                "tokens_per_s": 1e3 / step_ms,
                "of_alone": alone_ms / step_ms,
                "knn_ms_per_step": step_ms - alone_ms,
                "runs_s": [run["seconds"] for run in runs],
                "held_up": was_held_up(runs),
            }
        )
    return rows


def _generating(evaluation, prompts, length, retriever, way):
    """A measurement of generating *length* tokens and ``</s>`` from each prompt."""
    task, model = evaluation.task, evaluation.model
    arguments = argparse.Namespace(max_len_b=length, min_len=length, **way)
    stock = super(KNNLMTask, task).build_generator
    if retriever is None:
        generator = stock([model], arguments)
    else:
        mixture = KNNModel([model], retriever, task.settings)
        generator = stock(mixture, arguments, KNNGenerator)

    def generate():
        torch.manual_seed(_SEED)
        stopwatch = Stopwatch(evaluation.clock)
        found = [task.inference_step(generator, [model], prompt) for prompt in prompts]
        tokens = sum(len(hypotheses[0]["tokens"]) for (hypotheses,) in found)
        return {**stopwatch.read(), "tokens": tokens}

    generate()  # loads the index, warms up
    return generate
