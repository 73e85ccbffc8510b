"""The criterion ``trime_loss``: training with the tokens of the batch as a memory.

Zhong, Lei and Chen (EMNLP 2022), TRIME. The states are those that a datastore has as its keys, and
the sums are ``probability.batch_memory``'s. The order of the batches that the memories ``long`` and
``external`` need is ``trime_batches``'. fairseq derives flags from the fields below, and reads
their types: no postponed annotations here.
"""

import math
from dataclasses import dataclass, field
from typing import Optional

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.criterions.adaptive_loss import AdaptiveLoss
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.dataclass.constants import DDP_BACKEND_CHOICES
from fairseq.logging import metrics
from omegaconf import II

from ..encoding.encode import target_log_probs
from ..encoding.key_extractor import extractor_of
from ..errors import UserError
from ..fields import is_number, is_whole
from ..probability.batch_memory import joint_log_probs, memory_log_sums

MEMORIES = ("none", "local", "long", "external")
# Share of the updates that the paper trains without memory, and how often it hides a segment's own
# tokens from it where the memory is external.
WARMUP_SHARE = 0.05
DEFAULT_OWN_DROPPED = 0.9
# Backends that wait for a gradient of every parameter: clusters of an adaptive softmax without a
# target have none.
_WAITING_BACKENDS = ("c10d", "pytorch_ddp")


@dataclass
class TrimeLossConfig(FairseqDataclass):
    """Settings of the criterion ``trime_loss``."""

    trime_memory: ChoiceEnum(list(MEMORIES)) = field(
        default="local",
        metadata={
            "help": "memories of a token in training: 'local', the tokens before it in its "
            "segment; 'long', those and the segments before it in the batch, which then holds "
            "consecutive ones; 'external', the other segments of the batch, which then holds "
            "similar ones; 'none', plain cross-entropy"
        },
    )
    trime_warmup_updates: Optional[int] = field(
        default=None,
        metadata={
            "help": "updates with plain cross-entropy before the memory is used "
            f"(default: {WARMUP_SHARE:.0%} of --max-update)"
        },
    )
    trime_own_dropped: float = field(
        default=DEFAULT_OWN_DROPPED,
        metadata={
            "help": "external: probability that a segment does not see its own tokens, in [0, 1] "
            f"(default: {DEFAULT_OWN_DROPPED})"
        },
    )
    # Of fairseq's own flags; each is declared where it belongs.
    sentence_avg: bool = II("optimization.sentence_avg")
    max_update: int = II("optimization.max_update")
    ddp_backend: DDP_BACKEND_CHOICES = II("distributed_training.ddp_backend")


