"""The page of a passage."""

import math
import re

import numpy as np
import pytest
from helpers.page import Page
from helpers.passages import make_passage

from fairseq_knnlm.inspection import as_html
from fairseq_knnlm.inspection.tokens import Guess

NASTY = """<script>alert("1")</script>'&amp;"""


def with_nasty_texts(passage):
    """The same with the text of every field replaced by what HTML must not see."""
    guess = Guess(f"g {NASTY}", 0.5, False)
    tokens = [
        token._replace(
            text=f"t {NASTY}",
            neighbors=[
                memory._replace(token=f"n {NASTY}", before=[f"b {NASTY}"], after=[f"a {NASTY}"])
                for memory in token.neighbors
            ],
            lm_guesses=[guess],
            knn_guesses=[guess._replace(token=f"k {NASTY}")],
        )
        for token in passage.tokens
    ]
    settings = {**passage.settings, f"f {NASTY}": f"v {NASTY}"}
    return passage._replace(source=f"s {NASTY}", tokens=tokens, settings=settings)


def test_page_escapes_what_it_shows():
    passage = make_passage()
    text = as_html.render(passage)
    page = Page(text)
    assert page.tags.count("script") == 1 and "b" in page.tags and "i" in page.tags
    assert "alert" not in re.search(r"<script>(.*?)</script>", text, re.S).group(1)
    for token in passage.tokens:
        assert page.text_of[f"t{token.index}"] == token.text
        memory = re.sub(r"\s+", " ", page.text_of[f"m{token.index}"])
        assert f"{token.text} token {token.index}" in memory
        assert "<i> a <b> </p> http://x.test/" in memory
        assert "document 2, line 5, token 6, row 1,234" in memory
        assert ("sees <unk>" in memory) == token.unknown


def test_nothing_of_a_passage_becomes_a_tag_or_an_attribute():
    plain, nasty = (
        Page(as_html.render(passage))
        for passage in (make_passage(), with_nasty_texts(make_passage()))
    )
    fact = ["div", "dt", "dd"]  # one setting more
    assert sorted(nasty.tags) == sorted([*plain.tags, *fact])
    assert {name for _, name, _ in nasty.attributes} == {name for _, name, _ in plain.attributes}
    for start in "tnbagkfvs":
        assert f"{start} {NASTY}" in nasty.text
    labels = [value for _, name, value in nasty.attributes if name == "aria-label"]
    assert any(value.startswith(f"t {NASTY}") for value in labels)


def test_what_they_would_have_said():
    page = Page(as_html.render(make_passage()))
    memory = re.sub(r"\s+", " ", page.text_of["m0"])
    assert "the model <u>' 0.3 the memory \"&gt; 0.2" in memory
    assert ("span", "class", "guess same") in page.attributes


def test_bars_are_relative_to_the_largest_weight():
    passage = make_passage(["w"])
    (token,) = passage.tokens
    (memory,) = token.neighbors
    neighbors = [memory._replace(weight=weight) for weight in (0.04, 0.02, 0.001)]
    page = Page(as_html.render(passage._replace(tokens=[token._replace(neighbors=neighbors)])))
    widths = [value for tag, name, value in page.attributes if (tag, name) == ("i", "style")]
    assert widths == ["width: 100.0%", "width: 50.0%", "width: 2.5%"]


def test_labels_say_what_colours_say():
    passage = make_passage(["word", "odd"])
    labels = [
        value for tag, name, value in Page(as_html.render(passage)).attributes
        if tag == "a" and name == "aria-label"
    ]  # fmt: skip
    assert "word: 0.1 becomes 0.165, \N{MULTIPLICATION SIGN}1.65" in labels
    assert any(label.startswith("odd, unknown to the model: ") for label in labels)


def changed(*pairs):
    """Tokens of these p_lm and p_mixture."""
    (token,) = make_passage(["w"]).tokens
    return [
        token._replace(index=i, p_lm=lm, p_mixture=mixture, log_ratio=math.log(mixture / lm))
        for i, (lm, mixture) in enumerate(pairs)
    ]


def test_of_those_hurt_alike_the_surest_come_first():
    """Where no neighbour has the token all log-ratios are ln(1 - lambda), but for rounding."""
    tokens = changed(
        (0.001, 0.00075001), (0.9, 0.675), (0.5, 0.37499), (0.2, 0.18), (0.1, 0.06), (0.5, 0.51)
    )
    helped, hurt = as_html.extremes(tokens)
    assert [token.index for token in hurt] == [4, 1, 2, 0, 3]
    assert helped == []


def test_ten_of_those_helped_most():
    tokens = changed(*((0.01, 0.01 * (step + 2)) for step in range(12)), (0.02, 0.26))
    helped, hurt = as_html.extremes(tokens)
    # the last two rose alike, by a factor of 13, the last of them by more
    assert [token.index for token in helped] == [12, 11, *range(10, 2, -1)]
    assert hurt == []


def test_shades_are_ordered_and_symmetric():
    ratios = [0.1, 0.6, 0.9, 1.0, 1.1, 1.5, 5.0]
    assert [as_html.shade(np.log(ratio)) for ratio in ratios] == list(range(7))
    assert as_html.shade(-np.inf) == 0


def luminance(color):
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(one, other):
    """WCAG 2.1, 1.4.3."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_on_every_background(scheme):
    page = as_html.render(make_passage())
    palettes = re.findall(r":root {(.*?)}", page, re.S)  # light and dark of all pages, and of this
    of_scheme = "".join(palettes[0::2] if scheme == "light" else palettes[1::2])
    colors = dict(re.findall(r"--([\w-]+): (#\w+|transparent);", of_scheme))
    for background in [f"s{number}" for number in range(7)]:
        behind = colors[background].replace("transparent", colors["paper"])
        assert contrast(behind, colors[f"{background}-ink"]) >= 4.5
    for ink in ("ink", "faint"):
        assert contrast(colors["paper"], colors[ink]) >= 4.5
    assert contrast(colors["accent-paper"], colors["ink"]) >= 4.5


def test_places_name_the_datastore_only_among_several():
    passage = make_passage()
    one, several = (as_html.render(passage._replace(datastores=count)) for count in (1, 2))
    assert "datastore 1, document 2, line 5" in several
    assert "datastore 1," not in one and "document 2, line 5" in one


def test_without_any_neighbor_there_is_no_p_knn():
    passage = make_passage(["w"], log_ratio=0.0)
    (token,) = passage.tokens
    token = token._replace(p_knn=math.nan, matching=0, neighbors=[])
    page = as_html.render(passage._replace(tokens=[token]))
    assert "<td>0.1</td><td>\N{EN DASH}</td><td>0.1</td>" in page and "nan" not in page
