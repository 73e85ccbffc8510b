"""The steps that recipes are made of, each a command: text, model, datastore, tuning, scores.

A step that several recipes need is run once. What a step makes is found again by its name.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pipeline import PLUGIN, display, program, read_json

from fairseq_knnlm.encoding.blocks import document_starts
from fairseq_knnlm.probability.bootstrap import paired_interval
from fairseq_knnlm.probability.metrics import perplexity

HERE = Path(__file__).resolve().parent
PYTHON = Path(sys.executable)
PREPARE = HERE.parent / "sotu" / "prepare.py"
SPLITS = ("train", "valid", "test")
EOS = 2  # in every dictionary of fairseq
LOGGING = ("--log-format", "simple", "--log-interval", "25")


class Model(NamedTuple):
    """A language model.

    name (str): of its folder.
    corpus (Corpus): what it reads, and how.
    data (Path): binarised; what it was trained on.
    checkpoint (Path): the weights.
    """

    name: str
    corpus: object
    data: Path
    checkpoint: Path


class Lab:
    """Makes what recipes ask for, in the folder *work*, with the commands of *pipeline*.

    Args:
        work (Path): folder.
        scale (Scale): what is run on.
        pipeline: runs a command (``pipeline.Pipeline``) or only shows it.
    """

    def __init__(self, work, scale, pipeline):
        self.work, self.scale, self._pipeline = work, scale, pipeline
        self._done = set()

    def step(self, name, what, command, inputs, outputs, **options):
        """Run a command, unless it was in this run; see ``Pipeline.run``."""
        if name not in self._done:
            self._done.add(name)
            self._pipeline.run(name, what, command, inputs, outputs, **options)

    # -- text --------------------------------------------------------------------------------------

    def text(self, corpus):
        """The text of each split, by name; prepared, or the user's."""
        folder = self.work / "text" / corpus.name
        files = {split: folder / f"{split}.txt" for split in SPLITS}
        if corpus.source is not None:
            source = [word.format(work=self.work) for word in corpus.source]
            if source:
                self._bible()
            self.step(
                f"prepare-{corpus.name}",
                "tokenise the text and split it",
                [PYTHON, PREPARE, folder, *source],
                inputs=[PREPARE],
                outputs=[*files.values()],
                folder=folder,
                show=".",
            )
        return files

    def _bible(self):
        script, folder = HERE / "texts.py", self.work / "bible"
        self.step(
            "bible",
            "the King James Bible, a file a chapter",
            [PYTHON, script, "bible", folder],
            inputs=[script],
            outputs=[folder / "1-01-001.txt"],
        )

    def dictionary(self, corpus):
        """The dictionary of all corpora that share the corpus's vocabulary."""
        joined = [each for each in self.scale.corpora if each.vocabulary == corpus.vocabulary]
        texts = [self.text(each)["train"] for each in joined]
        text, folder = texts[0], self.work / "data" / f"vocabulary-{corpus.vocabulary}"
        if len(texts) > 1:
            text = self.work / "text" / f"{corpus.vocabulary}.txt"
            self.step(
                f"join-{corpus.vocabulary}",
                "the train splits of all domains as one text",
                [PYTHON, HERE / "texts.py", "join", text, *texts],
                inputs=texts,
                outputs=[text],
            )
        self.step(
            f"dictionary-{corpus.vocabulary}",
            "its dictionary",
            [
                *(program("fairseq-preprocess"), "--only-source", "--dict-only"),
                *("--trainpref", text, "--destdir", folder),
            ],
            inputs=[text],
            outputs=[folder / "dict.txt"],
            folder=folder,
        )
        return folder / "dict.txt"

    def data(self, corpus):
        """The folder of a corpus's text as numbers."""
        return self._binarised(corpus.name, self.dictionary(corpus), self.text(corpus))

    def _binarised(self, name, dictionary, texts):
        folder = self.work / "data" / name
        self.step(
            f"preprocess-{name}",
            "words to numbers",
            [
                *(program("fairseq-preprocess"), "--only-source", "--srcdict", dictionary),
                *(word for split in texts for word in (f"--{split}pref", texts[split])),
                *("--destdir", folder),
            ],
            inputs=[dictionary, *texts.values()],
            outputs=[folder / "dict.txt", *(folder / f"{split}.bin" for split in texts)],
            folder=folder,
            show="fairseq_cli.preprocess.*sents",
        )
        return folder

    def pieces(self):
        """Folders of the pieces of the large corpus as numbers; valid and test are the whole's."""
        corpus, shares = self.scale.large, self.scale.shares
        whole, folder = self.text(corpus), self.work / "text" / f"{corpus.name}-pieces"
        texts = [folder / f"{i + 1}.txt" for i in range(len(shares))]
        self.step(
            "pieces",
            "the train split in pieces of whole documents",
            [PYTHON, HERE / "texts.py", "pieces", whole["train"], folder, *shares],
            inputs=[whole["train"]],
            outputs=texts,
        )
        dictionary = self.dictionary(corpus)
        return [
            self._binarised(f"{corpus.name}-{i + 1}", dictionary, {**whole, "train": text})
            for i, text in enumerate(texts)
        ]

    # -- models and datastores ---------------------------------------------------------------------

    def model(self, corpus):
        """The language model of a corpus."""
        return self.trained(corpus.name, corpus, self.data(corpus), corpus.training)

    def piece_model(self):
        """The language model of the first piece of the large corpus."""
        scale = self.scale
        name, data = f"{scale.large.name}-1", self.pieces()[0]
        return self.trained(name, scale.large, data, scale.piece_training)

    def trained(self, name, corpus, data, training, last=False):
        """A language model of its own training; *last*: its last checkpoint, not its best."""
        folder = self.work / "models" / name
        checkpoint = folder / f"checkpoint_{'last' if last else 'best'}.pt"
        self.step(
            f"train-{name}",
            "a transformer language model",
            [
                *(program("fairseq-train"), data, "--user-dir", PLUGIN, "--task", "knnlm_lm"),
                *training,
                *("--save-dir", folder),
            ],
            inputs=[data / "dict.txt", data / "train.bin", data / "valid.bin"],
            outputs=[checkpoint],
            folder=folder,
        )
        return Model(name, corpus, data, checkpoint)

    def datastore(self, model, data, *flags, suffix=""):
        """The datastore of a model and the train split of *data*."""
        name = f"{model.name}-of-{data.name}{suffix}"
        folder = self.work / "datastores" / name
        self.step(
            f"build-{name}",
            "one key and value for every token, and the index",
            [
                *(program("fairseq-knnlm-build"), data, "--knn-datastore", folder),
                *("--path", model.checkpoint, "--gen-subset", "train"),
                *(*model.corpus.storing, *flags, *LOGGING),
            ],
            inputs=[data / "train.bin", model.checkpoint],
            outputs=[folder / "manifest.json", folder / "index.faiss"],
            folder=folder,
        )
        return folder

    # -- figures -----------------------------------------------------------------------------------

    @property
    def lm(self):
        """Name of the scores of the main model alone."""
        return lm_name(self.scale.main, self.scale.main)

    @property
    def knn(self):
        """Name of the scores of the main model with its training data as the datastore."""
        return knn_name(self.scale.main, self.scale.main)

    def tuned_path(self, name):
        """What ``fairseq-knnlm-tune`` found on valid."""
        return self.work / "tuned" / f"{name}.json"

    def scores_path(self, name, split):
        """Log probabilities of every token of a split."""
        return self.work / "scores" / f"{name}.{split}.npz"

    def score(self, name, model, data, split="test", flags=()):
        """Write the log probabilities of a split; without more flags, of the model alone."""
        output = self.scores_path(name, split)
        self.step(
            f"score-{name}-{split}",
            f"log probabilities of {split}",
            [
                *(PYTHON, HERE / "log_probs.py", data, "--path", model.checkpoint),
                *("--gen-subset", split, *flags, "--output", output),
                *(*model.corpus.reading, *LOGGING),
            ],
            inputs=[data / f"{split}.bin", model.checkpoint, *filter(_is_path, flags)],
            outputs=[output],
        )

    def evaluate(self, name, model, data, datastores, *flags, cache=0):
        """Tune on valid and write the log probabilities of test, with the datastores as one.

        With a *cache*, the most tokens of one, also of the cache alone and of both: ``cached``.
        """
        tuned, report = self.tuned_path(name), self.work / "reports" / name
        search = ("--knn-datastore", ":".join(map(display, datastores)), *flags)
        if "--knn-distances" not in flags:
            search += ("--knn-distances", model.corpus.distances)
        self.step(
            f"tune-{name}",
            "k, lambda and temperature on valid",
            [
                *(program("fairseq-knnlm-tune"), data, "--path", model.checkpoint),
                *("--gen-subset", "valid", *search),
                *(("--knn-cache-size", cache) if cache else ()),
                *("--knn-output", tuned, "--report", report, *model.corpus.reading, *LOGGING),
            ],
            inputs=[
                *(data / "valid.bin", model.checkpoint),
                *(folder / "manifest.json" for folder in datastores),
            ],
            outputs=[tuned, report / "report.json"],
            folder=report,
        )
        self.score(name, model, data, flags=("--tuned", tuned, *search))
        if cache:
            alone, both = cached(name)
            self.score(alone, model, data, flags=("--tuned", tuned, "--method", "cache"))
            flags = ("--tuned", tuned, "--method", "knn-cache", *search)
            self.score(both, model, data, flags=flags)

    # -- what came out -----------------------------------------------------------------------------

    def tuned(self, name):
        """The best setting and the grid, of valid."""
        return read_json(self.tuned_path(name))

    def curve(self, name, table):
        """A table of the report of ``fairseq-knnlm-tune``, of valid."""
        return read_json(self.work / "reports" / name / "report.json")["tables"][table]

    def log_p(self, name, split="test"):
        """Log probabilities of a split, shape (N,), float32."""
        return np.load(self.scores_path(name, split))["log_p"]

    def perplexity(self, name, split="test"):
        """Perplexity of a split."""
        return perplexity(self.log_p(name, split))

    def on_both(self, name):
        """Perplexity of valid and of test, as text."""
        return [f"{self.perplexity(name, split):.2f}" for split in ("valid", "test")]

    def change(self, first, second, split="test"):
        """From the perplexity of *first* to that of *second*, with its 95% interval."""
        targets = np.load(self.scores_path(first, split))["targets"]
        return interval(self.log_p(first, split), self.log_p(second, split), targets)


def lm_name(corpus, text):
    """Name of the scores that the model of *corpus* gives the corpus *text*."""
    return f"{corpus.name}-on-{text.name}"


def knn_name(corpus, text):
    """The same with a datastore of *text*."""
    return f"{lm_name(corpus, text)}-knn"


def cached(name):
    """Names of the scores with a cache alone, and with a cache beside neighbours."""
    return f"{name}-cache-alone", f"{name}-cache"


def interval(first, second, targets):
    """From one perplexity to another, with its 95% interval; see ``paired_interval``."""
    return paired_interval(first, second, document_starts(targets, EOS))


def _is_path(word):
    return isinstance(word, Path)
