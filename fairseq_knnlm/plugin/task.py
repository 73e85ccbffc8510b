"""The task ``knnlm_lm``: fairseq's language modelling, evaluated with a datastore.

Wires the parts together: what the flags mean and open is in ``config`` and ``opening``.
"""

import functools
import logging
import os
from typing import Optional

import numpy as np
import torch.distributed as dist
from fairseq.data import iterators
from fairseq.tasks import register_task

from ..datastore.fingerprint import dictionary_fingerprint, weights_fingerprint
from ..encoding.blocks import BlockDataset, refuse_oversized
from ..encoding.chunks import SEARCH_TOKENS, blocks_before, share_of_text, tokens_of_search
from ..encoding.encode import learned_positions
from ..encoding.samples import ChunkCollater
from ..errors import UserError
from ..gating.gated_search import GatedSearch
from ..options import DEFAULT_KEY
from ..scoring.compatibility import (
    refuse_broken_weights,
    refuse_other_dictionary,
    refuse_other_model,
)
from ..scoring.in_effect import InEffect
from ..scoring.recorder import TokenRecorder
from ..scoring.scorer import KNNScorer, make_scorer
from ..scoring.settings import Settings
from ..scoring.trime_scorer import TrimeScorer
from .binarised import read_as, refuse_damaged_split
from .commands import end_with_text, is_command
from .compat import allow_plain_data, numpy_compat
from .config import KNNLMConfig, check_settings, unused_neighbor_flags
from .eval_lm_patch import use_scorer
from .generation import make_memories, refuse_generation
from .generator import KNNGenerator, KNNModel, ReferenceScorer
from .opening import open_datastores, refuse_other_decoders, refuse_other_models
from .results import evaluation_output
from .spinning import spin_little
from .training import TrainingTask
from .unknown_words import warn_of_unknown_words

logger = logging.getLogger(__name__)

# The hidden states of a chunk are kept, and so a chunk does not grow without bound.
_LEAST_SEARCHED = 0.25

# The import of --user-dir is early enough: no checkpoint has been read before it.
allow_plain_data()
# The first process of a command over several GPUs makes no task, so this is done here.
end_with_text()
if is_command():
    spin_little()


