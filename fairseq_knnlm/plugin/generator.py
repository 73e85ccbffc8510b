"""Generation with neighbours: what ``task.build_generator`` gives to fairseq's commands and hub.

Every decoding step mixes p_lm with p_knn over the whole vocabulary (Khandelwal et al., 2020, Eqs. 2
and 3), with one search for all beams of the batch, and is fairseq's own otherwise: beam search,
sampling, prefixes and penalties see the mixture in place of p_lm.
"""

import logging
from typing import TYPE_CHECKING, Optional

from fairseq import utils
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator

from ..encoding.confidence import of_log_probs
from ..encoding.encode import encode
from ..encoding.key_extractor import extractor_of
from ..encoding.samples import sample_of
from ..errors import UserError
from ..gating.gated_search import Gated, GatedSearch, looked, looks_before
from ..gating.ngram_counts import ORDERS
from ..probability.knn import vocabulary_log_probs
from ..probability.mixture import mix
from ..scoring.compatibility import refuse_ensemble
from ..scoring.scorer import KNNScorer
from ..scoring.settings import Settings
from .print_patch import Memories

if TYPE_CHECKING:  # FAISS is loaded where a datastore is opened: training needs none
    from ..search.retriever import Retriever

logger = logging.getLogger(__name__)


class KNNModel(EnsembleModel):
    """A language model and its neighbours, as fairseq's ``SequenceGenerator`` asks a model.

    Args:
        models (list): of one fairseq decoder-only language model.
        retriever (Retriever): searches the datastore.
        settings (Settings): the weight of p_knn, below 1, and the temperature.
        gated (GatedSearch): searches in place of the retriever and weighs each token; None: the
            weight of *settings* is that of all tokens.

    Raises:
        UserError: for an ensemble of models, or a lambda of 1, with which a hypothesis could be
            unable to end.
    """

    def __init__(
        self,
        models: list,
        retriever: "Retriever",
        settings: Settings,
        gated: Optional[GatedSearch] = None,
    ):
        refuse_ensemble(len(models))
        if settings.knn_lambda == 1.0 and gated is None:
            raise UserError(
                "generation needs a --knn-lambda below 1, got 1: words that no "
                "neighbour has, in a prompt or as the </s> at --max-len-b, would be impossible"
            )
        super().__init__(models)
        self.retriever = retriever
        self.gated = gated
        self._settings = settings

    def forward_decoder(self, tokens, encoder_outs, incremental_states, temperature=1.0):
        """Distribution of the token after each row of *tokens*.

        Args:
            tokens (LongTensor): shape (N, t), the sentences of the batch times the beam, so far.
            encoder_outs (list): empty, a language model has no encoder.
            incremental_states (list of dict): fairseq's, of the model.
            temperature (float): tau > 0 of ``--temperature``: p^(1 / tau) of the mixture,
                normalised.

        Returns:
            tuple: log-probabilities, shape (N, V), float64, natural log, and None (no attention).
        """
        with extractor_of(self.single_model, self.retriever.key) as extractor:
            log_p_lm, attention = super().forward_decoder(tokens, encoder_outs, incremental_states)
            queries = extractor.keys[-1]  # (T, N, D) to (N, D)
        if self.gated is None:
            neighbors = self.retriever.search(queries)
            log_p_knn = vocabulary_log_probs(
                neighbors.distances, neighbors.values, log_p_lm.size(1), self._settings.temperature
            )
            knn_lambda = self._settings.knn_lambda
        else:
            log_p_knn, knn_lambda, _ = self._gated_log_p_knn(queries, log_p_lm, tokens)
        log_p = mix(log_p_lm, log_p_knn, knn_lambda=knn_lambda)
        if temperature != 1.0:
            log_p = (log_p / temperature).log_softmax(dim=1)
        # fairseq reports a token's score as the difference of two sums over the text. In float32 it
        # would be wrong by 1e-4 after some hundred tokens.
        return log_p.double(), attention

    def _gated_log_p_knn(self, queries, log_p_lm, tokens) -> Gated:
        """log p_knn of the vocabulary, shape (N, V), and the weight of each row."""

        def log_probs(rows, neighbors, temperature):
            distances, values, _ = neighbors
            return vocabulary_log_probs(distances, values, log_p_lm.size(1), temperature)

        contexts = tokens.new_full((len(tokens), ORDERS), -1)
        latest = tokens[:, -ORDERS:].flip(1)
        contexts[:, : latest.size(1)] = latest
        confidence = of_log_probs(log_p_lm, self.single_model.decoder.adaptive_softmax)
        before = self.gated.gate.look(queries, confidence, contexts)
        return self.gated.search(queries, before, log_probs)


