"""The task ``knnlm_lm``: fairseq's language modelling, evaluated with a datastore.

Wires the parts together; besides ``cli/`` the only place that knows fairseq's configuration.
"""

import contextlib
import logging
import os
import types

import numpy as np
import torch.distributed as dist
from fairseq import models
from fairseq.data import iterators
from fairseq.models import FairseqLanguageModel
from fairseq.models.transformer import TransformerDecoderBase
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingTask

from .checkpoints import allow_plain_data
from .config import (
    AUTO,
    KNNLMConfig,
    Settings,
    check_settings,
    datastore_paths,
    given_settings,
    refuse_other_than_tuned,
)
from .context import BlockDataset, ChunkCollater, refuse_oversized, shard, split_evenly
from .errors import UserError
from .eval_lm import use_scorer
from .fingerprint import dictionary_fingerprint, weights_fingerprint
from .scorer import KNNScorer
from .tuned import SETTINGS, tuned_for

logger = logging.getLogger(__name__)

# the import of --user-dir is early enough: before any checkpoint is read
allow_plain_data()

# Target tokens of a chunk: as many as can be, since a search over it reads all keys once, ...
CHUNK_TOKENS = 1 << 16
# ... and few enough that the neighbours of all of them fit in this many bytes.
NEIGHBORS_BYTES = 1 << 30
# of two to three keys and distances for each, from which the nearest are taken
_BYTES_PER_NEIGHBOR = 24


