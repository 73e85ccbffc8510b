"""What a whole split is tuned with: found by model and search, or read where it was kept."""

import logging
import os

import numpy as np
import torch

from ..context import document_starts
from ..errors import UserError
from ..fingerprint import file_fingerprint, weights_fingerprint
from ..neighbors_file import Retrieved, load, parts_of, refuse_other, save
from ..scorer import encode, encode_and_map
from . import common

logger = logging.getLogger("fairseq_knnlm.retrieval")


class Retrieval:
    """What is retrieved for a split; all that can be refused is, before any work.

    Args:
        cfg: the command's configuration.
        task (KNNLMTask), model: as ``common.load_task_and_model`` gives them.
        split (str): of the data.
        path (str): file of neighbours; read if it is there, else written. None: neither.
        keep_queries (bool): keep the hidden states as well.

    Attributes:
        split (str): of the data.
        settings (dict): everything that decides what is retrieved.

    Raises:
        UserError: if there is no such split, it has no known word, or the file is of others.
    """

    def __init__(self, cfg, task, model, split: str, path=None, keep_queries=False):
        self.split = split
        self._keep_queries = keep_queries
        self._cfg, self._task, self._model, self._path = cfg, task, model, path
        self._dataset = common.load_split(task, cfg, split)
        self._refuse_unknown_words()
        self.settings = self._settings()
        self._saved = path is not None and os.path.exists(path)
        if self._saved:
            refuse_other(path, self.settings)
        else:
            if path is not None:
                common.refuse_unwritable("--knn-neighbors", path)
            self._samples = common.evaluation_samples(cfg, task, model, self._dataset)

    def _refuse_unknown_words(self) -> None:
        dictionary = self._task.target_dictionary
        meaningless = torch.tensor([dictionary.unk(), dictionary.eos()])
        if all(
            torch.isin(self._dataset[index]["target"], meaningless).all()
            for index in range(len(self._dataset))
        ):
            raise UserError(
                f"fairseq_knnlm: every word of the split {self.split!r} is unknown "
                f"({dictionary.unk_word}): was {self._cfg.task.data} made by fairseq-preprocess "
                "with the --srcdict of the model's own data?"
            )

    def _settings(self) -> dict:
        retriever, extractor = self._task.retriever, self._task.extractor(self._model)
        datastores = [] if retriever is None else retriever.datastores
        folder = self._cfg.task.data.split(os.pathsep)[0]
        files = [os.path.join(folder, f"{self.split}.{kind}") for kind in ("idx", "bin")]
        settings = {
            "model": self._model_fingerprint(),
            "datastores": [each.manifest["checksum"] for each in datastores],
            "data": {"split": self.split, "sha256": file_fingerprint(*files)},
            "context": common.context_settings(self._cfg),
            "k": 0 if retriever is None else retriever.k,
            "nprobe": self._task.settings.nprobe,
            "distances": self._task.settings.distances,
        }
        if self._keep_queries:
            settings["queries"] = [extractor.key, extractor.layer]
        return settings

    def _model_fingerprint(self) -> str:
        if self._task.retriever is None:
            return weights_fingerprint(self._model)
        return self._task.retriever.datastores[0].manifest["model"]["sha256"]

    def run(self) -> Retrieved:
        """Find the neighbours, or read them."""
        if self._saved:
            logger.info(f"{self.split}: neighbours read from {self._path}")
            return load(self._path, self.settings["k"])
        retrieved = self._find()
        if self._path is not None:
            save(self._path, retrieved, self.settings)
            logger.info(f"{self.split}: neighbours written to {self._path}")
        return retrieved

    def _find(self) -> Retrieved:
        count, k = int(np.sum(self._dataset.sizes)), self.settings["k"]
        log_p_lm, distances = torch.empty(count), torch.empty(count, k)
        matches = torch.empty(count, k, dtype=torch.bool)
        targets = torch.empty(count, dtype=torch.long)
        parts = torch.empty(count, k, dtype=torch.uint8)
        queries = self._room_for_queries(count)
        device = next(self._model.parameters()).device
        progress = common.with_progress(self._cfg, self._samples, prefix=f"retrieve {self.split}")
        done = 0
        for number, sample in enumerate(progress, start=1):
            sample = common.to_device(sample, device)
            rows = slice(done, done + sample["ntokens"])
            targets[rows] = sample["target"]

            def keep(some, found, first=done):
                into = slice(first + some.start, first + some.stop)
                distances[into], values, ids = (part.cpu() for part in found)
                # a missing neighbour has a value as well
                matches[into] = (values == targets[into].unsqueeze(1)) & (ids >= 0)
                parts[into] = parts_of(ids)

            encoded = self._encode(sample, keep)
            log_p_lm[rows] = encoded.log_p_lm
            if queries is not None:
                queries[rows] = encoded.keys
            done = rows.stop
            progress.log({"tokens": done}, tag=f"retrieve_{self.split}", step=number)
        starts = self._document_starts(targets)
        return Retrieved(log_p_lm, distances, matches, targets, starts, parts, queries)

    def _room_for_queries(self, count: int):
        if not self._keep_queries:
            return None
        return torch.empty(count, self._task.extractor(self._model).dimension)

    def _encode(self, sample, keep):
        retriever, softmax_batch = self._task.retriever, self._cfg.eval_lm.softmax_batch
        if retriever is not None:
            return encode_and_map(self._model, sample, retriever, keep, softmax_batch)[0]
        with self._task.extractor(self._model) as extractor:
            return encode(self._model, sample, extractor, softmax_batch=softmax_batch)

    def _document_starts(self, targets) -> np.ndarray:
        starts = document_starts(targets.numpy(), self._task.target_dictionary.eos())
        blocks = self._task.document_starts(self._dataset)
        if blocks is None:
            return starts
        first_rows = np.cumsum(self._dataset.sizes) - self._dataset.sizes
        return np.union1d(starts, first_rows[blocks]).astype(np.int64)
