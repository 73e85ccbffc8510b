"""``fairseq-knnlm-inspect``: the numbers, the contexts, the page, and what it refuses."""

import io
import json
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from helpers import oracle
from helpers.commands import build, call, command, evaluate, knnlm, run
from helpers.page import Page

from fairseq_knnlm.cli import inspect
from fairseq_knnlm.cli.loading import load_task_and_model
from fairseq_knnlm.errors import UserError

K, LAMBDA, TEMPERATURE = 12, 0.3, 4.0


@pytest.fixture
def look(data, checkpoints, datastores, tmp_path, capsys):
    """Run the command in this process; gives what it writes as JSON and prints, or the text."""

    texts = data

    def look_at(*flags, name="plain", datastore=None, as_text=False, data=texts):
        written = tmp_path / "inspected.json"
        capsys.readouterr()
        call(
            inspect.main, data, "--path", checkpoints[name],
            "--knn-datastore", datastore or datastores[name],
            "--knn-k", K, "--knn-lambda", LAMBDA, "--knn-temperature", TEMPERATURE, "--cpu",
            "--tokens-per-sample", 32, "--num-workers", 0, "--log-format", "none",
            *(() if as_text else ("--json", written)), *flags,
        )  # fmt: skip
        printed = capsys.readouterr().out
        return printed if as_text else {**json.loads(written.read_text()), "printed": printed}

    return look_at


def text_of(data, split):
    """The lines that the split was made of."""
    return (data.parent / f"{split}.txt").read_text().split("\n")[:-1]


