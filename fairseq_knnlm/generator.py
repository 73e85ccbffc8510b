"""Generation with neighbours: what ``task.build_generator`` gives to fairseq's commands and hub.

Every decoding step mixes p_lm with p_knn over the whole vocabulary (Khandelwal et al., 2020, Eqs. 2
and 3), with one search for all beams of the batch, and is fairseq's own otherwise: beam search,
sampling, prefixes and penalties see the mixture in place of p_lm.
"""

import logging

from fairseq import utils
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator

from .context import Block, ChunkCollater
from .errors import UserError
from .interpolation import interpolate, vocabulary_log_probs
from .scorer import KNNScorer, encode_and_search

logger = logging.getLogger(__name__)


class KNNModel(EnsembleModel):
    """A language model and its neighbours, as fairseq's ``SequenceGenerator`` asks a model.

    Args:
        models (list): of one fairseq decoder-only language model.
        retriever (Retriever): searches the datastore.
        knn_lambda (float): weight of p_knn, in [0, 1): with 1 no hypothesis could be sure to end.
        temperature (float): T, divides the distances.

    Raises:
        UserError: for an ensemble of models, or a lambda of 1.
    """

    def __init__(self, models, retriever, knn_lambda: float, temperature: float):
        if len(models) != 1:
            raise UserError(
                f"fairseq_knnlm: an ensemble of {len(models)} models is not supported: a datastore "
                "belongs to one model; pass one checkpoint as --path"
            )
        if knn_lambda == 1.0:
            raise UserError(
                "fairseq_knnlm: generation needs a --knn-lambda below 1, got 1: words that no "
                "neighbour has, in a prompt or as the </s> at --max-len-b, would be impossible"
            )
        super().__init__(models)
        self.retriever = retriever
        self.knn_lambda = knn_lambda
        self.knn_temperature = temperature

    def forward_decoder(self, tokens, encoder_outs, incremental_states, temperature=1.0):
        """Distribution of the token after each row of *tokens*.

        Args:
            tokens (LongTensor): shape (N, t), the sentences of the batch times the beam, so far.
            temperature (float): tau of ``--temperature``: p^(1 / tau) of the mixture, normalised.

        Returns:
            tuple: log-probabilities, shape (N, V), float64, natural log, and None (no attention).
        """
        with self.retriever.extractor(self.single_model) as extractor:
            log_p_lm, attention = super().forward_decoder(tokens, encoder_outs, incremental_states)
            found = self.retriever.search(extractor.keys[-1])
        log_p_knn = vocabulary_log_probs(
            found.distances, found.values, log_p_lm.size(1), self.knn_temperature
        )
        log_p = interpolate(log_p_lm, log_p_knn, self.knn_lambda)
        if temperature != 1.0:
            log_p = (log_p / temperature).log_softmax(dim=1)
        # fairseq reports a token's score as the difference of two sums over the text: in float32 it
        # would be wrong by 1e-4 after some hundred tokens
        return log_p.double(), attention


class KNNGenerator(SequenceGenerator):
    """fairseq's generator over a ``KNNModel``; it warns where a prompt is cut, which fairseq does.

    Args:
        memories (Memories): takes the memories of what was generated; None: nobody asks.
        arguments: of ``SequenceGenerator``.
    """

    def __init__(self, *arguments, memories=None, **settings):
        super().__init__(*arguments, **settings)
        self._memories = memories

    def generate(self, models, sample, prefix_tokens=None, bos_token=None, **kwargs):
        """Generate, see ``SequenceGenerator.generate``."""
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
        sample = _chunk([source], [tokens], self.pad)
        encoded, found = encode_and_search(model, sample, retriever)
        self._memories.take(hypothesis, encoded.log_p_lm, found, prompt_size)


class ReferenceScorer(KNNScorer):
    """Scores the targets of a sample (``--score-reference``, ``score`` of the hub interface).

    Args:
        dictionary: fairseq's, of the targets.
        settings: arguments of ``KNNScorer``.
    """

    def __init__(self, dictionary, **settings):
        super().__init__(**settings)
        self.pad, self.eos = dictionary.pad(), dictionary.eos()

    def generate(self, models, sample, **kwargs):
        """Score a sample as fairseq's ``SequenceScorer.generate`` does."""
        targets = [utils.strip_pad(target, self.pad) for target in sample["target"]]
        if not any(map(len, targets)):  # empty texts
            return [[self._hypothesis(target, target.float())] for target in targets]
        # what is fed behind the last target predicts nothing
        sources = [
            source[: max(1, len(target))]
            for source, target in zip(sample["net_input"]["src_tokens"], targets)
        ]
        return super().generate(models, _chunk(sources, targets, self.pad))


def _chunk(sources, targets, pad):
    """A sample of ``scorer`` in one batch; each target is predicted by the source in its place."""
    longest = max(map(len, sources))
    blocks = [Block(i, *pair) for i, pair in enumerate(zip(sources, targets))]
    sample = ChunkCollater(pad, longest * len(blocks))(blocks)
    return utils.apply_to_sample(lambda tensor: tensor.to(sources[0].device), sample)
