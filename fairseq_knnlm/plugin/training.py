"""What the task does where a model is trained with memory (``trime_criterion``)."""

import os
from typing import Optional

from fairseq import utils
from fairseq.tasks.language_modeling import LanguageModelingTask

from .stock_flags import whole_configuration
from .trime_batches import by_similarity, in_text_order, refuse_lonely
from .trime_criterion import TrimeLoss


class TrainingTask(LanguageModelingTask):
    """Language modelling that can be trained with ``trime_loss``; with others it is fairseq's."""

    def __init__(self, args, dictionary, output_dictionary=None, targets=None):
        super().__init__(args, dictionary, output_dictionary, targets)
        self._memory: Optional[str] = None

    def build_criterion(self, args):
        """Build a criterion, and remember which memory it trains with.

        Args:
            args: the criterion's part of the configuration.
        """
        criterion = super().build_criterion(args)
        if isinstance(criterion, TrimeLoss):
            self._memory = criterion.memory
        return criterion

    def can_reuse_epoch_itr(self, dataset) -> bool:
        """Whether batches of one epoch serve for the next, as they do by default.

        With ``trime_loss`` they depend on the seed and the epoch alone: training that is continued
        in a later epoch then sees the batches that it would have seen.
        """
        return self._memory is None and super().can_reuse_epoch_itr(dataset)

    def get_batch_iterator(self, dataset, *args, **kwargs):
        """Iterate over batches, cut from the order that the memory needs.

        Args:
            dataset: from ``load_dataset``.
            args, kwargs: as in fairseq.

        Raises:
            UserError: if a batch holds one segment, and the memory is the others.
        """
        is_train = dataset is self.datasets.get(self._train_subset())
        if is_train and self._memory in ("long", "external"):
            limits = kwargs.get("max_tokens"), kwargs.get("max_sentences")
            refuse_lonely(self._memory, dataset.sizes, *limits)
        if self._memory == "long":
            dataset = in_text_order(dataset)
        elif self._memory == "external" and is_train:
            epoch = kwargs.get("epoch", 1)
            paths = utils.split_paths(self.args.data)
            prefix = os.path.join(paths[(epoch - 1) % len(paths)], self._train_subset())
            dataset = by_similarity(dataset, len(self.target_dictionary), prefix)
        return super().get_batch_iterator(dataset, *args, **kwargs)

    def _train_subset(self) -> str:
        whole = whole_configuration(self.args)
        return "train" if whole is None else whole.dataset.train_subset

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        """Forward and backward of a batch; ``trime_loss`` is told the number of the update."""
        if isinstance(criterion, TrimeLoss):
            criterion.set_num_updates(update_num)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)
