"""The Python interface: fairseq's hub interface with neighbours, and the examples of docstrings."""

import argparse
import doctest
import importlib
from pathlib import Path

import pytest
import torch
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.tasks.language_modeling import LanguageModelingConfig
from helpers import oracle
from helpers.commands import REPOSITORY, USER_DIR

from fairseq_knnlm import hub
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.hub import from_pretrained
from fairseq_knnlm.search import retriever

TEXT = "w1 w7 w49 w106 w23"
FILE = "checkpoint_last.pt"
SETTINGS = {"knn_k": 8, "knn_lambda": 0.4, "knn_temperature": 10}


@pytest.fixture(scope="module")
def places(checkpoints, datastores, data):
    """Arguments that load the adaptive model and its datastore."""
    folder = str(checkpoints["adaptive"].parent)
    return (folder, FILE, str(data)), {"knn_datastore": str(datastores["adaptive"]), **SETTINGS}


@pytest.fixture(scope="module")
def lm(places):
    model, settings = places
    return from_pretrained(*model, **settings)


@pytest.fixture(scope="module")
def stock(places):
    """The same model with nothing of ours but the task that it was trained with."""
    return TransformerLanguageModel.from_pretrained(*places[0])


WITH_EXAMPLES = [
    ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
    for file in sorted(USER_DIR.rglob("*.py"))
    if ">>>" in file.read_text()
]


def test_the_public_modules_have_examples():
    modules = ["datastore.datastore", "hub", "probability.knn", "search.retriever"]
    assert {f"fairseq_knnlm.{name}" for name in modules} <= set(WITH_EXAMPLES)


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_in_docstrings(name, checkpoints, datastores, data):
    module = importlib.import_module(name)
    names = {
        "directory": str(datastores["plain"]),
        "model": str(checkpoints["plain"].parent),
        "data": str(data),
    }
    failed, tried = doctest.testmod(module, extraglobs=names)
    assert tried > 0 and failed == 0


def test_neighbors_on_and_off_for_each_call(lm, stock):
    with_neighbors = lm.score(TEXT)["positional_scores"]
    without = lm.score(TEXT, knn=False)["positional_scores"]
    assert torch.equal(without, stock.score(TEXT)["positional_scores"])
    assert not torch.allclose(with_neighbors, without, atol=1e-2)
    assert torch.equal(lm.score(TEXT)["positional_scores"], with_neighbors)
    for how in ({"beam": 5}, {"sampling": True, "sampling_topk": 20, "beam": 2}):
        texts = {}
        for name, generate in (("stock", stock.sample), ("off", lm.sample)):
            torch.manual_seed(3)
            options = {"knn": False} if name == "off" else {}
            texts[name] = generate([TEXT, ""], max_len_b=20, **how, **options)
        assert texts["off"] == texts["stock"]
    assert lm.sample(TEXT, beam=5, max_len_b=20).startswith(TEXT)


def test_scores_are_those_of_what_is_generated(lm):
    tokens = lm.encode(TEXT)
    for hypothesis in lm.generate(tokens, beam=4, max_len_b=20):
        words = lm.string(hypothesis["tokens"])
        reference = lm.score(words)["positional_scores"]
        generated = hypothesis["positional_scores"][:-1].float()  # without </s>
        torch.testing.assert_close(generated, reference, atol=1e-4, rtol=0)


def test_a_text_of_lines_scores_as_brute_force_has_it(lm, data, checkpoints):
    lines = (data.parent / "valid.txt").read_text().splitlines()[:2]
    score = lm.score("\n".join(lines), replace_newline_with_eos=True)["positional_scores"]
    count = len(score)
    assert len(lines[0].split()) < count < 32
    task, model = oracle.load(data, checkpoints["adaptive"], 32)
    queries, targets, log_p_lm = (part[:count] for part in oracle.score(task, model, "valid"))
    keys, values, _ = oracle.score(task, model, "train")
    log_p_knn = oracle.knn_log_probs(keys, values, queries, targets, 8, 10)
    expected = oracle.perplexity(log_p_lm, log_p_knn, 0.4)
    assert torch.exp(-score.mean()).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("text", ["", ["", ""]])
def test_an_empty_text_has_no_scores(lm, text):
    scored = lm.score(text)
    for each in scored if isinstance(scored, list) else [scored]:
        assert each["tokens"].numel() == each["positional_scores"].numel() == 0


def test_stock_from_pretrained_with_our_task(places, lm):
    (folder, file, data), settings = places
    other = TransformerLanguageModel.from_pretrained(
        folder, file, data, user_dir=str(USER_DIR), **settings
    )
    assert torch.equal(other.score(TEXT)["positional_scores"], lm.score(TEXT)["positional_scores"])


@pytest.mark.parametrize("kind", ["cfg", "args"])
def test_checkpoints_of_other_tasks(kind, places, lm, tmp_path):
    (folder, file, data), settings = places
    state = torch.load(f"{folder}/{file}")
    names = LanguageModelingConfig.__dataclass_fields__
    task = {name: value for name, value in state["cfg"]["task"].items() if name in names}
    task["_name"] = "language_modeling"
    state["cfg"]["task"] = task
    if kind == "args":  # as fairseq saved before it had cfg
        model = {**state["cfg"]["model"], **task}
        names = {
            "arch": "transformer_lm",
            "task": "language_modeling",
            "criterion": "adaptive_loss",
        }
        state["args"], state["cfg"] = argparse.Namespace(**{**model, **names}), None
        del state["args"]._name
    torch.save(state, tmp_path / file)
    other = from_pretrained(str(tmp_path), file, data, **settings)
    assert torch.equal(other.score(TEXT)["positional_scores"], lm.score(TEXT)["positional_scores"])


