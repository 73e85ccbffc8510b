"""``fairseq-knnlm-inspect``: the numbers, the contexts, the page, and what it refuses."""

import html.parser
import io
import json
import re
import sys
import types

import numpy as np
import oracle
import pytest
import torch
from conftest import build, command, knnlm, run
from helpers import make_dictionary

from fairseq_knnlm import inspection_html, inspection_text
from fairseq_knnlm.cli import inspect
from fairseq_knnlm.context import BlockDataset, ChunkCollater, only_rows
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.inspection import Inspection, Inspector, Lines, Neighbor, Token
from fairseq_knnlm.interpolation import knn_weights
from fairseq_knnlm.neighbors import Neighbors

K, LAMBDA, TEMPERATURE = 12, 0.3, 4.0


@pytest.fixture
def look(data, checkpoints, datastores, tmp_path, capsys):
    """Run the command in this process; gives what it writes as JSON, and what it prints."""

    def call(*flags, name="plain", datastore=None):
        written = tmp_path / "inspected.json"
        capsys.readouterr()
        inspect.main([str(word) for word in (
            data, "--path", checkpoints[name], "--knn-datastore", datastore or datastores[name],
            "--knn-k", K, "--knn-lambda", LAMBDA, "--knn-temperature", TEMPERATURE, "--cpu",
            "--tokens-per-sample", 32, "--num-workers", 0, "--log-format", "none",
            "--json", written, *flags,
        )])  # fmt: skip
        return {**json.loads(written.read_text()), "printed": capsys.readouterr().out}

    return call


def text_of(data, split):
    """The lines that the split was made of."""
    return (data.parent / f"{split}.txt").read_text().split("\n")[:-1]


def column(found, name):
    return np.array([token[name] for token in found["tokens"]])


def scores(data, checkpoint, datastore, context_window=0, split="valid"):
    """p_lm and p_knn of a split, by the oracle."""
    keys, values = (np.load(datastore / f"{name}.npy") for name in ("keys", "values"))
    task, model = oracle.load(data, checkpoint, 32 - context_window)
    queries, targets, log_p_lm = oracle.score(task, model, split, context_window)
    log_p_knn = oracle.knn_log_probs(keys, values, queries, targets, K, TEMPERATURE)
    return targets, np.exp(log_p_lm), np.exp(log_p_knn)


