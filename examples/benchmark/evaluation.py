"""A model and a text, loaded as ``fairseq-eval-lm --task knnlm_lm`` loads them."""

import itertools
import time

import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from processes import QUIET
from quality import Queries

from fairseq_knnlm.cli.command_line import make_eval_parser, max_tokens
from fairseq_knnlm.cli.loading import load_split, load_task_and_model, max_positions
from fairseq_knnlm.datastore.fingerprint import dictionary_fingerprint, weights_fingerprint
from fairseq_knnlm.encoding.chunks import plan_chunks, tokens_of_search
from fairseq_knnlm.encoding.encode import encode
from fairseq_knnlm.encoding.key_extractor import extractor_of
from fairseq_knnlm.encoding.samples import to_device
from fairseq_knnlm.scoring.compatibility import refuse_other_dictionary, refuse_other_model


class Evaluation:
    """A model and a split of a data directory, as ``fairseq-eval-lm --task knnlm_lm`` loads them.

    Args:
        data (Path): made by fairseq-preprocess.
        split (str): the split.
        flags (list of str): of ``fairseq-eval-lm``.
    """

    def __init__(self, data, split, flags):
        words = [str(word) for word in (data, *flags, "--gen-subset", split, *QUIET)]
        parser = make_eval_parser("", gen_subset=split)
        self.cfg = convert_namespace_to_omegaconf(
            options.parse_args_and_arch(parser, input_args=words)
        )
        self.task, self.model, _ = load_task_and_model(self.cfg)
        self.device = next(self.model.parameters()).device
        self._dataset = load_split(self.task, split)

    def samples(self, retriever=None):
        """The samples that are scored, with the retriever that the task has now."""
        samples = self.task.evaluation_samples(
            self._dataset,
            max_tokens=max_tokens(self.cfg),
            batch_size=self.cfg.dataset.batch_size,
            max_positions=max_positions(self.model),
            num_workers=0,  # loading is not measured
            context_window=self.cfg.eval_lm.context_window,
            chunk_tokens=None if retriever is None else tokens_of_search(retriever.k),
        )
        return [to_device(sample, self.device) for sample in samples]

    def batches(self, tokens):
        """The first samples of about ``--max-tokens`` each, *tokens* or a little more in all."""
        blocks = self.task.blocks(self._dataset, self.cfg.eval_lm.context_window)
        most = max_tokens(self.cfg)
        chunks = plan_chunks(blocks.sizes, most)
        ends = itertools.accumulate(int(blocks.sizes[c.start : c.stop].sum()) for c in chunks)
        count = 1 + sum(end < tokens for end in ends)
        samples = self.task.chunk_iterator(
            blocks, chunks[:count], most, self.cfg.dataset.batch_size
        )
        return [to_device(sample, self.device) for sample in samples]

    def prompts(self, count, tokens):
        """The first *tokens* of the first *count* blocks, each a sample to be continued."""
        eos = self.task.target_dictionary.eos()  # where it stands, generation ends
        blocks = (self._dataset[number]["target"] for number in range(count))
        blocks = [block[block != eos][:tokens] for block in blocks]
        dataset = self.task.build_dataset_for_inference(blocks, list(map(len, blocks)))
        samples = [dataset.collater([dataset[number]]) for number in range(count)]
        return [to_device(sample, self.device) for sample in samples]

    def queries(self, retriever, count):
        """The first *count* tokens as ``Queries``, and seconds of their forward pass a token."""
        samples = self.samples()
        with extractor_of(self.model, retriever.key) as extractor:
            for sample in self.batches(1):  # warms up
                encode(self.model, sample, extractor)
            start = self.clock()
            encoded = [encode(self.model, sample, extractor) for sample in samples]
            seconds = self.clock() - start
        targets = torch.cat([sample["target"] for sample in samples])
        keys, log_p_lm = (
            torch.cat([getattr(part, name) for part in encoded]) for name in ("keys", "log_p_lm")
        )
        return Queries(keys, targets, log_p_lm).first(count), seconds / len(targets)

    def refuse_other(self, retriever):
        """Refuse a datastore of another model or dictionary, as the task does."""
        refuse_other_dictionary(retriever, dictionary_fingerprint(self.task.target_dictionary))
        refuse_other_model(retriever, self.model, weights_fingerprint(self.model))

    def clock(self):
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