@register_task("knnlm_lm", dataclass=KNNLMConfig)
class KNNLMTask(LanguageModelingTask):
    """Language modelling whose evaluation mixes in the nearest neighbours of a datastore.

    Without ``--knn-datastore`` it trains and evaluates as ``language_modeling`` does.

    Attributes:
        retriever (Retriever): searches the datastores; None without any.
        settings (Settings): of the search and the mixture: as given, else as tuned, else defaults.
    """

    def __init__(self, args, dictionary, output_dictionary=None, targets=None):
        super().__init__(args, dictionary, output_dictionary, targets)
        self.retriever = None
        self.settings = Settings(**given_settings(args))

    @classmethod
    def setup_task(cls, args, **kwargs):
        """Set up the task; refuses settings and datastores that do not fit before any work."""
        check_settings(args)
        task = super().setup_task(args, **kwargs)
        paths = datastore_paths(args)
        if paths:
            # imported here because training needs no FAISS
            from .retriever import Retriever

            if args.knn_tuned:
                tuned = tuned_for(paths)
                refuse_other_than_tuned(args, tuned)
                task.settings = Settings(**{name: tuned[name] for name in SETTINGS})
            task.retriever = Retriever.open(
                paths,
                k=task.settings.k,
                nprobe=task.settings.nprobe,
                distances=task.settings.distances,
                device=str(args.knn_device),
                expected={
                    "--knn-key": args.knn_key,
                    "--knn-key-layer": args.knn_key_layer,
                    "--knn-metric": args.knn_metric,
                    "--knn-index": args.knn_index,
                },
            )
            task.retriever.check_dictionary(dictionary_fingerprint(task.target_dictionary))
            if task.settings.temperature == AUTO:
                temperature = starting_temperature(task.retriever.datastores[0])
                task.settings = task.settings._replace(temperature=temperature)
        return task

    # -- models --------------------------------------------------------------------------------

    def build_model(self, args, from_checkpoint=False):
        """Build a model; one that is loaded is checked against the datastore once it has weights.

        Raises:
            UserError: if it is no decoder-only language model.
        """
        _refuse_other_models(args)
        model = super().build_model(args, from_checkpoint)
        if from_checkpoint:
            _refuse_other_decoders(model)
            model.register_load_state_dict_post_hook(self._on_weights_loaded)
        return model

    def _on_weights_loaded(self, model, incompatible_keys):
        if self.retriever is not None:
            self.retriever.check_model(model, weights_fingerprint(model))

    # -- data ----------------------------------------------------------------------------------

    def load_dataset(self, split, epoch=1, combine=False, **kwargs):
        """Load a split, with every break mode on every numpy.

        Raises:
            UserError: if it is empty.
        """
        for folder in self.args.data.split(os.pathsep):
            binary = os.path.join(folder, f"{split}.bin")
            if os.path.exists(binary) and os.path.getsize(binary) == 0:
                raise UserError(
                    f"fairseq_knnlm: {binary} is empty: the split {split!r} has no text"
                )
        with _numpy_compat():
            super().load_dataset(split, epoch, combine, **kwargs)

    def blocks(self, dataset, context_window: int) -> BlockDataset:
        """The blocks of a loaded split, each with its left context.

        Args:
            dataset: from ``load_dataset``.
            context_window (int): tokens of left context.
        """
        if self.targets != ["future"]:
            raise UserError(
                "fairseq_knnlm: scoring needs next-token targets; drop --self-target, "
                "--past-target and --future-target"
            )
        return BlockDataset(
            dataset,
            dataset.sizes,
            pad=self.source_dictionary.pad(),
            context_window=context_window,
            max_length=self.args.tokens_per_sample + context_window,
            document_starts=self.document_starts(dataset),
            bos=self.args.add_bos_token,
        )

    def document_starts(self, dataset):
        """Which blocks of a loaded split begin a document, where blocks keep to documents.

        Returns:
            ndarray: shape (M,), bool; None in the other break modes.
        """
        if str(self.args.sample_break_mode) != "complete_doc":
            return None
        slices = dataset.dataset.slice_indices
        # separators between documents belong to no block
        starts = np.ones(len(slices), dtype=bool)
        starts[1:] = slices[1:, 0] != slices[:-1, 1]
        return starts

    def chunk_iterator(
        self, blocks, chunks, max_tokens, batch_size, num_workers=0, data_buffer_size=0
    ):
        """Iterate over chunks of blocks as samples, in order, loaded by *num_workers* processes."""
        return iterators.EpochBatchIterator(
            dataset=blocks,
            collate_fn=ChunkCollater(blocks.pad, max_tokens, batch_size),
            batch_sampler=[list(chunk) for chunk in chunks],
            num_workers=num_workers,
            buffer_size=data_buffer_size,
        ).next_epoch_itr(shuffle=False)

    def eval_lm_dataloader(self, dataset, **settings):
        """What ``fairseq-eval-lm`` iterates over; called by it right before it scores."""
        num_shards = settings.get("num_shards", 1)
        if num_shards > 1 and not (dist.is_available() and dist.is_initialized()):
            logger.warning(
                f"this is one process of {num_shards} without the others: its perplexity is of "
                f"share {settings.get('shard_id', 0)} alone, not of the split (without GPUs "
                "fairseq starts no others: see --distributed-no-spawn)"
            )
        use_scorer(self.make_scorer)
        return self.evaluation_samples(dataset, **settings)

    def evaluation_samples(
        self,
        dataset,
        max_tokens=36000,
        batch_size=None,
        max_positions=None,
        num_shards=1,
        shard_id=0,
        num_workers=1,
        data_buffer_size=10,
        context_window=0,
    ):
        """Iterate over a split, or a contiguous share of it, for scoring.

        Raises:
            UserError: if a block is longer than the model or a batch takes.
        """
        blocks = self.blocks(dataset, context_window)
        refuse_oversized(blocks, max_positions or max_tokens, max_tokens)
        # every shard gets its share, also of a short text, and none a small rest
        per_shard = -(-int(blocks.sizes.sum()) // (num_shards * self._chunk_tokens()))
        chunks = split_evenly(blocks.sizes, num_shards * max(1, per_shard))
        chunks = shard(chunks, num_shards, shard_id)
        return self.chunk_iterator(
            blocks, chunks, max_tokens, batch_size, num_workers, data_buffer_size
        )

    def _chunk_tokens(self) -> int:
        if self.retriever is None:
            return CHUNK_TOKENS
        fitting = NEIGHBORS_BYTES // (_BYTES_PER_NEIGHBOR * self.retriever.k)
        return max(1, min(CHUNK_TOKENS, fitting))

    def make_scorer(self, softmax_batch=0) -> KNNScorer:
        """The scorer that the flags ask for."""
        return KNNScorer(
            softmax_batch=softmax_batch,
            # lambda = 0 needs no neighbours, only the check that they are this model's
            retriever=self.retriever if self.settings.knn_lambda > 0 else None,
            knn_lambda=self.settings.knn_lambda,
            temperature=self.settings.temperature,
            bos=self.target_dictionary.bos() if self.args.add_bos_token else None,
        )


def starting_temperature(datastore) -> float:
    """What ``--knn-temperature auto`` stands for.

    Raises:
        UserError: if the datastore was built by a release that recorded none.
    """
    recorded = datastore.manifest.get("temperature")
    if recorded is None:
        raise UserError(
            f"fairseq_knnlm: --knn-temperature auto: the datastore {datastore.path} records no "
            "temperature: build it again with this release, or give a number"
        )
    return recorded["value"]


@contextlib.contextmanager
def _numpy_compat():
    """Lend numpy 2 the name ``np.compat.long``, without which fairseq fails in break mode eos."""
    if hasattr(np, "compat"):
        yield
        return
    np.compat = types.SimpleNamespace(long=np.int64)
    try:
        yield
    finally:
        del np.compat


def _refuse_other_models(args) -> None:
    name = getattr(args, "_name", None) or getattr(args, "arch", None)
    cls = models.MODEL_REGISTRY.get(name) or models.ARCH_MODEL_REGISTRY.get(name)
    if cls is not None and not issubclass(cls, FairseqLanguageModel):
        raise UserError(
            f"fairseq_knnlm: the checkpoint's architecture {name} is no decoder-only language "
            "model; expected one of the transformer_lm family"
        )


def _refuse_other_decoders(model) -> None:
    if not isinstance(model.decoder, TransformerDecoderBase):
        raise UserError(
            f"fairseq_knnlm: the checkpoint's decoder, a {type(model.decoder).__name__}, is no "
            "transformer; expected a model of the transformer_lm family (--task language_modeling "
            "evaluates others, without neighbours)"
        )
