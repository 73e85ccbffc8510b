"""The recipe of WikiText-103: its commands, its checks of files, and a rehearsal of it all."""

import hashlib
import importlib.util
import os
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import commands

FOLDER = commands.REPOSITORY / "examples" / "wikitext103"


def module(name):
    """A script of the example; by its path, as other examples have the same names."""
    spec = importlib.util.spec_from_file_location(f"wikitext103_{name}", FOLDER / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def recipe():
    return module("run")


# -- commands --------------------------------------------------------------------------------------


def words_of(recipe, *flags):
    """Program and arguments of every step, by its name."""
    steps = recipe.listed(recipe.parse_args(["--work", "work", *flags]))
    return {step.name: [Path(step.command[0]).name, *step.command[1:]] for step in steps}


def read(words):
    """The arguments of a command as its program understands them."""
    from fairseq import options

    from fairseq_knnlm.cli import build, tune

    parsers = {
        "fairseq-train": options.get_training_parser,
        "fairseq-eval-lm": options.get_eval_lm_parser,
        "fairseq-knnlm-build": build.make_parser,
        "fairseq-knnlm-tune": tune.make_parser,
    }
    if words[0] == "fairseq-preprocess":
        return options.get_preprocessing_parser().parse_args(words[1:])
    return options.parse_args_and_arch(parsers[words[0]](), input_args=words[1:])


@pytest.mark.parametrize("flags", [[], ["--rehearsal", "text"], ["--checkpoint", "model.pt"]])
def test_every_command_is_one_that_its_program_takes(recipe, flags):
    commands = words_of(recipe, *flags)
    assert ("train" in commands) == ("--checkpoint" not in flags)
    for words in commands.values():
        if words[0].startswith("fairseq"):
            read(words)


def test_the_settings_are_the_papers(recipe):
    commands = {
        name: read(words)
        for name, words in words_of(recipe).items()
        if words[0].startswith("fairseq-") and words[0] != "fairseq-preprocess"
    }
    train, build, evaluation = (commands[name] for name in ("train", "build", "paper-test"))
    assert (train.decoder_layers, train.decoder_embed_dim, train.decoder_ffn_embed_dim) == (
        16, 1024, 4096,
    )  # fmt: skip
    assert train.adaptive_input and train.tie_adaptive_weights and train.tie_adaptive_proj
    assert (train.max_update, train.warmup_updates, train.lr, train.optimizer) == (
        286000, 16000, [1.0], "nag",
    )  # fmt: skip
    assert train.tokens_per_sample == train.max_tokens == 3072
    assert train.update_freq[0] * train.distributed_world_size == 24
    # keys with at least 1,536 tokens of left context; 512 tokens scored with 2,560 before them
    assert (build.tokens_per_sample, build.context_window) == (3072, 1536)
    assert build.knn_index is build.knn_key is build.knn_metric is None, "defaults: 4,096 lists, L2"
    assert evaluation.tokens_per_sample - evaluation.context_window == 512
    assert (evaluation.knn_k, evaluation.knn_lambda) == (1024, 0.25)
    for name, args in commands.items():
        if name.startswith(("base", "paper", "tuned", "tune")):
            assert (args.context_window, args.sample_break_mode) == (2560, "complete"), name


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_fewer_gpus_train_with_the_same_batch(recipe, gpus):
    train = read(words_of(recipe, "--gpus", str(gpus))["train"])
    assert train.update_freq[0] * gpus == 24


def test_a_dry_run_prints_every_command_and_writes_nothing(recipe, tmp_path, capsys):
    work = tmp_path / "work"
    recipe.main(["--dry-run", "--work", str(work)])
    printed = " ".join(capsys.readouterr().out.replace("\\\n", "").split())
    steps = recipe.listed(recipe.parse_args(["--work", str(work)]))
    assert [step.name for step in steps] == [
        "estimate", "download", "preprocess", "check", "train", "base-valid", "base-test",
        "build", "tune", "paper-valid", "paper-test", "tuned-test",
    ]  # fmt: skip
    assert all(" ".join(step.command) in printed for step in steps)
    assert not work.exists()


# -- files -----------------------------------------------------------------------------------------


def test_an_archive_of_another_size_or_content_is_refused(tmp_path):
    corpus, archive = module("corpus"), tmp_path / "wikitext-103-v1.zip"
    archive.write_bytes(b"PK")
    with pytest.raises(SystemExit, match="size in bytes 2, expected 190229076"):
        corpus.check_archive(archive)
    os.truncate(archive, corpus.ARCHIVE_BYTES)
    with pytest.raises(SystemExit, match="SHA-256 .* expected 242ba0f2"):
        corpus.check_archive(archive)


@pytest.fixture
def small_corpus(tmp_path, monkeypatch):
    """``corpus.py`` that takes a small archive for the real one, and that archive's URL."""
    corpus, archive = module("corpus"), tmp_path / "there.zip"
    texts = {split: f" = {split} = \n words \n".encode() for split in corpus.SPLITS}
    with zipfile.ZipFile(archive, "w") as file:
        for split, text in texts.items():
            file.writestr(f"wikitext-103/{corpus.file_name(split)}", text)
    monkeypatch.setattr(corpus, "ARCHIVE_BYTES", archive.stat().st_size)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(corpus, "ARCHIVE_SHA256", sha256)
    splits = {
        split: corpus.Split(hashlib.sha1(text).hexdigest(), 2, 6) for split, text in texts.items()
    }
    monkeypatch.setattr(corpus, "SPLITS", splits)
    return corpus, archive, texts


def test_the_archive_is_fetched_once_and_unpacked(small_corpus, tmp_path):
    corpus, archive, texts = small_corpus
    for url in (archive.as_uri(), (tmp_path / "gone.zip").as_uri()):  # the second is not asked
        corpus.make_text(tmp_path / "text", None, url)
        for split, text in texts.items():
            assert (tmp_path / "text" / f"wiki.{split}.tokens").read_bytes() == text
    with pytest.raises(SystemExit, match="--archive"):
        corpus.make_text(tmp_path / "other", None, url)
    assert not list((tmp_path / "other").iterdir())


def test_a_damaged_archive_or_file_is_refused(small_corpus, tmp_path, monkeypatch):
    corpus, archive, _ = small_corpus
    splits = {**corpus.SPLITS, "test": corpus.SPLITS["test"]._replace(sha1="0" * 40)}
    monkeypatch.setattr(corpus, "SPLITS", splits)
    with pytest.raises(SystemExit, match="wiki.test.tokens is not WikiText-103's: SHA-1"):
        corpus.make_text(tmp_path / "text", archive, "")
    damaged = bytearray(archive.read_bytes())
    damaged[60] ^= 1
    archive.write_bytes(damaged)
    with pytest.raises(SystemExit, match="there.zip is not WikiText-103's: SHA-256"):
        corpus.make_text(tmp_path / "text", archive, "")


def test_data_of_another_text_is_refused(data, monkeypatch):
    corpus = module("corpus")
    with pytest.raises(SystemExit, match="dict.txt is not WikiText-103's: types"):
        corpus.check_data(data)
    types = len((data / "dict.txt").read_text().splitlines()) + 4
    monkeypatch.setattr(corpus, "TYPES", types)
    with pytest.raises(SystemExit, match="train is not WikiText-103's: lines"):
        corpus.check_data(data)
    counts = {}
    for split in corpus.SPLITS:
        lines = (data.parent / f"{split}.txt").read_text().splitlines()
        counts[split] = corpus.Split("", len(lines), sum(len(line.split()) + 1 for line in lines))
    monkeypatch.setattr(corpus, "SPLITS", counts)
    corpus.check_data(data)


# -- all of it -------------------------------------------------------------------------------------


def test_a_rehearsal_runs_every_step_and_goes_on_where_it_was_stopped(tmp_path):
    text, work = tmp_path / "text", tmp_path / "work"
    text.mkdir()
    for seed, (split, documents) in enumerate({"train": 60, "valid": 8, "test": 8}.items()):
        (text / f"wiki.{split}.tokens").write_text(commands.make_text(seed, documents))
    command = [sys.executable, FOLDER / "run.py", "--work", work, "--rehearsal", text]
    printed = commands.run(*command).stdout
    assert "done already" not in printed
    report = printed[printed.rindex("perplexity") :].splitlines()
    assert [line.split()[:2] for line in report[1:6]] == [
        ["base", "valid"], ["base", "test"], ["paper", "valid"], ["paper", "test"],
        ["tuned", "test"],
    ]  # fmt: skip
    (work / "steps" / "tuned-test.json").unlink()
    again = commands.run(*command).stdout
    assert again.count("done already") == 9
    assert again[again.rindex("perplexity") :].splitlines() == report
