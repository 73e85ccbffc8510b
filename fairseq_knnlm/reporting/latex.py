"""Tables for papers: LaTeX with the rules of the booktabs package."""

import re
from collections.abc import Iterable

from .text_tables import TextTable

_ESCAPED = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "\N{EN DASH}": r"\textendash{}", "\N{MULTIPLICATION SIGN}": r"$\times$",
    **{char: "\\" + char for char in "&%$#_{}"},
}  # fmt: skip


def latex(table: TextTable) -> str:
    """A ``tabular`` to be put into a ``table``.

    Args:
        table (TextTable): what it shows.

    Returns:
        str: lines of LaTeX; ``"`` needs the font encoding T1.
    """
    numbers = len(table.columns) - table.text_columns
    caption = " ".join(table.caption.split())
    return "\n".join(
        (
            f"% {caption}. Needs \\usepackage{{booktabs}} and \\usepackage[T1]{{fontenc}}",
            rf"\begin{{tabular}}{{{'l' * table.text_columns}{'r' * numbers}}}",
            r"\toprule",
            _line(table.columns, len(table.columns)),
            r"\midrule",
            *(_line(row, table.text_columns) for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        )
    )


def escape(text: str) -> str:
    """Text as LaTeX prints it letter for letter."""
    escaped = "".join(_ESCAPED.get(char, char) for char in re.sub(r"[\r\n]+", " ", text))
    # or else LaTeX makes one sign of two
    return re.sub(r"([`'?!,-])(?=[`',-])", r"\1{}", escaped)


def _line(words: Iterable[str], text_columns: int) -> str:
    cells = [
        escape(word) if column < text_columns else _number(word)
        for column, word in enumerate(words)
    ]
    return " & ".join(cells) + r" \\"


def _number(word: str) -> str:
    """A number in words, its minus signs as long as its plus signs."""
    return re.sub(r"(?<!\S)-(?=\d)", "$-$", escape(word))