# -- the numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "adaptive"])
def test_probabilities_are_those_of_the_oracle(look, data, checkpoints, datastores, name):
    found = look("--positions", "100:170", "--knn-show-neighbors", K, name=name)
    targets, p_lm, p_knn = (
        part[100:170] for part in scores(data, checkpoints[name], datastores[name])
    )
    mixture = LAMBDA * p_knn + (1 - LAMBDA) * p_lm
    assert column(found, "index").tolist() == list(range(100, 170))
    np.testing.assert_allclose(column(found, "p_lm"), p_lm, rtol=1e-4)
    np.testing.assert_allclose(column(found, "p_knn"), p_knn, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(column(found, "p_mixture"), mixture, rtol=1e-3)
    np.testing.assert_allclose(column(found, "log_ratio"), np.log(mixture / p_lm), atol=1e-3)
    assert column(found, "log_ratio").min() >= np.log(1 - LAMBDA) - 1e-6
    assert found["perplexity"]["lm"] == pytest.approx(np.exp(-np.log(p_lm).mean()), rel=1e-4)
    assert found["perplexity"]["mixture"] == pytest.approx(
        np.exp(-np.log(mixture).mean()), rel=1e-4
    )
    for token in found["tokens"]:  # all k are shown
        weights = [neighbor["weight"] for neighbor in token["neighbors"]]
        distances = [neighbor["distance"] for neighbor in token["neighbors"]]
        same = [neighbor["matches"] for neighbor in token["neighbors"]]
        assert sum(weights) == pytest.approx(1.0, abs=1e-5)
        assert distances == sorted(distances)
        assert np.dot(weights, same) == pytest.approx(token["p_knn"], abs=1e-5)
        assert sum(same) == token["matching"]


def test_positions_with_a_context_window(look, data, checkpoints, datastores):
    """Blocks before the first position serve as its context, and are not looked at."""
    flags = ["--context-window", 20, "--positions", "200:225"]
    found = look(*flags)
    _, p_lm, p_knn = scores(data, checkpoints["plain"], datastores["plain"], context_window=20)
    np.testing.assert_allclose(column(found, "p_lm"), p_lm[200:225], rtol=1e-4)
    np.testing.assert_allclose(column(found, "p_knn"), p_knn[200:225], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("mode", ["none", "complete", "complete_doc", "eos"])
@pytest.mark.parametrize(
    "flags",
    [[], ["--add-bos-token", "--tokens-per-sample", 31], ["--context-window", 8]],
    ids=["", "bos", "context"],
)
def test_a_text_is_scored_as_its_split_is(look, data, mode, flags):
    """The whole of a split, as text and as positions, in every way of cutting blocks."""
    flags = ["--sample-break-mode", mode, "--gen-subset", "test", *flags]
    as_text = look("--input", data.parent / "test.txt", *flags)
    as_split = look("--positions", f"0:{len(as_text['tokens'])}", *flags)
    with pytest.raises(UserError):  # that was all of it
        look("--positions", f"0:{len(as_text['tokens']) + 1}", *flags)
    assert as_text["tokens"] == as_split["tokens"]
    lines = [line for line in text_of(data, "test") if line or mode != "complete_doc"]
    words = " </s> ".join(lines).split() + ["</s>"]
    assert column(as_text, "text").tolist() == words


def test_one_position_is_that_of_many(look):
    many = look("--positions", "0:100", "--context-window", 8)["tokens"]
    for position in (0, 1, 23, 24, 99):
        positions = f"{position}:{position + 1}"
        (one,) = look("--positions", positions, "--context-window", 8)["tokens"]
        assert one["text"] == many[position]["text"]
        assert one["p_mixture"] == pytest.approx(many[position]["p_mixture"], rel=1e-5)


def test_words_of_eval_lm_have_its_probabilities(look, data, checkpoints, tmp_path):
    """Against the stock command's own output for each word."""
    stock = run(
        command("fairseq-eval-lm"), data, "--path", checkpoints["plain"], "--cpu",
        "--gen-subset", "valid", "--tokens-per-sample", 32, "--output-word-probs",
    ).stdout  # fmt: skip
    expected = re.findall(r"(\S+) \[(-?[\d.]+)\]", stock)
    found = look("--positions", f"0:{len(text_of(data, 'valid')[0].split()) + 1}")["tokens"]
    log_probs = {(word, float(log_prob)) for word, log_prob in expected}
    assert len(log_probs) > 100
    for token in found:
        assert any(
            word == token["text"] and log_prob == pytest.approx(np.log(token["p_lm"]), abs=1e-3)
            for word, log_prob in log_probs
        )


def test_weights_of_few_neighbors():
    distances = torch.tensor([[1.0, 3.0, np.inf], [np.inf, np.inf, np.inf], [1e30, 1e30, np.inf]])
    weights = knn_weights(distances, 2.0)
    first = 1 / (1 + np.exp(-1.0))
    expected = [[first, 1 - first, 0], [0, 0, 0], [0.5, 0.5, 0]]
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    with pytest.raises(UserError):
        knn_weights(distances, 0.0)


def test_only_rows():
    items = [
        {"source": torch.arange(n) + 10 * n, "target": torch.arange(n) + 10 * n + 1}
        for n in (3, 5, 4)
    ]
    blocks = BlockDataset(items, np.array([3, 5, 4]), pad=1)
    sample = ChunkCollater(1, max_tokens=5)([blocks[i] for i in range(3)])
    part = only_rows(sample, 2, 5)
    assert part["target"].tolist() == sample["target"][2:5].tolist() == [33, 51, 52]
    assert part["target_lengths"] == [1, 2, 0] and part["ntokens"] == 3
    assert sorted(torch.cat([batch["rows"] for batch in part["batches"]]).tolist()) == [0, 1, 2]
    assert len(part["batches"]) == 2  # the block without any of these rows is not fed
    for batch in part["batches"]:
        inputs = batch["src_tokens"].flatten()[batch["positions"]]
        assert (inputs + 1).tolist() == part["target"][batch["rows"]].tolist()


# -- the memories ------------------------------------------------------------------------------


def test_contexts_are_those_of_the_text(look, data):
    lines = [[*line.split(), "</s>"] for line in text_of(data, "train")]
    corpus = [word for line in lines for word in line]
    starts = np.cumsum([0, *map(len, lines)])
    documents = np.cumsum([i == 0 or lines[i - 1] == ["</s>"] for i in range(len(lines))])
    found = look("--positions", "0:40", "--window", 5, "--knn-show-neighbors", 4)
    neighbors = [neighbor for token in found["tokens"] for neighbor in token["neighbors"]]
    assert len(neighbors) >= 160
    for neighbor in neighbors:
        row = neighbor["row"]
        assert neighbor["token"] == corpus[row]
        assert neighbor["before"] == corpus[max(0, row - 5) : row]
        assert neighbor["after"] == corpus[row + 1 : row + 6]
        line = neighbor["line"] - 1
        assert starts[line] + neighbor["place"] - 1 == row
        assert neighbor["document"] == documents[line]


def test_the_nearest_with_the_token_itself_is_shown(look):
    """Wherever the neighbours give the token any probability, one that does is among them."""
    all_of_them = look("--positions", "0:60", "--knn-show-neighbors", K)["tokens"]
    found = look("--positions", "0:60", "--knn-show-neighbors", 2)["tokens"]
    beyond = 0
    for token, whole in zip(found, all_of_them):
        matches = [neighbor["rank"] for neighbor in whole["neighbors"] if neighbor["matches"]]
        ranks = [1, 2] + [rank for rank in matches[:1] if rank > 2]
        assert token["neighbors"] == [whole["neighbors"][rank - 1] for rank in ranks]
        beyond += len(ranks) > 2
    assert beyond > 0


def test_neighbors_of_several_datastores(look, data, checkpoints, datastores, tmp_path):
    build(
        data, checkpoints["plain"], tmp_path / "v", "--gen-subset", "valid", "--knn-index", "Flat"
    )
    both = f"{datastores['plain']}:{tmp_path / 'v'}"
    found = look("--positions", "40:80", datastore=both)
    values = [np.load(path / "values.npy") for path in (datastores["plain"], tmp_path / "v")]
    nearest = [token["neighbors"][0] for token in found["tokens"]]
    # valid is looked at, and is in the second: every token finds itself
    assert [neighbor["row"] for neighbor in nearest if neighbor["datastore"] == 1] != []
    assert all(neighbor["distance"] < 1e-2 for neighbor in nearest)
    neighbors = [neighbor for token in found["tokens"] for neighbor in token["neighbors"]]
    assert {neighbor["datastore"] for neighbor in neighbors} == {0, 1}
    task, _ = oracle.load(data, checkpoints["plain"], 32)
    for neighbor in neighbors:
        value = values[neighbor["datastore"]][neighbor["row"]]
        assert task.target_dictionary[int(value)] == neighbor["token"]
    assert "datastore 2, document" in found["printed"]


def test_a_datastore_without_the_lines_between_documents(
    look, data, checkpoints, datastores, tmp_path
):
    build(
        data, checkpoints["plain"], tmp_path / "d", "--knn-index", "Flat",
        "--sample-break-mode", "complete_doc",
    )  # fmt: skip
    found = look("--positions", "0:3", datastore=tmp_path / "d")
    assert {n["document"] for token in found["tokens"] for n in token["neighbors"]} == {None}


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
    from fairseq_knnlm import inspection

    monkeypatch.setattr(inspection, "_ROWS", 3)
    values = np.array([ord(char) for char in text if char != " "], dtype=np.uint8)
    lines = Lines(values, eos=ord("$"))
    assert [lines.locate(row) for row in range(len(values))] == places


class StoredValues:
    """What an ``Inspector`` needs of a datastore."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)


def test_neighbors_that_are_not_there_are_not_shown():
    dictionary = make_dictionary(5)
    datastore = StoredValues(np.array([4, 5, 2], dtype=np.uint8))
    inspector = Inspector([datastore], dictionary, 1.0, 1.0, show=3, window=2)
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
    inspection = Inspection("text", {"datastore": "d", "k": 3}, [token])
    assert inspection.to_dict()["tokens"][0]["log_ratio"] is None
    assert inspection.to_dict()["perplexity"]["mixture"] is None
    json.dumps(inspection.to_dict(), allow_nan=False)
    assert "-inf" in "\n".join(inspection_text.render(inspection))
    assert "-inf" in inspection_html.render(inspection)


# -- the text that was written -----------------------------------------------------------------


def test_unknown_words_keep_their_spelling(look, tmp_path):
    text = tmp_path / "text"
    text.write_text("w1 <script>alert(1)</script> w2\n\nw3 <unk>")
    found = look("--input", text)
    assert column(found, "text").tolist() == [
        "w1", "<script>alert(1)</script>", "w2", "</s>", "</s>", "w3", "<unk>", "</s>",
    ]  # fmt: skip
    assert column(found, "unknown").nonzero()[0].tolist() == [1, 6]
    replaced = look("--input", _written(tmp_path / "other", "w1 <unk> w2\n\nw3 <unk>\n"))
    for one, other in zip(found["tokens"], replaced["tokens"]):
        assert one["p_mixture"] == other["p_mixture"]


def _written(path, text):
    path.write_text(text)
    return path


def test_standard_input(look, tmp_path, monkeypatch):
    text = "w1 w2 w3\nw4 w5\n"
    stream = types.SimpleNamespace(buffer=io.BytesIO(text.encode()))
    from_file = look("--input", _written(tmp_path / "text", text))
    monkeypatch.setattr(sys, "stdin", stream)
    assert look("--input", "-")["tokens"] == from_file["tokens"]


def test_a_long_text_is_cut_in_blocks_and_never_short(look, tmp_path):
    words = [f"w{i % 120}" for i in range(500)]
    found = look("--input", _written(tmp_path / "text", " ".join(words)))
    assert column(found, "text").tolist() == [*words, "</s>"]


def test_raw_text_with_a_tokenizer(look, tmp_path):
    pytest.importorskip("sacremoses")
    found = look("--input", _written(tmp_path / "text", "w1, w2."), "--tokenizer", "moses")
    assert column(found, "text").tolist() == ["w1", ",", "w2", ".", "</s>"]


# -- what is printed ---------------------------------------------------------------------------


def test_terminal_output(data, checkpoints, datastores, tmp_path):
    text = _written(tmp_path / "text", "w1 w2 " + "x" * 40 + " \x1b[31m w3 w4\n")
    done = knnlm(
        "fairseq-knnlm-inspect", data, "--path", checkpoints["plain"], "--knn-datastore",
        datastores["plain"], "--knn-k", 8, "--tokens-per-sample", 32, "--cpu", "--input", text,
        "--log-format", "none",
    ).stdout  # fmt: skip
    printed = done[done.index(f"{text}: 7 tokens") :]
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines()[len(str(text)) > 60 :])) <= 100
    assert re.search(
        r"^ +0  w1 +p_lm [\d.e-]+ +p_knn [\d.e-]+ +mixture [\d.e-]+ +ln ", printed, re.M
    )
    assert "x" * 40 + " (the model sees <unk>)" in printed
    assert len(re.findall(r"^ +[123]\. [= ] weight [\d.]+ +distance [\d.]+", printed, re.M)) == 21
    assert len(re.findall(r"document \d+, line \d+, token \d+, row [\d,]+$", printed, re.M)) >= 21


def test_colors_only_where_they_are_wanted():
    terminal, file = (types.SimpleNamespace(isatty=lambda tty=tty: tty) for tty in (True, False))
    assert inspect._wants_color(terminal, {"TERM": "xterm"})
    assert not inspect._wants_color(terminal, {"TERM": "xterm", "NO_COLOR": "1"})
    assert inspect._wants_color(terminal, {"TERM": "xterm", "NO_COLOR": ""})
    assert not inspect._wants_color(terminal, {"TERM": "dumb"})
    assert not inspect._wants_color(file, {"TERM": "xterm"})


def test_colors_change_nothing_but_colors():
    inspection = make_inspection()
    plain = list(inspection_text.render(inspection))
    colored = list(inspection_text.render(inspection, color=True))
    assert plain != colored
    assert [re.sub(r"\x1b\[\d+m", "", line) for line in colored] == plain


# -- the page ----------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """The tags of a page and their text; fails where they do not close."""

    VOID = {"meta", "link", "br"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], {}
        self.open = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes).get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for name in {name for _, name in self.open if name}:
            self.text[name] = self.text.get(name, "") + data


def make_inspection(texts=("<script>alert(1)</script>", "&amp;", "</s>", '"x"'), log_ratio=0.5):
    neighbor = Neighbor(
        1, "<b>", True, 1.5, 0.25, ["<i>", "a"], ["</p>", "http://x.test/"], 0, 1234, 5, 6, 2
    )
    tokens = [
        Token(i, text, i == 1, text == "</s>", 0.1, 0.2, 0.1 * np.exp(log_ratio), log_ratio, 3,
              [neighbor])
        for i, text in enumerate(texts)
    ]  # fmt: skip
    settings = {"checkpoint": "<c>.pt", "datastore": "d&e", "k": 9, "lambda": 0.5}
    return Inspection("<source>", settings, tokens)


def test_page_escapes_what_it_shows():
    inspection = make_inspection()
    text = inspection_html.render(inspection)
    page = Page(text)
    assert page.tags.count("script") == 1 and "b" in page.tags and "i" in page.tags
    assert "alert" not in re.search(r"<script>(.*?)</script>", text, re.S).group(1)
    for token in inspection.tokens:
        assert page.text[f"t{token.index}"] == token.text
        memory = re.sub(r"\s+", " ", page.text[f"m{token.index}"])
        assert f"{token.text} token {token.index}" in memory
        assert "<i> a <b> </p> http://x.test/" in memory
        assert "document 2, line 5, token 6, row 1,234" in memory
        assert ("sees <unk>" in memory) == token.unknown


def test_page_of_a_text(look, data, tmp_path):
    file = tmp_path / "page.html"
    found = look("--input", data.parent / "valid.txt", "--html", file)
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    for token in found["tokens"]:
        assert page.text[f"t{token['index']}"] == token["text"]
        assert f"token {token['index']:,}" in page.text[f"m{token['index']}"]
    links = {value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert links == {f"m{token['index']}" for token in found["tokens"]}
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert {value for _, name, value in page.attributes if name in ("src", "href")} == {
        "data:,", *(f"#{name}" for name in links),
    }  # fmt: skip
    assert ("meta", "http-equiv", "Content-Security-Policy") in page.attributes


def test_shades_are_ordered_and_symmetric():
    ratios = [0.1, 0.6, 0.9, 1.0, 1.1, 1.5, 5.0]
    assert [inspection_html.shade(np.log(ratio)) for ratio in ratios] == list(range(7))
    assert inspection_html.shade(-np.inf) == 0


def test_text_on_every_shade_is_legible():
    """Contrast of at least 4.5 (WCAG 2.1, 1.4.3)."""

    def luminance(color):
        channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return linear @ [0.2126, 0.7152, 0.0722]

    for background, color in inspection_html._SHADES:
        both = sorted(luminance(each.replace("transparent", "#ffffff")) for each in
                      (background, color))  # fmt: skip
        assert (both[1] + 0.05) / (both[0] + 0.05) >= 4.5


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, parts",
    [
        ([], ["--input", "--positions", "neither"]),
        (["--input", "x", "--positions", "0:1"], ["--input", "--positions", "both"]),
        (["--input", "/nonesuch/text"], ["--input /nonesuch/text", "No such file"]),
        (["--input", "/"], ["--input /", "directory"]),
        (["--positions", "12"], ["--positions", "START:STOP", "'12'"]),
        (["--positions", "5:5"], ["--positions", "START < STOP", "'5:5'"]),
        (["--positions", "9:5"], ["--positions", "'9:5'"]),
        (["--positions=-3:5"], ["--positions", "'-3:5'"]),
        (["--positions", "0:1000000"], ["--positions 0:1000000", "'valid'", "target tokens"]),
        (["--positions", "0:1", "--gen-subset", "none"], ["no split 'none'"]),
        (["--positions", "0:1", "--html", "/nonesuch/x.html"], ["--html /nonesuch/x.html"]),
        (["--positions", "0:1", "--html", "/"], ["--html /", "cannot be written"]),
        (["--positions", "0:1", "--json", "/nonesuch/x.json"], ["--json /nonesuch/x.json"]),
        (["--positions", "0:1", "--knn-show-neighbors", 0], ["--knn-show-neighbors", ">= 1"]),
        (["--positions", "0:1", "--window", -1], ["--window", ">= 0"]),
        (["--positions", "0:1", "--max-tokens", 16], ["--max-tokens"]),
        (["--positions", "0:1", "--tokens-per-sample", 64], ["64", "32", "--tokens-per-sample"]),
        (["--input", "x", "--shorten-method", "truncate"], ["--shorten-method truncate"]),
    ],
    ids=str,
)
def test_refused(look, monkeypatch, flags, parts):
    monkeypatch.setattr(inspect, "encode_and_search", lambda *args: pytest.fail("it was searched"))
    with pytest.raises(UserError) as error:
        look(*flags)
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"", ["is empty"]),
        (b" \n\n\t\n", ["is empty"]),
        (b"caf\xe9", ["UTF-8", "byte 3"]),
        (b"nothing known\nin this text", ["none of the 5 words", "dictionary", "--tokenizer"]),
    ],
    ids=["empty", "blank", "latin-1", "unknown"],
)
def test_refused_texts(look, tmp_path, content, parts):
    file = tmp_path / "text"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        look("--input", file)
    assert all(part in str(error.value) for part in (str(file), *parts)), str(error.value)


def test_no_datastore(data, checkpoints):
    with pytest.raises(UserError) as error:
        inspect.main([str(data), "--path", str(checkpoints["plain"]), "--positions", "0:1"])
    assert "--knn-datastore is missing" in str(error.value)
