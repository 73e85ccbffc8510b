"""The page of a passage."""

import math
import re

import numpy as np
from helpers.page import Page
from helpers.passages import make_passage

from fairseq_knnlm.inspection import as_html


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


def test_shades_are_ordered_and_symmetric():
    ratios = [0.1, 0.6, 0.9, 1.0, 1.1, 1.5, 5.0]
    assert [as_html.shade(np.log(ratio)) for ratio in ratios] == list(range(7))
    assert as_html.shade(-np.inf) == 0


def test_text_on_every_shade_is_legible():
    """Contrast of at least 4.5 (WCAG 2.1, 1.4.3)."""

    def luminance(color):
        channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return linear @ [0.2126, 0.7152, 0.0722]

    for background, color in as_html._SHADES:
        both = sorted(luminance(each.replace("transparent", "#ffffff")) for each in
                      (background, color))  # fmt: skip
        assert (both[1] + 0.05) / (both[0] + 0.05) >= 4.5


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