def column(result, name):
    return np.array([token[name] for token in result["tokens"]])


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
    result = look("--positions", "100:170", "--knn-show-neighbors", K, name=name)
    targets, p_lm, p_knn = (
        part[100:170] for part in scores(data, checkpoints[name], datastores[name])
    )
    mixture = LAMBDA * p_knn + (1 - LAMBDA) * p_lm
    assert column(result, "index").tolist() == list(range(100, 170))
    np.testing.assert_allclose(column(result, "p_lm"), p_lm, rtol=1e-4)
    np.testing.assert_allclose(column(result, "p_knn"), p_knn, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(column(result, "p_mixture"), mixture, rtol=1e-3)
    np.testing.assert_allclose(column(result, "log_ratio"), np.log(mixture / p_lm), atol=1e-3)
    assert column(result, "log_ratio").min() >= np.log(1 - LAMBDA) - 1e-6
    assert result["perplexity"]["lm"] == pytest.approx(np.exp(-np.log(p_lm).mean()), rel=1e-4)
    assert result["perplexity"]["mixture"] == pytest.approx(
        np.exp(-np.log(mixture).mean()), rel=1e-4
    )
    for token in result["tokens"]:  # all k are shown
        weights = [neighbor["weight"] for neighbor in token["neighbors"]]
        distances = [neighbor["distance"] for neighbor in token["neighbors"]]
        same = [neighbor["matches"] for neighbor in token["neighbors"]]
        assert sum(weights) == pytest.approx(1.0, abs=1e-5)
        assert distances == sorted(distances)
        assert np.dot(weights, same) == pytest.approx(token["p_knn"], abs=1e-5)
        assert sum(same) == token["matching"]


@pytest.mark.parametrize("name", ["plain", "adaptive"])
def test_what_the_model_would_have_said_is_the_top_of_its_softmax(look, data, checkpoints, name):
    """Against fairseq's own distribution over the whole vocabulary."""
    result = look("--positions", "64:96", name=name)  # the third block of 32
    task, model = oracle.load(data, checkpoints[name], 32)
    with oracle.numpy_compat():
        task.load_dataset("valid")
    block = task.dataset("valid")[2]
    with torch.no_grad():
        logits = model(block["source"][None])
        p_lm = model.get_normalized_probs(logits, log_probs=False)[0]
    for token, expected in zip(result["tokens"], p_lm):
        largest = expected.topk(5)
        found = token["lm_guesses"]
        assert [guess["p"] for guess in found] == pytest.approx(largest.values.tolist(), rel=1e-4)
        for guess in found:
            index = task.target_dictionary.index(guess["token"])
            assert guess["p"] == pytest.approx(expected[index].item(), rel=1e-4)
            assert guess["matches"] == (guess["token"] == token["text"])


def test_what_the_memory_would_have_said_is_the_top_of_p_knn(look):
    """All neighbours are shown: their weights add up to the probabilities of what they say."""
    for token in look("--positions", "0:60", "--knn-show-neighbors", K)["tokens"]:
        sums = {}
        for neighbor in token["neighbors"]:
            sums[neighbor["token"]] = sums.get(neighbor["token"], 0.0) + neighbor["weight"]
        found = [guess["p"] for guess in token["knn_guesses"]]
        assert found == pytest.approx(sorted(sums.values(), reverse=True)[:5], abs=1e-6)
        for guess in token["knn_guesses"]:
            assert guess["p"] == pytest.approx(sums[guess["token"]], abs=1e-6)


def test_positions_with_a_context_window(look, data, checkpoints, datastores):
    """Blocks before the first position serve as its context, and are not looked at."""
    flags = ["--context-window", 20, "--positions", "200:225"]
    result = look(*flags)
    _, p_lm, p_knn = scores(data, checkpoints["plain"], datastores["plain"], context_window=20)
    np.testing.assert_allclose(column(result, "p_lm"), p_lm[200:225], rtol=1e-4)
    np.testing.assert_allclose(column(result, "p_knn"), p_knn[200:225], rtol=1e-3, atol=1e-6)


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
    result = look("--positions", f"0:{len(text_of(data, 'valid')[0].split()) + 1}")["tokens"]
    log_probs = {(word, float(log_prob)) for word, log_prob in expected}
    assert len(log_probs) > 100
    for token in result:
        assert any(
            word == token["text"] and log_prob == pytest.approx(np.log(token["p_lm"]), abs=1e-3)
            for word, log_prob in log_probs
        )


# -- the continuous cache ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["--knn-cache-size", 40, "--knn-cache-lambda", 0.2, "--knn-cache-theta", 0.1],
        ["--knn-cache-size", 10**6, "--knn-cache-lambda", 0.7, "--knn-cache-metric", "l2"],
        ["--knn-cache-size", 60, "--knn-cache-reset", "document", "--context-window", 8],
    ],
    ids=["small", "all", "documents"],
)
@pytest.mark.parametrize("start", [0, 190])
def test_with_a_cache_it_explains_what_an_evaluation_gives(
    look, data, checkpoints, datastores, tmp_path, flags, start
):
    """The same log p for the same tokens, and three weights that say how it comes about."""
    file = tmp_path / "tokens.npz"
    evaluate(
        data, checkpoints["plain"], "--gen-subset", "valid", "--knn-datastore", datastores["plain"],
        "--knn-k", K, "--knn-lambda", LAMBDA, "--knn-temperature", TEMPERATURE, *flags,
        "--knn-output-tokens", file,
    )  # fmt: skip
    evaluated = {name: array[start : start + 60] for name, array in np.load(file).items()}
    result = look("--positions", f"{start}:{start + 60}", *flags)
    for name, theirs in (("p_mixture", "log_p"), ("p_lm", "log_p_lm"), ("p_knn", "log_p_knn")):
        np.testing.assert_allclose(
            column(result, name), np.exp(evaluated[theirs]), rtol=1e-4, atol=1e-7
        )
    p_cache = column(result, "p_cache").astype(float)
    np.testing.assert_allclose(p_cache, np.exp(evaluated["log_p_cache"]), rtol=1e-4, atol=1e-7)
    assert np.isnan(p_cache[0]) == (start == 0)
    weights = np.stack([column(result, f"{name}_lambda") for name in ("lm", "knn", "cache")])
    np.testing.assert_allclose(weights.sum(axis=0), 1.0)
    parts = weights * np.stack([column(result, "p_lm"), column(result, "p_knn"), p_cache])
    np.testing.assert_allclose(
        np.nansum(parts, axis=0), column(result, "p_mixture"), rtol=1e-5, atol=1e-9
    )


