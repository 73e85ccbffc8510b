"""What is printed of a passage."""

import math
import re

from helpers.passages import make_passage

from fairseq_knnlm.inspection import as_text


def test_colors_change_nothing_but_colors():
    passage = make_passage()
    plain = list(as_text.render(passage))
    colored = list(as_text.render(passage, color=True))
    assert plain != colored
    assert [re.sub(r"\x1b\[\d+m", "", line) for line in colored] == plain


def test_places_name_the_datastore_only_among_several():
    passage = make_passage()
    one, several = (
        "\n".join(as_text.render(passage._replace(datastores=count))) for count in (1, 2)
    )
    assert "datastore 1, document 2, line 5" in several
    assert "datastore 1," not in one and "document 2, line 5" in one


def test_without_any_neighbor_there_is_no_p_knn():
    passage = make_passage(["w"], log_ratio=0.0)
    (token,) = passage.tokens
    token = token._replace(p_knn=math.nan, matching=0, neighbors=[])
    printed = "\n".join(as_text.render(passage._replace(tokens=[token])))
    assert re.search(r"p_knn none +mixture 0\.1 +ln \+0\.00$", printed)
