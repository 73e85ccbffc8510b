"""What is known of tokens and of their memories, from numbers made by hand."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.small import make_dictionary

from fairseq_knnlm.errors import UserError
from fairseq_knnlm.files import json_bytes
from fairseq_knnlm.inspection import as_html, as_text, tokens
from fairseq_knnlm.inspection.tokens import Inspector, Lines, Passage
from fairseq_knnlm.neighbors import Neighbors


@pytest.mark.parametrize(
    "text, places",
    [
        ("a b$c$", [(1, 1, None), (1, 2, None), (1, 3, None), (2, 1, None), (2, 2, None)]),
        ("$a$$$b$c", [(1, 1, 1), (2, 1, 1), (2, 2, 1), (3, 1, 1), (4, 1, 1), (5, 1, 2), (5, 2, 2),
                      (6, 1, 2)]),
        ("ab", [(1, 1, None), (1, 2, None)]),
        ("$$", [(1, 1, 1), (2, 1, 1)]),
    ],
)  # fmt: skip
def test_lines_and_documents(text, places, monkeypatch):
    monkeypatch.setattr(tokens, "_BATCH_TOKENS", 3)
    ids = np.array([ord(char) for char in text if char != " "], dtype=np.uint8)
    lines = Lines(ids, eos=ord("$"))
    assert [lines.locate(position) for position in range(len(ids))] == places


class StoredText:
    """What an ``Inspector`` needs of a datastore: some positions of a text, in any order."""

    def __init__(self, text, positions=None):
        self.text = np.array(text, dtype=np.uint8)
        self._positions = np.arange(len(text)) if positions is None else np.array(positions)

    def __len__(self):
        return len(self._positions)

    def positions(self, rows):
        return self._positions[rows]

    def context(self, row, before, after):
        position = self._positions[row]
        return (
            self.text[max(0, position - before) : position],
            self.text[position + 1 : position + 1 + after],
        )


def strict_json(data):
    return json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_neighbors_that_are_not_there_are_not_shown():
    dictionary = make_dictionary(5)
    inspector = Inspector([StoredText([4, 5, 2])], dictionary, 1.0, 1.0, show=3, window=2)
    neighbors = Neighbors(
        torch.tensor([[0.5, np.inf, np.inf]]),
        torch.tensor([[5, 0, 0]]),
        torch.tensor([[1, -1, -1]]),
    )
    (token,) = inspector.tokens(7, torch.tensor([4]), torch.tensor([-1.0]), neighbors)
    assert [(n.token, n.weight, n.before, n.after) for n in token.neighbors] == [
        ("w1", 1.0, ["w0"], ["</s>"])
    ]
    assert (token.p_knn, token.p_mixture, token.log_ratio) == (0.0, 0.0, -np.inf)
    passage = Passage("text", {"datastore": "d", "k": 3}, [token], datastores=1)
    written = strict_json(json_bytes(passage.to_dict()))
    assert written["tokens"][0]["log_ratio"] is None
    assert written["perplexity"]["mixture"] is None
    assert "-inf" in "\n".join(as_text.render(passage))
    assert "-inf" in as_html.render(passage)


def test_a_token_without_any_neighbor_keeps_the_probability_of_the_model():
    """There is no p_knn to mix in, and none to show."""
    inspector = Inspector([StoredText([4, 5, 2])], make_dictionary(5), 0.25, 1.0)
    nothing = Neighbors(
        torch.full((1, 2), np.inf), torch.zeros(1, 2, dtype=torch.long), torch.full((1, 2), -1)
    )
    (token,) = inspector.tokens(0, torch.tensor([4]), torch.tensor([-1.0]), nothing)
    assert math.isnan(token.p_knn) and token.neighbors == [] and token.matching == 0
    assert (token.p_mixture, token.log_ratio) == (token.p_lm, 0.0)
    written = strict_json(json_bytes(Passage("text", {"k": 2}, [token], 1).to_dict()))
    assert written["tokens"][0]["p_knn"] is None


def test_a_row_need_not_be_the_position_in_the_text():
    """The second of two datastores holds three entries of its text, the last of the text first."""
    text = [4, 5, 2, 2, 6, 7, 8, 2]  # two documents, the second on line 3
    stored = [StoredText([9, 2]), StoredText(text, positions=[6, 0, 4])]
    inspector = Inspector(stored, make_dictionary(6), 0.5, 1.0, show=3, window=2)
    neighbors = Neighbors(
        torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[8, 4, 6]]), torch.tensor([[2, 3, 4]])
    )
    (token,) = inspector.tokens(0, torch.tensor([4]), torch.tensor([-1.0]), neighbors)
    assert [(n.datastore, n.row, n.token, n.before, n.after) for n in token.neighbors] == [
        (1, 0, "w4", ["w2", "w3"], ["</s>"]),
        (1, 1, "w0", [], ["w1", "</s>"]),
        (1, 2, "w2", ["</s>", "</s>"], ["w3", "w4"]),
    ]
    assert [(n.line, n.place, n.document) for n in token.neighbors] == [
        (3, 3, 2), (1, 1, 1), (3, 1, 2),
    ]  # fmt: skip


def test_what_the_memory_would_have_said_adds_up_equal_values():
    """exp(-d) is 8, 4, 2, 2, 1 over 17 and 0 for the last, which is no neighbour."""
    distances = -np.log([[8.0, 4.0, 2.0, 2.0, 1.0, 1.0]])
    distances[0, 5] = np.inf
    neighbors = Neighbors(
        torch.tensor(distances, dtype=torch.float32),
        torch.tensor([[4, 5, 6, 5, 6, 0]]),
        torch.tensor([[0, 1, 2, 3, 4, -1]]),
    )
    inspector = Inspector([StoredText([4, 5, 6, 5, 6, 2])], make_dictionary(9), 0.25, 1.0)
    (token,) = inspector.tokens(0, torch.tensor([5]), torch.tensor([-1.0]), neighbors)
    assert [(guess.token, guess.matches) for guess in token.knn_guesses] == [
        ("w0", False), ("w1", True), ("w2", False),
    ]  # fmt: skip
    assert [guess.p for guess in token.knn_guesses] == pytest.approx([8 / 17, 6 / 17, 3 / 17])
    assert token.knn_guesses[1].p == pytest.approx(token.p_knn)
    assert token.lm_guesses == []


def test_five_guesses_of_each_and_no_more():
    values = torch.arange(4, 12)[None]  # eight of them, the first the nearest
    neighbors = Neighbors(torch.arange(8.0)[None], values, torch.arange(8)[None])
    inspector = Inspector([StoredText(list(range(4, 12)))], make_dictionary(9), 0.25, 1.0)
    log_probs = torch.tensor([[0.5, 0.2, 0.1, 0.05, 0.04, 0.03]]).log()
    top = log_probs, torch.tensor([[9, 8, 7, 6, 5, 4]])
    (token,) = inspector.tokens(0, torch.tensor([8]), torch.tensor([-1.0]), neighbors, lm_top=top)
    assert [guess.token for guess in token.knn_guesses] == ["w0", "w1", "w2", "w3", "w4"]
    assert [guess.token for guess in token.lm_guesses] == ["w5", "w4", "w3", "w2", "w1"]
    assert [guess.p for guess in token.lm_guesses] == pytest.approx([0.5, 0.2, 0.1, 0.05, 0.04])
    assert [guess.matches for guess in token.lm_guesses] == [False, True, False, False, False]
    (written,) = strict_json(json_bytes(Passage("text", {"k": 8}, [token], 1).to_dict()))["tokens"]
    assert written["lm_guesses"][1] == {"token": "w4", "p": pytest.approx(0.2), "matches": True}


@pytest.mark.parametrize(
    "changed, parts",
    [
        ({"datastores": []}, ["datastores", "one or more", "got 0"]),
        ({"knn_lambda": 1.5}, ["knn_lambda", "in [0, 1]", "got 1.5"]),
        ({"temperature": 0.0}, ["temperature", "> 0", "got 0.0"]),
        ({"show": 0}, ["show", ">= 1", "got 0"]),
        ({"window": -1}, ["window", ">= 0", "got -1"]),
    ],
    ids=str,
)
def test_what_an_inspector_cannot_be(changed, parts):
    arguments = {
        "datastores": [StoredText([4])], "dictionary": make_dictionary(5), "knn_lambda": 0.5,
        "temperature": 1.0, **changed,
    }  # fmt: skip
    with pytest.raises(UserError) as error:
        Inspector(**arguments)
    assert all(part in str(error.value) for part in parts), str(error.value)
