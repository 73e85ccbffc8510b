"""The two scales of the recipes: SMALL runs in minutes on two cores, FULL is the paper's.

The steps are the same; only what stands here differs. What the paper does not say of its full scale
is marked "assumed".
"""

from typing import NamedTuple, Optional

from pipeline import TOKENS_PER_SAMPLE, training_flags


class Corpus(NamedTuple):
    """A text and how a model learns and reads it.

    name (str): of its folders.
    vocabulary (str): corpora of one vocabulary share a dictionary, made of all their train splits.
    source (tuple): flags of ``sotu/prepare.py``; None: the user puts the text there.
    training (list): flags of ``fairseq-train``.
    reading (list): flags of every command that scores a split.
    storing (list): flags of ``fairseq-knnlm-build``.
    distances (str): ``--knn-distances``.
    """

    name: str
    vocabulary: str
    source: Optional[tuple]
    training: list
    reading: list
    storing: list
    distances: str


class Scale(NamedTuple):
    """What the recipes run on.

    main (Corpus): of sections 4.1, 5 and 6.
    large (Corpus): of section 4.2, cut into pieces.
    domains (tuple of pairs): of section 4.3: a model's Corpus, and the one it is adapted to.
    shares (tuple of float): of the pieces; a model is trained on the first.
    piece_training (list): its flags.
    memory (str): what the memorising model of section 6 learns by heart, ``piece`` or ``main``.
    memorising (list): flags of its training.
    ngram_orders (tuple of int): of the n-gram models.
    passage (str): tokens of test that section 6 shows neighbours of.
    """

    name: str
    main: Corpus
    large: Corpus
    domains: tuple
    shares: tuple
    piece_training: list
    memory: str
    memorising: list
    ngram_orders: tuple
    passage: str

    @property
    def corpora(self):
        """All corpora, each once."""
        return list(dict.fromkeys((self.main, self.large, *sum(self.domains, ()))))


def _words(flags):
    return tuple(flags.split())


# -- small -----------------------------------------------------------------------------------------

# The frequency bands of the adaptive input and softmax, for the 19,000 words of both texts.
CUTOFFS = "1000,5000"
_BLOCK = ("--tokens-per-sample", str(TOKENS_PER_SAMPLE))
_SMALL_READING = ("--cpu", *_BLOCK, "--max-tokens", str(8 * TOKENS_PER_SAMPLE))


def _small(name, source, updates):
    return Corpus(
        name,
        "joint",
        source,
        ("--cpu", *training_flags(CUTOFFS, updates)),
        _SMALL_READING,
        _SMALL_READING,
        "exact",
    )


def _memorising_flags(updates):
    """No dropout, no early end, no held-out text to choose a checkpoint by: the last one counts."""
    flags = training_flags(CUTOFFS, updates)
    flags.remove("--no-last-checkpoints")
    return ("--cpu", *flags, "--disable-validation", "--save-interval", str(updates))


SPEECHES = _small("speeches", (), 2600)
KING_JAMES = _small("king-james", ("--input", "{work}/bible"), 1000)

SMALL = Scale(
    name="small",
    main=SPEECHES,
    large=SPEECHES,
    domains=((SPEECHES, KING_JAMES), (KING_JAMES, SPEECHES)),
    shares=(0.125, 0.125, 0.25, 0.5),
    piece_training=("--cpu", *training_flags(CUTOFFS, 1000), "--dropout", "0.2"),
    memory="piece",
    memorising=_memorising_flags(8000),
    ngram_orders=(2, 3, 4, 5),
    passage="50000:52000",
)

# -- full ------------------------------------------------------------------------------------------

# fairseq's recipe for Baevski and Auli's model, on 8 GPUs; --fp16 as the authors of the paper do.
_OPTIMISATION = """
    --max-update 286000 --lr 1.0 --t-mult 2 --lr-period-updates 270000 --lr-scheduler cosine
    --lr-shrink 0.75 --warmup-updates 16000 --warmup-init-lr 1e-07 --stop-min-lr 1e-09
    --optimizer nag --min-lr 0.0001 --clip-norm 0.1 --update-freq 3 --seed 1 --fp16
    --sample-break-mode none --skip-invalid-size-inputs-valid-test --ddp-backend legacy_ddp
"""
_WIKITEXT_MODEL = """
    --arch transformer_lm_wiki103 --criterion adaptive_loss --max-tokens 3072
    --tokens-per-sample 3072
"""
# The same size for the corpora in word pieces, which have neither adaptive input nor softmax.
# Assumed: dropout, and batches of as many tokens.
_PIECES_MODEL = """
    --arch transformer_lm_big --decoder-layers 16 --no-decoder-final-norm
    --share-decoder-input-output-embed --dropout 0.1 --criterion cross_entropy --max-tokens 3072
    --tokens-per-sample 1024
"""
# Section 4: 512 tokens are scored with up to 2,560 before them, keys have at least 1,536 before.
_WIKITEXT_READING = _words(
    "--tokens-per-sample 3072 --context-window 2560 --max-tokens 3072 --softmax-batch 1024 --fp16"
)
_WIKITEXT_STORING = _words(
    "--tokens-per-sample 3072 --context-window 1536 --max-tokens 3072 --fp16"
)
# 512 tokens with 512 before them, for scores and for keys.
_PIECES_READING = _words("--tokens-per-sample 1024 --context-window 512 --max-tokens 8192 --fp16")
# Section 4: 4,096 centroids learned from a million keys, each in 64 bytes.
_PAPER_INDEX = ("--knn-index", "IVF4096,PQ64")


def _in_word_pieces(name):
    return Corpus(
        name,
        "word-pieces",
        None,
        _words(_PIECES_MODEL + _OPTIMISATION),
        _PIECES_READING,
        (*_PIECES_READING, *_PAPER_INDEX),
        "index",
    )


WIKITEXT = Corpus(
    "wikitext-103",
    "words",
    None,
    _words(_WIKITEXT_MODEL + _OPTIMISATION),
    _WIKITEXT_READING,
    (*_WIKITEXT_STORING, *_PAPER_INDEX),
    "exact",
)
WIKI_3B, BOOKS = _in_word_pieces("wiki-3b"), _in_word_pieces("books")

FULL = Scale(
    name="full",
    main=WIKITEXT,
    large=WIKI_3B,
    domains=((WIKI_3B, BOOKS),),
    # a thirtieth is Wiki-100M
    shares=(0.0334, 0.0333, 0.0666, 0.2, 0.2667, 0.4),
    piece_training=WIKI_3B.training,
    memory="main",
    memorising=(
        *WIKITEXT.training,
        *_words(
            "--dropout 0 --attention-dropout 0 --activation-dropout 0 "
            "--adaptive-softmax-dropout 0 --disable-validation"
        ),
    ),
    ngram_orders=(2, 3, 4, 5),
    passage="0:20000",
)

SCALES = {scale.name: scale for scale in (SMALL, FULL)}