@register_task("knnlm_lm", dataclass=KNNLMConfig)
class KNNLMTask(TrainingTask):
    """Language modelling whose evaluation mixes in the nearest neighbours of a datastore.

    Without ``--knn-datastore`` it trains and evaluates as ``language_modeling`` does.

    Args:
        args: the flags, the task's part of fairseq's configuration.
        dictionary, output_dictionary, targets: as in ``LanguageModelingTask``.

    Attributes:
        in_effect (InEffect): settings of the search and the mixture, and where each comes from.
        settings (Settings): those settings: as given, else as tuned, else defaults.
        retriever (Retriever): searches the datastores; None without any.
        model_fingerprint (str): of the weights of the model that was loaded; None where nothing
            asks for it.
        gate (Gate): that was tuned, and weighs the neighbours of each token; None without one.

    Raises:
        UserError: if a datastore is not whole, or does not fit the flags or the dictionary.
    """

    def __init__(self, args, dictionary, output_dictionary=None, targets=None):
        super().__init__(args, dictionary, output_dictionary, targets)
        self._opened = open_datastores(args)
        self.in_effect = self._opened.in_effect
        self.settings, self.retriever = self.in_effect.settings, self._opened.retriever
        self.model_fingerprint: Optional[str] = None
        self._learned_positions: Optional[int] = None
        self._is_logged = False
        self.gate = self._opened.gate
        if self.retriever is not None:
            fingerprint = dictionary_fingerprint(self.target_dictionary)
            refuse_other_dictionary(self.retriever, fingerprint)

    @classmethod
    def setup_task(cls, args, **kwargs):
        """Set up the task; refuses settings and datastores that do not fit before any work.

        Args:
            args: the task's part of the command line.
            kwargs: as fairseq passes them.

        Raises:
            UserError: naming every flag that is wrong, or a datastore that does not fit.
        """
        check_settings(args)
        return super().setup_task(args, **kwargs)

    @classmethod
    def setup_dictionary(cls, args, **kwargs):
        """Read the dictionary, as fairseq does.

        Args:
            args, kwargs: as in ``setup_task``.

        Raises:
            UserError: if it is damaged.
        """
        path = os.path.join((args.data or "").split(os.pathsep)[0], "dict.txt")
        with read_as(path, "a dictionary"):
            return super().setup_dictionary(args, **kwargs)

    # -- settings ------------------------------------------------------------------------------

    def log_settings(self, in_effect: InEffect) -> None:
        """Log the settings in effect, once; and those tuned that are not.

        Args:
            in_effect (InEffect): those of the command that runs.
        """
        if not self._is_logged:
            self._is_logged = True
            for line in self._opened.lines(in_effect):
                logger.info(line)

    def settings_without_cache(self, what: str) -> InEffect:
        """What is in effect where there can be no cache, see ``Opened.without_cache``.

        Args:
            what (str): knows no cache, for the message.
        """
        return self._opened.without_cache(what)

    # -- models --------------------------------------------------------------------------------

    def build_model(self, args, from_checkpoint=False):
        """Build a model; one that is loaded is checked against the datastore once it has weights.

        Args:
            args: the model's part of the configuration.
            from_checkpoint (bool): whether it will be given the weights of a checkpoint.

        Raises:
            UserError: if it is no decoder-only language model.
        """
        refuse_other_models(args)
        model = super().build_model(args, from_checkpoint)
        if from_checkpoint:
            refuse_other_decoders(model)
            model.register_load_state_dict_post_hook(self._on_weights_loaded)
        return model

    def _on_weights_loaded(self, model, incompatible_keys):
        refuse_broken_weights(model)
        self._learned_positions = learned_positions(model)
        # before they are converted to half precision
        is_written = self.args.knn_output is not None or self.args.knn_output_tokens is not None
        if self.retriever is not None or is_written:
            self.model_fingerprint = weights_fingerprint(model)
        if self.retriever is not None:
            refuse_other_model(self.retriever, model, self.model_fingerprint)

    # -- data ----------------------------------------------------------------------------------

    def load_dataset(self, split, epoch=1, combine=False, **kwargs):
        """Load a split, with every break mode on every numpy.

        Args:
            split (str): of the data.
            epoch, combine, kwargs: as in fairseq.

        Raises:
            UserError: if it is empty or damaged, or there is none of that name.
        """
        folders = self.args.data.split(os.pathsep)
        prefix = os.path.join(folders[(epoch - 1) % len(folders)], split)
        refuse_damaged_split(prefix, len(self.dictionary))
        try:
            with numpy_compat(), read_as(prefix, "a split of binarised text"):
                super().load_dataset(split, epoch, combine, **kwargs)
        except FileNotFoundError:
            raise UserError(
                f"{self.args.data} has no split {split!r}: see --gen-subset and, of "
                "fairseq-knnlm-tune, --report-subset"
            ) from None

    def blocks(self, dataset, context_window: int) -> BlockDataset:
        """The blocks of a loaded split, each with its left context.

        Args:
            dataset: from ``load_dataset``.
            context_window (int): tokens of left context.

        Raises:
            UserError: if the task was set up for other targets than the next token.
        """
        if self.targets != ["future"]:
            raise UserError(
                "scoring needs next-token targets; drop --self-target, "
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
        """Iterate over chunks of blocks as samples, in order, loaded by worker processes.

        Args:
            blocks (BlockDataset): the text.
            chunks (iterable of range): blocks of each sample.
            max_tokens, batch_size (int): most tokens and most blocks of a batch.
            num_workers, data_buffer_size (int): as in fairseq.
            first_block (int): blocks before it are history.
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
        self.warn_of_no_neighbors()
        num_shards = settings.get("num_shards", 1)
        if num_shards > 1 and not (dist.is_available() and dist.is_initialized()):
            logger.warning(
                f"this is one process of {num_shards} without the others: its perplexity is of "
                f"share {settings.get('shard_id', 0)} alone, not of the split (without GPUs "
                "fairseq starts no others: see --distributed-no-spawn)"
            )
        self.log_settings(self.in_effect)
        output = evaluation_output(self, dataset, settings.get("context_window", 0), num_shards)
        if output is None:
            use_scorer(self.make_scorer)
        else:
            use_scorer(functools.partial(self.make_scorer, recorder=output.recorder), output.write)
        return self.evaluation_samples(dataset, **settings)

    def warn_of_no_neighbors(self) -> None:
        """Say where flags ask for neighbours that there is no datastore of."""
        flags = unused_neighbor_flags(self.args)
        if flags:
            logger.warning(
                f"{', '.join(flags)} without --knn-datastore: there are no neighbours, and these "
                "flags change nothing"
            )

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
        chunk_tokens=None,
    ):
        """Iterate over a split, or a contiguous share of it, for scoring.

        Args:
            dataset: from ``load_dataset``.
            max_tokens (int): most tokens of a batch of the model.
            batch_size (int): most blocks of a batch; None: any number.
            max_positions (int): longest input of the model; None: *max_tokens*.
            num_shards, shard_id (int): how many processes share the split, and which this is.
            num_workers, data_buffer_size (int): as in fairseq.
            context_window (int): tokens of left context of each block.
            chunk_tokens (int): targets of a sample; None: as many as the neighbours of the task's
                retriever leave room for.

        Raises:
            UserError: if a block is longer than the model or a batch takes.
        """
        blocks = self.blocks(dataset, context_window)
        refuse_oversized(blocks, max_positions or max_tokens, max_tokens, self._learned_positions)
        chunk_tokens = chunk_tokens or self._tokens_of_chunk()
        chunks = share_of_text(blocks.sizes, chunk_tokens, num_shards, shard_id)
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

    def _tokens_of_chunk(self) -> int:
        if self.retriever is None:
            return SEARCH_TOKENS
        # Searches that are not made leave room for more tokens: fewer queries of a search would
        # share the lists that are read for them.
        searched = max(1.0 - self.settings.skip, _LEAST_SEARCHED)
        return int(tokens_of_search(self.retriever.k) / searched)

    def make_scorer(
        self, softmax_batch: int = 0, recorder: Optional[TokenRecorder] = None
    ) -> KNNScorer:
        """The scorer that the flags ask for.

        Args:
            softmax_batch (int): ``--softmax-batch``.
            recorder (TokenRecorder): keeps what is computed of every target; None: nobody does.
        """
        arguments = (
            self.retriever,
            self.settings,
            self.key,
            self.target_dictionary.eos(),
            softmax_batch,
            self.target_dictionary.bos() if self.args.add_bos_token else None,
            recorder,
        )
        if self.settings.trime_temperature is not None:  # which nothing that is tuned goes with
            return TrimeScorer(*arguments)
        return make_scorer(*arguments, self._gated_search(self.settings))

    def _gated_search(self, settings: Settings) -> Optional[GatedSearch]:
        """The search through the gate that was tuned; None without one."""
        if self.gate is None:
            return None
        return GatedSearch(self.retriever, self.gate, settings.skip, bool(settings.cache_size))

    @property
    def key(self) -> dict:
        """The state that is compared: what the datastore's keys are, or what the flags say."""
        if self.retriever is not None:
            return self.retriever.key
        layer = -1 if self.args.knn_key_layer is None else self.args.knn_key_layer
        return {"type": str(self.args.knn_key or DEFAULT_KEY), "layer": layer}

    # -- generation ----------------------------------------------------------------------------

    def get_batch_iterator(self, *args, **kwargs):
        """Prompts, or texts to score or to train on, in batches, as fairseq makes them.

        Args:
            args, kwargs: as in fairseq.

        Raises:
            UserError: if one is too long for the model, or for a batch.
        """
        try:
            return super().get_batch_iterator(*args, **kwargs)
        except Exception as error:
            # fairseq says in words what is too long, in exceptions of no class of their own
            if type(error) in (Exception, AssertionError) and str(error):
                raise UserError(f"a text is too long: {error}") from error
            raise

    def build_dataset_for_inference(self, src_tokens, src_lengths, **kwargs):
        """Prompts, or texts to score, as a dataset; on every numpy. Unknown words are warned of.

        Args:
            src_tokens, src_lengths, kwargs: as in fairseq.
        """
        warn_of_unknown_words(self.source_dictionary, src_tokens)
        with numpy_compat():
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

        Args:
            models (list): of one model.
            args: settings of the generation.
            seq_gen_cls, extra_gen_cls_kwargs, prefix_allowed_tokens_fn: as in fairseq.

        Raises:
            UserError: for what cannot be done with neighbours.
        """
        stock = super().build_generator
        rest = (extra_gen_cls_kwargs, prefix_allowed_tokens_fn)
        self.warn_of_no_neighbors()
        in_effect = self.settings_without_cache("generation")
        settings = in_effect.settings
        wanted = getattr(args, "knn", True)
        weighs = settings.knn_lambda > 0 or self.gate is not None
        with_neighbors = wanted and self.retriever is not None and weighs
        refuse_generation(self.args, args, with_neighbors)
        self.log_settings(in_effect)
        if not with_neighbors:
            return stock(models, args, seq_gen_cls, *rest)
        mixture = self.retriever, settings, self._gated_search(settings)
        if getattr(args, "score_reference", False):
            return ReferenceScorer(self.target_dictionary, *mixture)
        memories = make_memories(
            self.args, args, self.retriever, settings, self.target_dictionary, self.gate
        )
        generator = functools.partial(KNNGenerator, memories=memories)
        return stock(KNNModel(models, *mixture), args, generator, *rest)
