"""A passage and its memories as lines for a terminal."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Callable

from .tokens import Guess, Memory, Passage, Token, place_in_words, size_in_words

_COLUMNS = 100
# Numbers of the ANSI escape sequences: blue, yellow, none, dim and bold.
_CODES = {"helped": "34", "hurt": "33", "": "0", "faint": "2", "strong": "1"}
_INDENT = " " * 12
# A token of more columns has a line of its own.
_WORD_COLUMNS = 22
_LEGEND = "ln: of mixture / p_lm; [neighbour]; =: the neighbour is the token itself"


def render(passage: Passage, color: bool = False) -> Iterator[str]:
    """Lines of at most 100 columns, unless a single word is longer.

    Args:
        passage (Passage): what to show.
        color (bool): whether the terminal takes ANSI colours. Words say all that colours say.

    Yields:
        str: lines without their ends.
    """
    paint = _paint if color else lambda text, style: text
    yield from head(passage)
    yield _LEGEND
    for token in passage.tokens:
        yield ""
        yield from _token(token, paint)
        if passage.with_cache:
            yield _weights(token)
        elif passage.gated:
            yield f"{_INDENT}lambda {token.knn_lambda:.3f}"
        yield from _guesses("the model says", token.lm_guesses)
        yield from _guesses("the memory says", token.knn_guesses)
        yield from _guesses("the cache says", token.cache_guesses)
        for memory in token.neighbors:
            yield from _memory(memory, paint, passage.datastores)


def printable(text: str) -> str:
    """Text without characters that a terminal would obey."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def words(token: Token) -> str:
    """The token as it was written, with a note where the model sees ``<unk>`` in its place."""
    if token.unknown and token.text != "<unk>":
        return f"{token.text} (the model sees <unk>)"
    return token.text


def _paint(text: str, style: str) -> str:
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m"


def head(passage: Passage) -> Iterator[str]:
    """What is above the tokens: how many they are, their perplexity, and the settings."""
    perplexities = passage.perplexities()
    summary = (
        f"{passage.source}: {size_in_words(passage)}, perplexity "
        f"{perplexities['lm']:.2f} without {passage.memories}, {perplexities['mixture']:.2f} with"
    )
    settings = ", ".join(f"{name} {value}" for name, value in passage.settings.items())
    for line in (summary, settings):
        yield from textwrap.wrap(
            printable(line), _COLUMNS, break_long_words=False, break_on_hyphens=False
        )


def _token(token: Token, paint: Callable) -> Iterator[str]:
    text = printable(words(token))
    name = f"{token.index:>7,}  " + paint(f"{text:<{_WORD_COLUMNS}}", "strong")
    if len(text) > _WORD_COLUMNS:
        yield name
        name = " " * (9 + _WORD_COLUMNS)
    p_knn = _or_none(token.p_knn)
    numbers = f"  p_lm {token.p_lm:<8.2g} p_knn {p_knn:<8} mixture {token.p_mixture:<8.2g}"
    sign = "helped" if token.log_ratio > 0 else "hurt" if token.log_ratio < 0 else ""
    yield f"{name}{numbers}" + paint(f"  ln {token.log_ratio:+.2f} {sign}".rstrip(), sign)


def _weights(token: Token) -> str:
    """What the cache says of the token, and the weights of all three in the mixture."""
    return (
        f"{' ' * 9}p_cache {_or_none(token.p_cache)}; weights: model {token.lm_lambda:.3f}, "
        f"neighbours {token.knn_lambda:.3f}, cache {token.cache_lambda:.3f}"
    )


def _or_none(p: float) -> str:
    """A probability, or that a memory had nothing to say."""
    return "none" if math.isnan(p) else f"{p:.2g}"


def _guesses(title: str, guesses: Sequence[Guess]) -> Iterator[str]:
    """The tokens that were most probable, with their probabilities; nothing where not known."""
    said = ", ".join(f"{printable(guess.token)} {guess.p:.2g}" for guess in guesses)
    if said:
        yield from textwrap.wrap(
            f"{title} {said}", _COLUMNS, initial_indent=" " * 9, subsequent_indent=_INDENT,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip


def _memory(memory: Memory, paint: Callable, datastores: int) -> Iterator[str]:
    same = "= " if memory.matches else "  "
    closeness = f"weight {memory.weight:.3f}  distance {memory.distance:.2f}  "
    place = paint(place_in_words(memory, datastores), "faint")
    yield f"{memory.rank:>9}. {same}{closeness}{place}"
    value = f"[{printable(memory.token)}]"
    yield from _context(memory, value, paint)


def _context(memory: Memory, value: str, paint: Callable) -> Iterator[str]:
    """The value among the tokens around it, in as many lines as they need."""
    before, after = (list(map(printable, part)) for part in (memory.before, memory.after))
    style = "strong" if memory.matches else None
    lines, width = [[]], 0
    for place, word in enumerate([*before, value, *after]):
        if lines[-1] and len(_INDENT) + width + 1 + len(word) > _COLUMNS:
            lines.append([])
            width = 0
        width += len(word) + bool(lines[-1])
        lines[-1].append(paint(word, style) if style and place == len(before) else word)
    for line in lines:
        yield _INDENT + " ".join(line)