class KNNGenerator(SequenceGenerator):
    """fairseq's generator over a ``KNNModel``; it warns of prompts that fairseq cuts.

    Args:
        memories (Memories): takes the memories of what was generated; None: they are not printed.
        arguments, options: of ``SequenceGenerator``.
    """

    def __init__(self, *arguments, memories: Optional[Memories] = None, **options):
        super().__init__(*arguments, **options)
        self._memories = memories

    def generate(self, models, sample, prefix_tokens=None, bos_token=None, **kwargs):
        """Generate as ``SequenceGenerator.generate`` does; a warning says where a prompt is cut.

        Args:
            models (list): of one fairseq decoder-only language model.
            sample (dict): fairseq's, of prompts.
            prefix_tokens (LongTensor): shape (B, t), padded on the right; None without prompts.
            bos_token (int): id of the token that a text begins with; None: ``</s>``.
            kwargs: as fairseq passes them.

        Returns:
            list of list of dict: the hypotheses of each sentence, best first.
        """
        sizes = [0] * len(sample["net_input"]["src_tokens"])
        if prefix_tokens is not None:
            sizes = prefix_tokens.ne(self.pad).sum(dim=1).tolist()
        self._warn_if_cut(max(sizes, default=0), sample)
        generated = super().generate(
            models, sample, prefix_tokens=prefix_tokens, bos_token=bos_token, **kwargs
        )
        if self._memories is not None:
            bos = self.eos if bos_token is None else bos_token
            for hypotheses, size in zip(generated, sizes):
                for hypothesis in hypotheses[: self._memories.nbest]:
                    self._remember(hypothesis, bos, size)
        return generated

    def _warn_if_cut(self, size, sample):
        fed = sample["net_input"]["src_tokens"].size(1)
        most = min(int(self.max_len_a * fed + self.max_len_b), self.max_len - 1)
        if most < self.min_len and not self.match_source_len:
            raise UserError(
                f"--min-len {self.min_len} is more than --max-len-a, --max-len-b and the model's "
                f"longest text leave for a prompt of {size} tokens, which is {most}"
            )
        if size > most:
            logger.warning(
                f"a prompt of {size} tokens is cut after {most}, and nothing is generated behind "
                "it: raise --max-len-b, as far as the model's longest text allows"
            )

    def _remember(self, hypothesis, bos, prompt_size):
        """Hand over the memories of a hypothesis; one search more, for all its tokens."""
        tokens = hypothesis["tokens"]
        source = tokens.roll(1)
        source[0] = bos
        model, retriever = self.model.single_model, self.model.retriever
        gate = None if self.model.gated is None else self.model.gated.gate
        sample = sample_of([source], [tokens], self.pad)
        with extractor_of(model, retriever.key) as extractor:
            encoded = encode(model, sample, extractor, confidence=looks_before(gate))
        before = None if gate is None else looked(gate, encoded, sample)
        neighbors = retriever.search(encoded.keys)
        self._memories.take(hypothesis, encoded.log_p_lm, neighbors, prompt_size, before)


class ReferenceScorer(KNNScorer):
    """Scores the targets of a sample (``--score-reference``, ``score`` of the hub interface).

    Args:
        dictionary: fairseq's, of the targets.
        retriever (Retriever): searches the datastore.
        settings (Settings): the weight of p_knn and the temperature.
        gated (GatedSearch): see ``KNNScorer``.
    """

    def __init__(
        self,
        dictionary,
        retriever: "Retriever",
        settings: Settings,
        gated: Optional[GatedSearch] = None,
    ):
        super().__init__(retriever, settings, gated=gated)
        self.pad = dictionary.pad()
        self.eos = dictionary.eos()  # fairseq's commands strip it from what they print

    def generate(self, models, sample, **kwargs):
        """Score a sample as fairseq's ``SequenceScorer.generate`` does.

        Args:
            models (list): of one fairseq decoder-only language model.
            sample (dict): fairseq's, with targets.
            kwargs: what fairseq passes besides; of no use here.

        Returns:
            list of list of dict: one hypothesis for each target.
        """
        targets = [utils.strip_pad(target, self.pad) for target in sample["target"]]
        if not any(map(len, targets)):  # the texts are empty
            return [[self._hypothesis(target, target.float())] for target in targets]
        # What stands behind the last target predicts nothing.
        sources = [
            source[: max(1, len(target))]
            for source, target in zip(sample["net_input"]["src_tokens"], targets)
        ]
        return super().generate(models, sample_of(sources, targets, self.pad))
