"""A passage and its memories as one HTML page that needs no network.

Every token is a link to its memories. Without a script the browser shows the one that is linked to;
a script makes the passage one stop of the Tab key, in which arrow keys go from token to token. In
print the memories of the tokens that changed most follow the text.
"""

import bisect
import math
from collections.abc import Iterator, Sequence

from ..html_page import factor, probability, render_page
from .tokens import Memory, Passage, Token, place_in_words, size_in_words

# A token's shade depends on p_mixture / p_lm: these are the bounds between shades.
_RATIOS = (0.5, 0.8, 0.95, 1.05, 1.25, 2.0)
_UNCHANGED = len(_RATIOS) // 2
_LN_RATIOS = tuple(map(math.log, _RATIOS))
# How many of the tokens that were helped most are listed above the text, and have their memories in
# print; the same number of those that were hurt most.
_EXTREMES = 10
# Log-ratios are compared to this many decimals: where no neighbour has the token all of them are
# ln(1 - lambda), but for rounding.
_TIE_DECIMALS = 3


def render(passage: Passage) -> str:
    """The page of a passage, as HTML."""
    helped, hurt = extremes(passage.tokens)
    return render_page(
        "inspection/templates/passage.html.j2",
        passage=passage,
        size=size_in_words(passage),
        perplexities=passage.perplexities(),
        legend=_legend(),
        extremes={"Helped most": helped, "Hurt most": hurt},
        lines=list(_lines(passage.tokens)),
        printed={token.index for token in helped + hurt},
        shade=lambda token: shade(token.log_ratio),
        label=_label,
        bar_width=_bar_width,
        place=lambda memory: place_in_words(memory, passage.datastores),
    )


def shade(log_ratio: float) -> int:
    """0, hurt most, to 6, helped most; 3 where the probability changed by less than 5%."""
    return bisect.bisect_right(_LN_RATIOS, log_ratio)


def extremes(tokens: Sequence[Token]) -> tuple[list[Token], list[Token]]:
    """The tokens that were helped most and those that were hurt most, most of all first.

    Of equal log-ratios, which most of those that were hurt have, the one whose probability changed
    most comes first: where the model was right and sure of it.

    Args:
        tokens (sequence of Token): of a passage.

    Returns:
        tuple of list: at most ten of each.
    """

    def order(token):
        change = abs(token.p_mixture - token.p_lm)
        return -abs(round(token.log_ratio, _TIE_DECIMALS)), -change, token.index

    helped = [token for token in tokens if shade(token.log_ratio) > _UNCHANGED]
    hurt = [token for token in tokens if shade(token.log_ratio) < _UNCHANGED]
    return sorted(helped, key=order)[:_EXTREMES], sorted(hurt, key=order)[:_EXTREMES]


def _legend() -> list[str]:
    """What each shade means."""
    bounds = [f"{ratio:g}" for ratio in _RATIOS]
    middle = [f"{low} to {high}" for low, high in zip(bounds, bounds[1:])]
    return [f"below {bounds[0]}", *middle, f"{bounds[-1]} and more"]


def _lines(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    """The tokens of each line of the text."""
    line: list = []
    for token in tokens:
        line.append(token)
        if token.ends_line:
            yield line
            line = []
    if line:
        yield line


def _label(token: Token) -> str:
    """What a screen reader says of a token: all that its shade and its style say."""
    unknown = ", unknown to the model" if token.unknown else ""
    return (
        f"{token.text}{unknown}: {probability(token.p_lm)} becomes {probability(token.p_mixture)}, "
        f"{factor(token.log_ratio)}"
    )


def _bar_width(memory: Memory, token: Token) -> str:
    """Its weight in percent of the largest of the token's neighbours."""
    return f"{100 * memory.weight / max(each.weight for each in token.neighbors):.1f}%"