def test_what_the_cache_would_have_said_is_shown(look, tmp_path):
    flags = ["--positions", "100:130", "--knn-cache-size", 50, "--html", tmp_path / "page.html"]
    result = look(*flags)
    for token in result["tokens"]:
        said = {guess["token"]: guess["p"] for guess in token["cache_guesses"]}
        assert 1 <= len(said) <= 5 and sum(said.values()) <= 1 + 1e-5
        for guess in token["cache_guesses"]:
            assert guess["matches"] == (guess["token"] == token["text"])
            if guess["matches"]:
                assert guess["p"] == pytest.approx(token["p_cache"], rel=1e-4)
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "the cache" in page.text_of["m100"] and "p_cache" in page.text_of["m100"]
    assert "without neighbours and cache" in page.text and "cache size" in page.text
    printed = look(*flags[:4], as_text=True)
    assert re.search(
        r"p_cache [\d.e-]+; weights: model 0.600, neighbours 0.300, cache 0.100", printed
    )
    assert len(re.findall(r"^ +the cache says ", printed, re.M)) == 30
    without = look("--positions", "100:130", "--html", tmp_path / "page.html")
    assert "p_cache" not in Page((tmp_path / "page.html").read_text()).text
    assert {token["p_cache"] for token in without["tokens"]} == {None}
    assert {token["cache_lambda"] for token in without["tokens"]} == {0.0}


# -- words of several tokens -------------------------------------------------------------------


def test_perplexity_of_words(look, data, checkpoints, tmp_path):
    """Of the pieces of sentencepiece: a word goes on where a piece has no marker in front."""
    texts = tmp_path / "bin"
    shutil.copytree(data, texts)
    lines = (data / "dict.txt").read_text().splitlines()
    (texts / "dict.txt").write_text(
        "\n".join(f"▁{line}" if i % 3 else line for i, line in enumerate(lines)) + "\n"
    )
    build(texts, checkpoints["plain"], tmp_path / "d", "--knn-index", "Flat")
    flags = ["--positions", "30:90", "--remove-bpe", "sentencepiece"]
    result = look(*flags, data=texts, datastore=tmp_path / "d")
    pieces = column(result, "text").tolist()
    words = 1 + sum(
        piece.startswith("▁") or "</s>" in (piece, before)
        for before, piece in zip(pieces, pieces[1:])
    )
    assert words < 60
    log_p = np.log(column(result, "p_mixture"))
    assert result["perplexity"]["mixture"] == pytest.approx(np.exp(-log_p.sum() / words))
    printed = look(*flags, data=texts, datastore=tmp_path / "d", as_text=True)
    assert f"{words} words of 60 tokens, perplexity" in printed


# -- the memories ------------------------------------------------------------------------------


def test_contexts_are_those_of_the_text(look, data):
    lines = [[*line.split(), "</s>"] for line in text_of(data, "train")]
    corpus = [word for line in lines for word in line]
    starts = np.cumsum([0, *map(len, lines)])
    documents = np.cumsum([i == 0 or lines[i - 1] == ["</s>"] for i in range(len(lines))])
    result = look("--positions", "0:40", "--window", 5, "--knn-show-neighbors", 4)
    neighbors = [neighbor for token in result["tokens"] for neighbor in token["neighbors"]]
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
    every = look("--positions", "0:60", "--knn-show-neighbors", K)["tokens"]
    result = look("--positions", "0:60", "--knn-show-neighbors", 2)["tokens"]
    beyond = 0
    for token, whole in zip(result, every):
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
    result = look("--positions", "40:80", datastore=both)
    values = [np.load(path / "values.npy") for path in (datastores["plain"], tmp_path / "v")]
    nearest = [token["neighbors"][0] for token in result["tokens"]]
    # valid is looked at, and is in the second: every token finds itself
    assert [neighbor["row"] for neighbor in nearest if neighbor["datastore"] == 1] != []
    assert all(neighbor["distance"] < 1e-2 for neighbor in nearest)
    neighbors = [neighbor for token in result["tokens"] for neighbor in token["neighbors"]]
    assert {neighbor["datastore"] for neighbor in neighbors} == {0, 1}
    task, _ = oracle.load(data, checkpoints["plain"], 32)
    for neighbor in neighbors:
        value = values[neighbor["datastore"]][neighbor["row"]]
        assert task.target_dictionary[int(value)] == neighbor["token"]
    assert "datastore 2, document" in look("--positions", "0:10", datastore=both, as_text=True)


def test_an_empty_name_is_no_datastore(look, datastores):
    """``DIR:`` names one datastore: where its memories stand is shown without its number."""
    alone = look("--positions", "0:10")
    result = look("--positions", "0:10", datastore=f"{datastores['plain']}:")
    assert result["tokens"] == alone["tokens"]
    printed = look("--positions", "0:10", datastore=f"{datastores['plain']}:", as_text=True)
    assert "datastore 1," not in printed and "line " in printed


