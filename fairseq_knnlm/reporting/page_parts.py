"""What the page of a report is made of: sections, figures, tables, and numbers in words."""

import base64
import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Callable

NONE = "\N{EN DASH}"


def section(title: str, content: Iterable[str]) -> str:
    """A part of the page with a title.

    Args:
        title (str): text; it is escaped.
        content (iterable of str): HTML.
    """
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(content) + "\n</section>"


def figures_with_captions(figures: dict, **captions: str) -> str:
    """Figures side by side, where the page is wide enough.

    Args:
        figures (dict): SVG of each figure, bytes, by name.
        captions (str): text, by the name of the figure; it is escaped.
    """
    parts = []
    for name, caption in captions.items():
        data = base64.b64encode(figures[name]).decode()
        caption = escape(caption)
        parts.append(
            f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{caption}">'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    return f'<div class="pair">{"".join(parts)}</div>'


def table(names: Iterable[str], rows: Iterable[Sequence], text_columns: int = 1) -> str:
    """A table.

    Args:
        names (iterable of str): of the columns.
        rows (iterable of sequence): what stands in the columns; it is escaped.
        text_columns (int): so many columns at the left are words, the others numbers.
    """

    def cells(kind, words):
        return "".join(
            f"<{kind}{' class=number' if column >= text_columns else ''}>"
            f"{escape(str(word))}</{kind}>"
            for column, word in enumerate(words)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table><thead><tr>{cells("th", names)}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def table_of(rows: Iterable[dict], columns: dict[str, Callable]) -> str:
    """A table of the report's JSON as a table of the page.

    Args:
        rows (iterable of dict): of the table.
        columns (dict): by the name of a column, a function that takes a row and gives a word.
    """
    return table(columns, [[column(row) for column in columns.values()] for row in rows])


def interval(change: dict) -> str:
    """``low`` to ``high`` of a change, or that there is none."""
    if change["low"] is None:
        return NONE
    return f"{percent(change['low'])} to {percent(change['high'])}"


def number(value: float, decimals: int = 2, sign: str = "") -> str:
    """A number in words.

    Args:
        value (float): may be infinite.
        decimals (int): digits behind the point.
        sign (str): ``+`` where positive numbers have one as well.
    """
    return f"{value:{sign},.{decimals}f}" if math.isfinite(value) else "infinite"


def percent(value: float, sign: str = "+", decimals: int = 1) -> str:
    """A share in percent, see ``number``."""
    return f"{value:{sign}.{decimals}%}" if math.isfinite(value) else "infinite"


def factor(log_ratio: float) -> str:
    """The ratio of which *log_ratio* is the natural logarithm."""
    return f"{math.exp(min(log_ratio, 700.0)):.2f}"
