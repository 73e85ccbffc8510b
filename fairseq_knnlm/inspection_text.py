"""A passage and its memories as lines for a terminal."""

import textwrap
from collections.abc import Iterator

from .inspection import Inspection, Neighbor, Token, place_in_words

_COLUMNS = 100
_CODES = {"helped": "34", "hurt": "33", "": "0", "faint": "2", "strong": "1"}
_INDENT = " " * 12
# Columns of a token; a longer one has a line of its own.
_WORD = 22
_KEY = "ln: of mixture / p_lm; [neighbour]; =: the neighbour is the token itself"


def render(inspection: Inspection, color: bool = False) -> Iterator[str]:
    """Lines of at most 100 columns, unless a single word is longer.

    Args:
        color (bool): whether the terminal takes ANSI colours; nothing is told by colour alone.
    """
    paint = _paint if color else lambda text, style: text
    yield from _head(inspection)
    for token in inspection.tokens:
        yield ""
        yield from _token(token, paint)
        for neighbor in token.neighbors:
            yield from _neighbor(neighbor, paint, inspection.datastores())


def printable(text: str) -> str:
    """Text without characters that a terminal would obey."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def words(token: Token) -> str:
    """The token as written, and that the model saw another."""
    if token.unknown and token.text != "<unk>":
        return f"{token.text} (the model sees <unk>)"
    return token.text


def _paint(text: str, style: str) -> str:
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m"


def _head(inspection: Inspection) -> Iterator[str]:
    perplexities = inspection.perplexities()
    head = (
        f"{inspection.source}: {len(inspection.tokens):,} tokens, perplexity "
        f"{perplexities['lm']:.2f} without neighbours, {perplexities['mixture']:.2f} with"
    )
    settings = ", ".join(f"{name} {value}" for name, value in inspection.settings.items())
    for line in (head, settings, _KEY):
        yield from textwrap.wrap(
            printable(line), _COLUMNS, break_long_words=False, break_on_hyphens=False
        )


def _token(token: Token, paint) -> Iterator[str]:
    text = printable(words(token))
    name = f"{token.index:>7,}  " + paint(f"{text:<{_WORD}}", "strong")
    if len(text) > _WORD:
        yield name
        name = " " * (9 + _WORD)
    numbers = f"  p_lm {token.p_lm:<8.2g} p_knn {token.p_knn:<8.2g} mixture {token.p_mixture:<8.2g}"
    sign = "helped" if token.log_ratio > 0 else "hurt" if token.log_ratio < 0 else ""
    yield f"{name}{numbers}" + paint(f"  ln {token.log_ratio:+.2f} {sign}".rstrip(), sign)


def _neighbor(neighbor: Neighbor, paint, datastores: int) -> Iterator[str]:
    same = "= " if neighbor.matches else "  "
    closeness = f"weight {neighbor.weight:.3f}  distance {neighbor.distance:.2f}  "
    place = paint(place_in_words(neighbor, datastores), "faint")
    yield f"{neighbor.rank:>9}. {same}{closeness}{place}"
    value = f"[{printable(neighbor.token)}]"
    yield from _context(neighbor, value, paint)


def _context(neighbor: Neighbor, value: str, paint) -> Iterator[str]:
    before, after = (list(map(printable, part)) for part in (neighbor.before, neighbor.after))
    style = "strong" if neighbor.matches else None
    lines, width = [[]], 0
    for place, word in enumerate([*before, value, *after]):
        if lines[-1] and len(_INDENT) + width + 1 + len(word) > _COLUMNS:
            lines.append([])
            width = 0
        width += len(word) + bool(lines[-1])
        lines[-1].append(paint(word, style) if style and place == len(before) else word)
    for line in lines:
        yield _INDENT + " ".join(line)