def test_a_summary_is_printed_where_the_rest_is_written(look, tmp_path):
    result = look("--positions", "0:300", "--html", tmp_path / "page.html")
    lines = [line for line in result["printed"].splitlines() if " | " not in line]  # no log
    assert re.search(r"300 tokens, perplexity [\d.]+ without neighbours, [\d.]+ with", lines[0])
    written = [line for line in lines if line.startswith("written to ")]
    assert written == [f"written to {tmp_path / name}" for name in ("page.html", "inspected.json")]
    assert len(lines) < 10 < 300 < len(look("--positions", "0:300", as_text=True).splitlines())


def test_a_datastore_without_the_lines_between_documents(
    look, data, checkpoints, datastores, tmp_path
):
    build(
        data, checkpoints["plain"], tmp_path / "d", "--knn-index", "Flat",
        "--sample-break-mode", "complete_doc",
    )  # fmt: skip
    result = look("--positions", "0:3", datastore=tmp_path / "d")
    assert {n["document"] for token in result["tokens"] for n in token["neighbors"]} == {None}


# -- the text that was written -----------------------------------------------------------------


def test_unknown_words_keep_their_spelling(look, tmp_path):
    text = tmp_path / "text"
    text.write_text("w1 <script>alert(1)</script> w2\n\nw3 <unk>")
    result = look("--input", text)
    assert column(result, "text").tolist() == [
        "w1", "<script>alert(1)</script>", "w2", "</s>", "</s>", "w3", "<unk>", "</s>",
    ]  # fmt: skip
    assert column(result, "unknown").nonzero()[0].tolist() == [1, 6]
    replaced = look("--input", _written(tmp_path / "other", "w1 <unk> w2\n\nw3 <unk>\n"))
    for one, other in zip(result["tokens"], replaced["tokens"]):
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
    result = look("--input", _written(tmp_path / "text", " ".join(words)))
    assert column(result, "text").tolist() == [*words, "</s>"]


def test_a_text_leaves_the_task_as_it_is(look, data, tmp_path, monkeypatch):
    tasks = []

    def load(cfg):
        loaded = load_task_and_model(cfg)
        tasks.append(loaded.task)
        return loaded

    monkeypatch.setattr(inspect, "load_task_and_model", load)
    look("--input", _written(tmp_path / "text", "w1 w2"))
    (task,) = tasks
    assert task.args.data == str(data) and task.datasets == {}


def test_raw_text_with_a_tokenizer(look, tmp_path):
    pytest.importorskip("sacremoses")
    result = look("--input", _written(tmp_path / "text", "w1, w2."), "--tokenizer", "moses")
    assert column(result, "text").tolist() == ["w1", ",", "w2", ".", "</s>"]


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


# -- the page ----------------------------------------------------------------------------------


def test_page_of_a_text(look, data, tmp_path):
    file = tmp_path / "page.html"
    result = look("--input", data.parent / "valid.txt", "--html", file)
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    for token in result["tokens"]:
        assert page.text_of[f"t{token['index']}"] == token["text"]
        assert f"token {token['index']:,}" in page.text_of[f"m{token['index']}"]
    links = {value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")}
    assert links == {f"m{token['index']}" for token in result["tokens"]}
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert set(page.references) == {"data:,", *(f"#{name}" for name in links)}
    assert ("meta", "http-equiv", "Content-Security-Policy") in page.attributes


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
        (["--positions", "0:1", "--post-process", "letter"], ["--remove-bpe", "got 'letter'"]),
        (["--positions", "0:1", "--max-tokens", 16], ["--max-tokens"]),
        (["--positions", "0:1", "--tokens-per-sample", 64], ["64", "32", "--tokens-per-sample"]),
        (["--input", "x", "--shorten-method", "truncate"], ["--shorten-method truncate"]),
    ],
    ids=str,
)
def test_refused(look, monkeypatch, flags, parts):
    monkeypatch.setattr(inspect, "encode", lambda *args, **named: pytest.fail("it was encoded"))
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
        call(inspect.main, data, "--path", checkpoints["plain"], "--positions", "0:1")
    assert "--knn-datastore is missing" in str(error.value)
