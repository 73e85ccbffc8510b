"""Tables for papers."""

import pytest

from fairseq_knnlm.reporting.latex import escape, latex
from fairseq_knnlm.reporting.text_tables import TextTable


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a & b", r"a \& b"),
        ("50% of $1_000 {#}", r"50\% of \$1\_000 \{\#\}"),
        ("<unk>", r"\textless{}unk\textgreater{}"),
        ("\\", r"\textbackslash{}"),
        ("~^", r"\textasciitilde{}\textasciicircum{}"),
        ("1\N{EN DASH}9", r"1\textendash{}9"),
        ("\N{MULTIPLICATION SIGN}2", r"$\times$2"),
        # neither dashes nor quotation marks
        ("a -- b", "a -{}- b"),
        ("--- ``x''", "-{}-{}- `{}`x'{}'"),
        ("two\nlines", "two lines"),
        ("caf\N{LATIN SMALL LETTER E WITH ACUTE}", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
    ],
)
def test_text_is_printed_letter_for_letter(text, expected):
    assert escape(text) == expected


def test_a_table():
    table = TextTable("What it\nshows", ["word", "n", "%"], [["a_b", "-1.5", "x-1"]], 1)
    assert latex(table).splitlines() == [
        r"% What it shows. Needs \usepackage{booktabs} and \usepackage[T1]{fontenc}",
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"word & n & \% \\",
        r"\midrule",
        r"a\_b & $-$1.5 & x-1 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
