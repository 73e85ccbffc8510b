"""What a whole split is tuned with: collected by model and search, or read where it is kept."""

import itertools
import logging
import os
from typing import Optional

import numpy as np
import torch

from ..datastore.fingerprint import file_fingerprint
from ..encoding.key_extractor import extractor_of
from ..errors import UserError
from ..files import refuse_unwritable
from ..scoring.text_bytes import TextBytes
from ..scoring.words import Words
from ..tuning.collect import collect
from ..tuning.tuning_data import TuningData, load, refuse_other, save
from ..units import Count
from .command_line import Outputs, context_settings, with_progress
from .loading import Loaded, evaluation_samples, load_split

logger = logging.getLogger("fairseq_knnlm.tune")


class SplitData:
    """The ``TuningData`` of a split; what cannot be is refused before any work.

    Args:
        cfg: the command's configuration.
        loaded (Loaded): task and model, from ``load_task_and_model``.
        split (str): of the data.
        path (str): file of neighbours; read if it is there, else written. None: neither.
        keep_queries (bool): whether the hidden states are kept, for a continuous cache.
        keep_for_gate (bool): whether what a learned gate is fitted to is kept.

    Attributes:
        split (str): of the data.
        settings (dict): everything that decides what is retrieved.
        tokens (int): targets of the split.

    Raises:
        UserError: if there is no such split, it has no known word, or the file was made with other
            settings.
    """

    def __init__(
        self,
        cfg,
        loaded: Loaded,
        split: str,
        path: Optional[str] = None,
        keep_queries: bool = False,
        keep_for_gate: bool = False,
    ):
        self.split = split
        self._keep_queries, self._keep_for_gate = keep_queries or keep_for_gate, keep_for_gate
        self._cfg, self._path = cfg, path
        self._task, self._model, self._model_sha256 = loaded
        self._dataset = load_split(self._task, split)
        self.tokens = int(np.sum(self._dataset.sizes))
        self._refuse_unknown_words()
        post_process = cfg.common_eval.post_process
        self._words = None
        if post_process is not None:
            self._words = Words(self._task.source_dictionary, post_process)
        self.settings = self._settings()
        self._is_kept = path is not None and os.path.exists(path)
        if self._is_kept:
            refuse_other(path, self.settings)
        else:
            if path is not None:
                refuse_unwritable("--knn-neighbors", path)
            self._samples = evaluation_samples(cfg, self._task, self._model, self._dataset)

    def word_starts(self, data: TuningData) -> Optional[np.ndarray]:
        """Rows at which the words of ``--remove-bpe`` begin; None where tokens count."""
        if self._words is None:
            return None
        return self._words.starts(data.targets, self._dataset.sizes)

    def text_bytes(self, data: TuningData) -> Optional[int]:
        """Bytes of the text; None without ``--remove-bpe``, or where it has unknown words."""
        if self._words is None:
            return None
        text = TextBytes(self._task.source_dictionary, self._cfg.common_eval.post_process)
        text.add(data.targets)
        return text.total

    def _refuse_unknown_words(self) -> None:
        dictionary = self._task.target_dictionary
        meaningless = torch.tensor([dictionary.unk(), dictionary.eos()])
        if all(
            torch.isin(self._dataset[index]["target"], meaningless).all()
            for index in range(len(self._dataset))
        ):
            raise UserError(
                f"every word of the split {self.split!r} is unknown ({dictionary.unk_word}): was "
                f"{self._cfg.task.data} made by fairseq-preprocess with the --srcdict of the "
                "model's own data?"
            )

    def _settings(self) -> dict:
        retriever = self._task.retriever
        datastores = [] if retriever is None else retriever.datastores
        folder = self._cfg.task.data.split(os.pathsep)[0]
        files = [os.path.join(folder, f"{self.split}.{kind}") for kind in ("idx", "bin")]
        settings = {
            "model": self._model_sha256,
            "datastores": [datastore.manifest["checksum"] for datastore in datastores],
            "data": {"split": self.split, "sha256": file_fingerprint(*files)},
            "context": context_settings(self._cfg),
            "k": 0 if retriever is None else retriever.k,
            "nprobe": self._task.settings.nprobe,
            "distances": self._task.settings.distances,
        }
        if self._keep_queries:
            extractor = extractor_of(self._model, self._task.key)
            settings["queries"] = [extractor.key, extractor.layer]
        if self._keep_for_gate:
            settings["for_gate"] = True
        return settings

    def obtain(self, outputs: Outputs) -> TuningData:
        """Collect it, and keep it if a file was named, or read it.

        Args:
            outputs (Outputs): of the command; it goes on if the file cannot be written.
        """
        if self._is_kept:
            logger.info(f"{self.split}: neighbours read from {self._path}")
            return load(self._path, self.settings["k"], len(self._task.target_dictionary))
        data = self._collect()
        if self._path is not None:
            with outputs.writing(f"--knn-neighbors {self._path}"):
                save(self._path, data, self.settings)
                logger.info(f"{self.split}: neighbours written to {self._path}")
        return data

    def _collect(self) -> TuningData:
        progress = with_progress(self._cfg, self._samples, prefix=f"retrieve {self.split}")
        steps = itertools.count(1)
        return collect(
            self._model,
            progress,
            self.tokens,
            self._task.target_dictionary.eos(),
            self._task.retriever,
            self._task.key,
            self._keep_queries,
            self._cfg.eval_lm.softmax_batch,
            lambda tokens: progress.log(
                {"tokens": Count(tokens)}, tag=f"retrieve_{self.split}", step=next(steps)
            ),
            self._keep_for_gate,
        )