@register_criterion("trime_loss", dataclass=TrimeLossConfig)
class TrimeLoss(FairseqCriterion):
    """Cross-entropy of one softmax over words and the memories of a batch.

    Without memory it is fairseq's ``cross_entropy`` or ``adaptive_loss``, as the model's softmax
    is. (The latter leaves out the cluster of a word whose number within its cluster is that of the
    padding; with memory no word is left out.)

    Validation always looks at memory: with ``external`` at that of ``local``, as the other segments
    of a split to be predicted are no memory.

    Args:
        task (KNNLMTask): says which state is compared.
        cfg (TrimeLossConfig): the flags.

    Raises:
        UserError: naming each flag that cannot be.
    """

    def __init__(self, task, cfg):
        super().__init__(task)
        _refuse_impossible(task, cfg)
        self.memory = str(cfg.trime_memory)
        self._own_dropped = cfg.trime_own_dropped
        self._warmup_updates = cfg.trime_warmup_updates
        if self._warmup_updates is None:
            self._warmup_updates = round(WARMUP_SHARE * max(0, cfg.max_update))
        self._sentence_avg = cfg.sentence_avg
        self._backend = str(cfg.ddp_backend)
        self._num_updates = 0

    def set_num_updates(self, num_updates: int) -> None:
        """Tell how many updates there were; the task does before each."""
        self._num_updates = num_updates

    def forward(self, model, sample, reduce=True):
        """The loss of a batch.

        Args:
            model: a fairseq decoder-only language model, wrapped for several processes or not.
            sample (dict): of fairseq's ``MonolingualDataset``.
            reduce (bool): whether losses are summed.

        Returns:
            tuple: the loss in nats, shape () or (B * T,), float32; what it is to be divided by;
            what is logged.
        """
        self._refuse_backend(model)
        if not self._remembers():
            return self._without_memory(model, sample, reduce)
        target = sample["target"]
        log_p_lm, log_p = self._log_probs(model, sample["net_input"], target)
        there = target.view(-1) != self.padding_idx
        lm_loss, loss = (
            -log_probs.masked_fill(~there, 0.0) for log_probs in (log_p_lm.detach(), log_p)
        )
        ntokens = int(there.sum())
        sample_size = target.size(0) if self._sentence_avg else ntokens
        logging_output = {
            "loss": loss.detach().sum() if reduce else loss.detach(),
            "lm_loss": lm_loss.sum(),
            "ntokens": ntokens,
            "nsentences": target.size(0),
            "sample_size": sample_size,
        }
        return (loss.sum() if reduce else loss), sample_size, logging_output

    def _without_memory(self, model, sample, reduce):
        """What fairseq's own criterion for the model's softmax gives."""
        cls = AdaptiveLoss if _is_adaptive(model) else CrossEntropyCriterion
        stock = cls(self.task, self._sentence_avg)
        loss, sample_size, logging_output = stock(model, sample, reduce)
        return loss, sample_size, {**logging_output, "lm_loss": logging_output["loss"].sum()}

    def _log_probs(self, model, inputs: dict, target):
        """log p of the targets without and with memory, shape (B * T,), float32."""
        with extractor_of(model, self.task.key) as extractor:
            features = model(**inputs, features_only=True)[0]
            states = extractor.keys.transpose(0, 1)  # (T, B, D) to (B, T, D)
        _refuse_recomputed(features, states)
        log_p_lm, log_normalizer, _ = target_log_probs(
            model.decoder,
            features.reshape(-1, features.size(-1)),
            target.reshape(-1),
            log_normalizer=True,
        )
        every, matching = self._log_sums(states, target)
        joined = joint_log_probs(log_p_lm, log_normalizer, every.view(-1), matching.view(-1))
        return log_p_lm, joined

    def _remembers(self) -> bool:
        warm = not self.training or self._num_updates >= self._warmup_updates
        return warm and self.memory != "none"

    def _log_sums(self, states, target):
        """What the memories of each token add, see ``memory_log_sums``."""
        if self.memory == "long":
            text = states.reshape(1, -1, states.size(-1))
            return memory_log_sums(text, target.reshape(1, -1), self.padding_idx)
        own = None
        if self.memory == "external" and self.training:
            # On the CPU, so that every device draws the same.
            draws = torch.rand(len(target)) >= self._own_dropped
            own = draws.to(target.device)
        return memory_log_sums(states, target, self.padding_idx, own)

    def _refuse_backend(self, model) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and _is_adaptive(model) and self._backend in _WAITING_BACKENDS:
            raise UserError(
                f"--ddp-backend {self._backend} waits for a gradient of every parameter, which an "
                "adaptive softmax does not have in every batch: pass --ddp-backend legacy_ddp"
            )

    @staticmethod
    def reduce_metrics(logging_outputs: list) -> None:
        """Log the loss with memory, as fairseq does, and that of the language model alone.

        Args:
            logging_outputs (list of dict): of ``forward``, from all batches and processes, or
                their sum.
        """
        total = {
            name: sum(utils.item(log.get(name, 0)) for log in logging_outputs)
            for name in ("loss", "lm_loss", "ntokens", "sample_size")
        }
        size, ntokens = total["sample_size"], total["ntokens"]
        bits = 1.0 / math.log(2)
        metrics.log_scalar("loss", total["loss"] / size * bits, size, round=3)
        per_token = "loss"
        if size != ntokens:
            per_token = "nll_loss"
            metrics.log_scalar(per_token, total["loss"] / ntokens * bits, ntokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters[per_token].avg))
        metrics.log_scalar("lm_loss", total["lm_loss"] / ntokens * bits, ntokens, round=3)
        metrics.log_derived("lm_ppl", lambda meters: utils.get_perplexity(meters["lm_loss"].avg))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """Whether ``reduce_metrics`` takes the sum of the outputs as well as the outputs."""
        return True


def _is_adaptive(model) -> bool:
    return getattr(model.decoder, "adaptive_softmax", None) is not None


def _refuse_impossible(task, cfg) -> None:
    faults = []
    if not hasattr(task, "key"):
        faults.append("--criterion trime_loss needs --task knnlm_lm, which orders the batches")
    dropped, updates = cfg.trime_own_dropped, cfg.trime_warmup_updates
    if not (is_number(dropped) and 0 <= dropped <= 1):
        faults.append(f"--trime-own-dropped must be in [0, 1], got {dropped}")
    if updates is not None and not is_whole(updates, 0):
        faults.append(f"--trime-warmup-updates must be a whole number >= 0, got {updates}")
    if faults:
        raise UserError("; ".join(faults))


def _refuse_recomputed(features, states) -> None:
    """Refuse states that gradients would silently not reach."""
    if features.requires_grad and not states.requires_grad:
        raise UserError(
            "the states of the memory have no gradients: drop --checkpoint-activations and "
            "--offload-activations, or train with --trime-memory none"
        )