def test_torch_hub_finds_it(places, lm):
    model, settings = places
    other = torch.hub.load(str(REPOSITORY), "knnlm", *model, source="local", **settings)
    assert other.sample(TEXT, beam=3, max_len_b=20) == lm.sample(TEXT, beam=3, max_len_b=20)


def test_moses_in_and_out(places):
    model, settings = places
    lm = from_pretrained(*model, tokenizer="moses", **settings)
    assert lm.string(lm.encode("w1,w7")) == "w1 <unk> w7"
    assert lm.decode(lm.tgt_dict.encode_line("w1 w7 .", add_if_not_exist=False)) == "w1 w7 <unk>"
    assert lm.detokenize("w1 , w7 .") == "w1, w7."


@pytest.mark.parametrize("name", ["knn_kk", "knn_show_neighbors"])
def test_an_unknown_setting_is_refused(name, places):
    with pytest.raises(UserError, match=f"no setting of the hub interface: {name}; .* knn_k, "):
        from_pretrained(*places[0], **{name: 3})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"knn_k": "many"}, "knn_k must be a whole number, got 'many'"),
        ({"knn_k": 2.5}, "knn_k must be a whole number, got 2.5"),
        ({"knn_lambda": "x"}, "knn_lambda must be a number, got 'x'"),
        ({"knn_distances": "exat"}, "knn_distances must be one of exact, index, exhaustive, got"),
        ({"knn_datastore": ["d"]}, r"knn_datastore must be a text, got \['d'\]"),
        (
            {"knn_device": "gpu", "knn_metric": "cosine"},
            "knn_device must be one of auto, cpu, cuda, got 'gpu'; knn_metric must be one of l2",
        ),
        (
            {"knn_k": 0, "knn_lambda": 2.0},
            r"--knn-k must be a whole number >= 1, got 0; --knn-lambda must be in",
        ),
        ({"knn_temperature": -1}, "--knn-temperature must be a finite number > 0"),
        ({"knn_tuned": True}, "--knn-tuned needs the --knn-datastore that was tuned"),
    ],
    ids=str,
)
def test_settings_are_checked_before_anything_is_loaded(settings, message, places, monkeypatch):
    monkeypatch.setattr(hub.hub_utils, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=message):
        from_pretrained(*places[0], **settings)


def test_files_are_looked_for_before_anything_is_loaded(places, tmp_path, monkeypatch):
    (folder, file, data), _ = places
    monkeypatch.setattr(hub.hub_utils, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    cases = [
        ((f"{folder}/none", file, data), "model_name_or_path must be a directory, .*/none'"),
        ((folder, "none.pt", data), "checkpoint_file: there is no 'none.pt' in"),
        ((folder, f"{file}:none.pt", data), "checkpoint_file: there is no 'none.pt' in"),
        ((folder, file, f"{data}/none"), "data_name_or_path must be a directory, .*/none'"),
        ((folder, file, str(tmp_path)), "data_name_or_path must be .* has no dict.txt"),
        ((folder, file), "data_name_or_path must be .* has no dict.txt"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            from_pretrained(*arguments)


def test_paths_may_be_paths(places, lm):
    (folder, file, data), settings = places
    settings = {**settings, "knn_datastore": Path(settings["knn_datastore"])}
    other = from_pretrained(Path(folder), file, Path(data), **settings)
    assert torch.equal(other.score(TEXT)["positional_scores"], lm.score(TEXT)["positional_scores"])


def test_the_face_of_the_hub():
    assert hub.__all__ == ["from_pretrained"]


def test_another_models_datastore_is_refused(places, datastores):
    model, settings = places
    with pytest.raises(UserError, match="are not those that the datastore"):
        from_pretrained(*model, **{**settings, "knn_datastore": str(datastores["plain"])})


def test_an_ensemble_is_refused(places):
    (folder, _, data), settings = places
    lm = from_pretrained(folder, f"{FILE}:{FILE}", data, **settings)
    for call in (lm.score, lm.sample):
        with pytest.raises(UserError, match="ensemble of 2 models"):
            call(TEXT)


@pytest.mark.parametrize("k", [0, 9])
def test_more_neighbours_than_the_retriever_has_are_refused(k, datastores):
    searched = retriever.Retriever.open([str(datastores["plain"])], k=8)
    with pytest.raises(UserError, match=rf"k must be in \[1, 8\], got {k}"):
        searched.search(torch.zeros(1, 32), k)


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_neighbours_are_the_nearest_of_more(count, datastores):
    searched = retriever.Retriever.open([str(datastores["plain"])] * count, k=9)
    queries = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    few, more = searched.search(queries, 4), searched.search(queries)
    assert few.ids.shape == few.values.shape == (6, 4)
    assert torch.equal(few.distances, more.distances[:, :4])
