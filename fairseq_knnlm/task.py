"""The task ``knnlm_lm``: fairseq's language modelling, evaluated with a datastore.

Wires the parts together; besides ``cli/`` the only place that knows fairseq's configuration.
"""

import contextlib
import functools
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

from .cache import ContinuousCache
from .checkpoints import allow_plain_data
from .config import (
    AUTO,
    DEFAULT_KEY,
    KNNLMConfig,
    Settings,
    check_settings,
    datastore_paths,
    given_settings,
    refuse_other_than_tuned,
)
from .context import (
    BlockDataset,
    ChunkCollater,
    blocks_before,
    refuse_oversized,
    shard,
    split_evenly,
)
from .errors import UserError
from .eval_lm import use_scorer
from .fingerprint import dictionary_fingerprint, weights_fingerprint
from .generator import KNNGenerator, KNNModel, ReferenceScorer
from .inspection import Inspector
from .key_extractor import KeyExtractor
from .memories import Memories
from .scorer import CacheReader, KNNScorer
from .tuned import tuned_for

logger = logging.getLogger(__name__)

# the import of --user-dir is early enough: before any checkpoint is read
allow_plain_data()

# Target tokens of a chunk: as many as can be, since a search over it reads all keys once, ...
CHUNK_TOKENS = 3 << 15
# ... and few enough that the neighbours of all of them fit in this many bytes.
NEIGHBORS_BYTES = 3 << 29
# of two keys and distances for each, from which the nearest are taken
_BYTES_PER_NEIGHBOR = 16


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
                known = {name: tuned[name] for name in Settings._fields if name in tuned}
                task.settings = Settings(**known)
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
        self,
        blocks,
        chunks,
        max_tokens,
        batch_size,
        num_workers=0,
        data_buffer_size=0,
        first_block=0,
    ):
        """Iterate over chunks of blocks as samples, in order, loaded by *num_workers* processes.

        Blocks before *first_block* are history.
        """
        return iterators.EpochBatchIterator(
            dataset=blocks,
            collate_fn=ChunkCollater(blocks.pad, max_tokens, batch_size, first_block),
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
        first_block = chunks[0].start if chunks else 0
        history = blocks_before(blocks.sizes, first_block, self.settings.cache_size)
        return self.chunk_iterator(
            blocks,
            [history, *chunks] if history else chunks,
            max_tokens,
            batch_size,
            num_workers,
            data_buffer_size,
            first_block,
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
            cache=self._make_cache(),
            bos=self.target_dictionary.bos() if self.args.add_bos_token else None,
        )

    def _make_cache(self):
        """The continuous cache that the flags ask for, or None."""
        settings = self.settings
        if not settings.cache_size:
            return None
        thetas = None if settings.cache_theta is None else [settings.cache_theta]
        cache = ContinuousCache([settings.cache_size], thetas, settings.cache_metric)
        keep_apart = settings.cache_reset == "document"
        eos = self.target_dictionary.eos() if keep_apart else None
        return CacheReader(cache, self.extractor, settings.cache_lambda, eos)

    def extractor(self, model):
        """An extractor of the states that are compared: what the datastore's keys are, or flags."""
        if self.retriever is not None:
            return self.retriever.extractor(model)
        layer = -1 if self.args.knn_key_layer is None else self.args.knn_key_layer
        return KeyExtractor(model.decoder, str(self.args.knn_key or DEFAULT_KEY), layer)

    # -- generation ----------------------------------------------------------------------------

    def build_dataset_for_inference(self, src_tokens, src_lengths, **kwargs):
        """Prompts, or texts to score, as a dataset; on every numpy."""
        with _numpy_compat():
            return super().build_dataset_for_inference(src_tokens, src_lengths, **kwargs)

    def build_generator(
        self,
        models,
        args,
        seq_gen_cls=None,
        extra_gen_cls_kwargs=None,
        prefix_allowed_tokens_fn=None,
    ):
        """What fairseq-generate, fairseq-interactive and the hub interface generate or score with.

        Without a datastore or with lambda = 0 it is fairseq's own; so it is with ``args.knn``
        False, which the hub interface sets by ``sample(text, knn=False)``.

        Raises:
            UserError: for what cannot be done with neighbours.
        """
        stock = super().build_generator
        rest = (extra_gen_cls_kwargs, prefix_allowed_tokens_fn)
        self._refuse_generation(args)
        if not self._generates_with_neighbors(args):
            return stock(models, args, seq_gen_cls, *rest)
        mixture = {
            "retriever": self.retriever,
            "knn_lambda": self.settings.knn_lambda,
            "temperature": self.settings.temperature,
        }
        if getattr(args, "score_reference", False):
            return ReferenceScorer(self.target_dictionary, **mixture)
        generator = functools.partial(KNNGenerator, memories=self._make_memories(args))
        return stock(KNNModel(models, **mixture), args, generator, *rest)

    def _generates_with_neighbors(self, args) -> bool:
        wanted = getattr(args, "knn", True)
        return wanted and self.retriever is not None and self.settings.knn_lambda > 0

    def _refuse_generation(self, args) -> None:
        faults = []
        if self.settings.cache_size:
            faults.append(
                "the continuous cache is for fairseq-eval-lm: drop --knn-cache-size, or the "
                "--knn-tuned that chose one"
            )
        if not self._generates_with_neighbors(args):
            if self.args.knn_show_neighbors:
                faults.append("--knn-show-neighbors needs --knn-datastore and --knn-lambda above 0")
        elif getattr(args, "print_alignment", None):
            faults.append("--print-alignment: a language model has no source to align with")
        elif getattr(args, "constraints", None):
            faults.append("--constraints: fairseq has them for translation only")
        if faults:
            raise UserError(f"fairseq_knnlm: {'; '.join(faults)}")

    def _make_memories(self, args):
        """What ``--knn-show-neighbors`` asks for, or None."""
        if not self.args.knn_show_neighbors:
            return None
        datastores = self.retriever.datastores
        inspector = Inspector(
            datastores,
            self.target_dictionary,
            self.settings.knn_lambda,
            self.settings.temperature,
            self.args.knn_show_neighbors,
        )
        return Memories(inspector, args.nbest, len(datastores))


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
