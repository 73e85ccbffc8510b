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
    assert re.search(r"p_knn none +mixture 0\.1 +ln \+0\.00$", printed, re.M)


def test_what_they_would_have_said_has_a_line_each_where_it_is_known():
    passage = make_passage(["w"])
    assert "         the model says <u>' 0.3" in list(as_text.render(passage))
    assert '         the memory says "&gt; 0.2' in list(as_text.render(passage))
    (token,) = passage.tokens
    unknown = passage._replace(tokens=[token._replace(lm_guesses=[], knn_guesses=[])])
    assert not any(" says " in line for line in as_text.render(unknown))


def test_the_lambda_of_a_gate_stands_at_its_token():
    passage = make_passage(["a", "b"])
    tokens = [
        token._replace(knn_lambda=weight) for token, weight in zip(passage.tokens, (0.125, 0.1875))
    ]
    passage = passage._replace(tokens=tokens)
    for gated, expected in ((True, ["lambda 0.125", "lambda 0.188"]), (False, [])):
        lines = [line.strip() for line in as_text.render(passage._replace(gated=gated))]
        assert [line for line in lines if line.startswith("lambda 0.1")] == expected
