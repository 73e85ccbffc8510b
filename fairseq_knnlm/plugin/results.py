"""Results for machines: what ``--knn-output`` and ``--knn-output-tokens`` write.

All commands write the same keys for the same things. ``circumstances`` are those of what was run:
settings and where each comes from, model, data, datastores and versions.
"""

import os
import platform
from typing import Optional

import fairseq
import numpy as np
import torch

from ..datastore.datastore import Datastore
from ..datastore.fingerprint import file_fingerprint
from ..errors import UserError
from ..files import atomic_file, write_json
from ..probability.metrics import bits_per_byte, perplexity
from ..scoring.in_effect import InEffect
from ..scoring.recorder import TokenRecorder
from ..scoring.text_bytes import TextBytes
from ..version import __version__
from .stock_flags import whole_configuration


class EvaluationOutput:
    """The files that ``fairseq-eval-lm`` leaves.

    Args:
        task (KNNLMTask): whose flags name the files.
        dataset: the loaded split that is evaluated.
        context (dict): how it is cut into blocks and fed.

    Attributes:
        recorder (TokenRecorder): for the scorer.
    """

    def __init__(self, task, dataset, context: dict):
        self._task, self._context = task, context
        (self._split,) = [name for name, each in task.datasets.items() if each is dataset]
        self.recorder = TokenRecorder()

    def write(self, counted: int) -> None:
        """Write the files that the flags name.

        Args:
            counted (int): units of the text that perplexity is of: its targets, or the words that
                they are parts of.

        Raises:
            UserError: if one cannot be written, with the perplexity, which is not lost so.
        """
        args, columns = self._task.args, self.recorder.columns()
        summary = self._summary(counted, columns)
        try:
            if args.knn_output is not None:
                write_results(args.knn_output, summary)
            if args.knn_output_tokens is not None:
                _write_tokens(args.knn_output_tokens, columns)
        except UserError as error:
            found = f"perplexity is {summary['perplexity']:.2f} over {counted:,} tokens"
            raise UserError(f"{found}, but {error}") from None

    def _summary(self, counted: int, columns: dict) -> dict:
        log_p, log_p_lm, task = columns["log_p"], columns["log_p_lm"], self._task
        per_unit = len(log_p) / counted
        text_bytes = self._text_bytes(columns["targets"])
        return {
            "program": "fairseq-eval-lm",
            "split": self._split,
            "tokens": len(log_p),
            "counted": counted,
            "impossible": int(np.isneginf(log_p).sum()),
            "perplexity": perplexity(log_p, per_unit),
            "base_perplexity": perplexity(log_p_lm, per_unit),
            "bytes": text_bytes,
            "bits_per_byte": text_bytes and bits_per_byte(log_p, text_bytes),
            "base_bits_per_byte": text_bytes and bits_per_byte(log_p_lm, text_bytes),
            **circumstances(task, task.in_effect, self._context, self._split),
        }

    def _text_bytes(self, targets: np.ndarray) -> Optional[int]:
        """Bytes of the text; None where ``--remove-bpe`` does not say how tokens become text."""
        whole = whole_configuration(self._task.args)
        form = None if whole is None else whole.common_eval.post_process
        if form is None:
            return None
        text = TextBytes(self._task.target_dictionary, form)
        text.add(torch.from_numpy(targets))
        return text.total


def evaluation_output(
    task, dataset, context_window: int, num_shards: int
) -> Optional[EvaluationOutput]:
    """What ``--knn-output`` and ``--knn-output-tokens`` ask for; None: nothing.

    Args:
        task (KNNLMTask): of ``fairseq-eval-lm``.
        dataset: the loaded split that is evaluated.
        context_window (int): tokens of left context of each block.
        num_shards (int): how many processes share the split.

    Raises:
        UserError: if several do.
    """
    args = task.args
    if args.knn_output is None and args.knn_output_tokens is None:
        return None
    if num_shards > 1:
        raise UserError(
            "--knn-output and --knn-output-tokens are of a whole text, which no process of "
            f"{num_shards} sees: evaluate in one process"
        )
    context = {
        "tokens_per_sample": args.tokens_per_sample + context_window,
        "context_window": context_window,
        "sample_break_mode": str(args.sample_break_mode),
        "add_bos_token": args.add_bos_token,
    }
    return EvaluationOutput(task, dataset, context)


def _write_tokens(path: str, columns: dict) -> None:
    try:
        with atomic_file(path) as file:
            np.savez(file, **columns)
    except OSError as error:
        raise UserError(f"cannot write --knn-output-tokens {path}: {error}") from None


def write_results(path: str, results: dict) -> None:
    """Write the file of ``--knn-output``.

    Args:
        path (str): replaced if it is there.
        results (dict): what JSON can hold, and infinities, in whose place null is written.

    Raises:
        UserError: if it cannot be written.
    """
    try:
        write_json(path, results)
    except OSError as error:
        raise UserError(f"cannot write --knn-output {path}: {error}") from None


def _checkpoint(flags) -> Optional[str]:
    whole = whole_configuration(flags)
    return None if whole is None else whole.common_eval.path


def circumstances(task, in_effect: InEffect, context: dict, split: Optional[str] = None) -> dict:
    """What a command was run with, for JSON.

    Args:
        task (KNNLMTask): with a model loaded.
        in_effect (InEffect): its settings.
        context (dict): how the text is cut into blocks and fed.
        split (str): of the data; None: another text.
    """
    data = {"path": task.args.data}
    if split is not None:
        data.update(split=split, sha256=split_fingerprint(task.args.data, split))
    datastores = [] if task.retriever is None else task.retriever.datastores
    result = {
        "settings": in_effect.to_dict(),
        "gate": None if task.gate is None else task.gate.kind,
        "model": {"path": _checkpoint(task.args), "sha256": task.model_fingerprint},
        "data": data,
        "context": context,
        "datastores": list(map(description, datastores)),
        "versions": versions(),
    }
    if datastores:
        # Imported here, because a model alone needs no FAISS.
        from ..search.faiss_import import faiss_version

        result["versions"]["faiss"] = faiss_version()
    return result


def split_fingerprint(data: str, split: str) -> str:
    """SHA-256 of a binarised split.

    Args:
        data (str): ``DATA`` of the command line; of several folders the first counts.
        split (str): its name.
    """
    folder = data.split(os.pathsep)[0]
    return file_fingerprint(*(os.path.join(folder, f"{split}.{kind}") for kind in ("idx", "bin")))


def description(datastore: Datastore) -> dict:
    """What a datastore is, for JSON; None for what its builder left out of the manifest.

    Args:
        datastore (Datastore): an open one.
    """
    manifest = datastore.manifest
    names = ("checksum", "dimension", "key", "metric", "model", "dictionary", "data", "context")
    return {
        "path": datastore.path,
        "entries": len(datastore),
        **{name: manifest.get(name) for name in names},
        "index": manifest["index"]["factory"],
        "size_bytes": sum(entry["size_bytes"] for entry in manifest["files"].values()),
        "temperature": manifest.get("temperature", {}).get("value"),
        "versions": manifest.get("versions"),
    }


def versions() -> dict:
    """Of everything that decides the numbers, by name."""
    return {
        "fairseq_knnlm": __version__,
        "fairseq": fairseq.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
