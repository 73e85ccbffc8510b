"""Generation with neighbours against stock fairseq, fairseq-eval-lm and brute force."""

import contextlib
import functools
import gc
import logging
import math
import re
import sys

import numpy as np
import pytest
import torch
from fairseq import options
from fairseq.data import Dictionary, NestedDictionaryDataset, indexed_dataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.sequence_generator import SequenceGenerator
from fairseq_cli import generate as fairseq_generate
from fairseq_cli import interactive
from helpers import oracle, small
from helpers.commands import NO_THREADS, USER_DIR, evaluate
from helpers.commands import run as run_command

from fairseq_knnlm.encoding.key_extractor import KEY_TYPES, KeyExtractor
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.plugin.generator import KNNModel
from fairseq_knnlm.probability.knn import knn_log_probs, vocabulary_log_probs
from fairseq_knnlm.scoring.settings import Settings
from fairseq_knnlm.search.retriever import Retriever

MODELS = ["adaptive", "plain"]
# a prompt, an empty one, one with a word that the model does not know, and a longer one
PROMPTS = ["w1 w7 w49", "", "w3 newword w5", " ".join(f"w{7 * i % 120}" for i in range(15))]
WAYS = {
    "greedy": ["--beam", 1],
    "beam": ["--beam", 5, "--nbest", 5, "--lenpen", 0.5],
    "diverse": ["--beam", 4, "--nbest", 4, "--diverse-beam-groups", 2],
    "top-k": ["--beam", 3, "--nbest", 3, "--sampling", "--sampling-topk", 10],
    "top-p": ["--beam", 3, "--nbest", 3, "--sampling", "--sampling-topp", 0.8],
    "tempered": ["--beam", 3, "--nbest", 3, "--sampling", "--temperature", 1.7],
}
# what has no part in the score of a token
SCORED = [name for name in WAYS if name not in ("diverse", "tempered")]


@pytest.fixture
def run(capsys, tmp_path):
    """A function that runs one of fairseq's commands in this process and gives what it prints."""

    def run(module, make_parser, words, task):
        words += ["--task", task, "--user-dir", USER_DIR, "--cpu", "--seed", 5, *NO_THREADS]
        parsed = options.parse_args_and_arch(make_parser(), input_args=list(map(str, words)))
        stock = task == "language_modeling"
        capsys.readouterr()
        with oracle.numpy_compat() if stock else contextlib.nullcontext():
            module.main(convert_namespace_to_omegaconf(parsed))
        return printed(capsys.readouterr().out)

    return run


@pytest.fixture
def interact(run, data, checkpoints, tmp_path):
    """A function that runs ``fairseq-interactive``."""

    def interact(model, *flags, prompts=PROMPTS, task="knnlm_lm"):
        (tmp_path / "prompts.txt").write_text("".join(f"{line}\n" for line in prompts))
        words = [data, "--path", checkpoints[model], "--input", tmp_path / "prompts.txt"]
        words += ["--max-len-b", 24, *flags]
        return run(interactive, options.get_interactive_generation_parser, words, task)

    return interact


def printed(text):
    """Label, id and the fields of each line of results, in order."""
    lines = re.findall(r"^([SHDPNT])-(\d+)\t(.*)$", text, re.MULTILINE)
    return [(label, int(number), rest.split("\t")) for label, number, rest in lines]


def hypotheses(results):
    """Id, words with </s>, and natural-log scores of each, in order."""
    texts = [(number, fields[1].split()) for label, number, fields in results if label == "H"]
    scores = [fields[0].split() for label, _, fields in results if label == "P"]
    return [
        (number, [*words, "</s>"], math.log(2) * np.array(bits, dtype=float))
        for (number, words), bits in zip(texts, scores)
    ]


def with_neighbors(datastore, k=8, knn_lambda=0.4, temperature=10):
    return [
        "--knn-datastore", datastore, "--knn-k", k, "--knn-lambda", knn_lambda,
        "--knn-temperature", temperature,
    ]  # fmt: skip


# -- the distribution ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
def test_p_knn_of_the_vocabulary_is_that_of_each_token(temperature):
    rng = torch.Generator().manual_seed(1)
    distances = 300 * torch.rand(7, 12, generator=rng).sort(dim=1).values
    values = torch.randint(9, (7, 12), generator=rng)
    distances[2:, 9:] = math.inf  # fewer neighbours than k
    values[2:, 9:] = 0
    log_p = vocabulary_log_probs(distances, values, 9, temperature)
    assert log_p.exp().sum(dim=1) == pytest.approx(torch.ones(7), abs=1e-6)
    for token in range(9):
        expected = knn_log_probs(distances, values, torch.full((7,), token), temperature)
        torch.testing.assert_close(log_p[:, token], expected, rtol=1e-6, atol=1e-5)


def test_without_any_neighbour_p_knn_is_not_defined():
    none = torch.full((2, 3), math.inf)
    assert vocabulary_log_probs(none, torch.zeros(2, 3).long(), 4).isnan().all()


class OfSomeRows:
    """A retriever that finds nothing for the first query."""

    def __init__(self, retriever):
        self._retriever = retriever
        self.key = retriever.key

    def search(self, queries):
        neighbors = self._retriever.search(queries)
        neighbors.distances[0], neighbors.values[0], neighbors.ids[0] = math.inf, 0, -1
        return neighbors


def test_a_row_without_any_neighbour_is_the_language_models(tmp_path):
    model = small.make_model()
    keys, values = small.random_keys(1, 50, 8), small.random_values(1, 50, 24)
    path = small.make_datastore(tmp_path / "d", keys, values)
    retriever = Retriever.open([path], k=9)
    settings = Settings(knn_lambda=0.5, temperature=4.0)
    tokens = torch.tensor([[2], [5]])
    with torch.no_grad():
        part = KNNModel([model], OfSomeRows(retriever), settings)
        log_p, _ = part.forward_decoder(tokens, [], [{}])
        mixed, _ = KNNModel([model], retriever, settings).forward_decoder(tokens, [], [{}])
        log_p_lm = model(tokens, src_lengths=None)[0][:, 0].log_softmax(dim=1).double()
    torch.testing.assert_close(log_p[0], log_p_lm[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(log_p[1], mixed[1])
    assert not torch.allclose(mixed[0], log_p_lm[0], atol=1e-2)


def test_shapes_that_differ_are_refused():
    with pytest.raises(UserError, match="one shape"):
        vocabulary_log_probs(torch.zeros(2, 3), torch.zeros(2, 2).long(), 4)


@pytest.mark.parametrize("pre_norm", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("key, layer", [*((key, -1) for key in KEY_TYPES), ("ffn-input", 0)])
def test_each_step_is_the_mixture_of_a_whole_pass(key, layer, pre_norm, tmp_path):
    model = small.make_model(pre_norm)
    text = torch.randint(4, 24, (3, 7), generator=torch.Generator().manual_seed(2))
    with KeyExtractor(model.decoder, key, layer) as extractor, torch.no_grad():
        logits = model(text, src_lengths=None)[0]
        queries = extractor.keys.transpose(0, 1)
    keys = (queries.reshape(-1, 8) + 0.3).repeat(2, 1).numpy().astype(np.float16)
    values = small.random_values(3, len(keys), 24)
    path = small.make_datastore(
        tmp_path / "d", keys, values, key={"type": key, "layer": layer % 3, "layers": 3}
    )
    settings = Settings(knn_lambda=0.3, temperature=2.0)
    mixed = KNNModel([model], Retriever.open([path], k=5), settings)
    state = {}
    for step in range(text.size(1)):
        with torch.no_grad():
            log_p, _ = mixed.forward_decoder(text[:, : step + 1], [], [state])
        assert log_p.exp().sum(dim=1) == pytest.approx(torch.ones(3), abs=1e-5)
        p_lm = logits[:, step].double().softmax(dim=1).numpy()
        for row in range(3):
            query = np.tile(queries[row, step].numpy(), (24, 1))
            log_p_knn = oracle.knn_log_probs(keys, values, query, range(24), 5, 2.0)
            expected = np.log(0.7 * p_lm[row] + 0.3 * np.exp(log_p_knn))
            np.testing.assert_allclose(log_p[row], expected, atol=1e-3)


def test_temperature_of_sampling_flattens_the_mixture(tmp_path):
    model = small.make_model()
    keys, values = small.random_keys(1, 50, 8), small.random_values(1, 50, 24)
    path = small.make_datastore(tmp_path / "d", keys, values)
    settings = Settings(knn_lambda=0.5, temperature=4.0)
    mixed = KNNModel([model], Retriever.open([path], k=9), settings)
    tokens = torch.tensor([[2], [5]])
    with torch.no_grad():
        plain, flat = (mixed.forward_decoder(tokens, [], [{}], tau)[0] for tau in (1.0, 3.0))
    powers = plain.exp() ** (1 / 3)
    torch.testing.assert_close(
        flat.exp(), powers / powers.sum(dim=1, keepdim=True), rtol=1e-5, atol=0
    )


# -- what the commands print -----------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_lambda_0_is_stock(model, way, interact, datastores):
    stock = interact(model, *WAYS[way], task="language_modeling")
    assert len([line for line in stock if line[0] == "H"]) >= len(PROMPTS)
    without = interact(model, *WAYS[way], *with_neighbors(datastores[model], knn_lambda=0))
    assert without == stock
    assert interact(model, *WAYS[way], *with_neighbors(datastores[model])) != stock


@pytest.mark.parametrize("way", SCORED)
@pytest.mark.parametrize("model", MODELS)
def test_scores_are_those_of_eval_lm(
    model, way, interact, datastores, data, checkpoints, tmp_path, caplog
):
    flags = with_neighbors(datastores[model])
    generated = hypotheses(
        interact(model, *WAYS[way], *flags, "--batch-size", 4, "--buffer-size", 4)
    )
    assert {number for number, _, _ in generated} == set(range(len(PROMPTS)))
    write_text([words for _, words, _ in generated], data, tmp_path / "text")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        evaluate(
            tmp_path / "text", checkpoints[model], *flags, "--gen-subset", "test",
            "--sample-break-mode", "eos", "--output-word-probs",
        )  # fmt: skip
    scored = [line for line in caplog.messages if re.match(r"\d+ \S+ \[-", line)]
    scores = [list(map(float, re.findall(r"\[(-[\d.]+)\]", line))) for line in scored]
    assert len(scores) == len(generated)
    for (_, _, expected), numbers in zip(generated, scores):
        np.testing.assert_allclose(expected, numbers, atol=1e-4)


def write_text(sentences, data, folder):
    """Binarise sentences as a split ``test``."""
    folder.mkdir()
    (folder / "dict.txt").write_bytes((data / "dict.txt").read_bytes())
    dictionary = Dictionary.load(str(data / "dict.txt"))
    builder = indexed_dataset.make_builder(str(folder / "test.bin"), "mmap", len(dictionary))
    for words in sentences:
        builder.add_item(torch.tensor([dictionary.index(word) for word in words]))
    builder.finalize(str(folder / "test.idx"))


@pytest.mark.parametrize("way", ["greedy", "beam"])
def test_a_batch_gives_what_its_prompts_give_alone(way, interact, datastores):
    # beside others fairseq lets an empty prompt end at once, alone not
    prompts = [prompt for prompt in PROMPTS if prompt]
    generate = functools.partial(
        interact, "plain", *WAYS[way], *with_neighbors(datastores["plain"]), prompts=prompts
    )
    batch = hypotheses(generate("--batch-size", 3, "--buffer-size", 3))
    alone = hypotheses(generate())
    assert [each[:2] for each in batch] == [each[:2] for each in alone]
    for (_, _, scores), (_, _, expected) in zip(batch, alone):
        np.testing.assert_allclose(scores, expected, atol=2e-4)


def test_prompts_are_continued(interact, datastores):
    generated = hypotheses(interact("adaptive", *with_neighbors(datastores["adaptive"])))
    for (_, words, scores), prompt in zip(generated, PROMPTS):
        prompt = prompt.replace("newword", "<unk>").split()
        assert words[: len(prompt)] == prompt and len(words) > len(prompt) + 1
        assert len(scores) == len(words)


def test_a_step_is_one_search_of_all_beams(interact, datastores, monkeypatch):
    sizes, search = [], Retriever.search

    def counting(self, queries, k=None):
        sizes.append(len(queries))
        return search(self, queries, k)

    monkeypatch.setattr(Retriever, "search", counting)
    prompts = ["w1 w7", "w2 w14", "w3 w21"]
    flags = [*WAYS["beam"], *with_neighbors(datastores["plain"]), "--max-len-b", 9]
    flags += ["--batch-size", 3, "--buffer-size", 3]
    generated = hypotheses(interact("plain", *flags, prompts=prompts))
    assert sizes[0] == 3 * 5 and max(sizes) == 3 * 5
    longest = max(len(words) for _, words, _ in generated)
    assert longest <= len(sizes) <= 10


def test_moses_splits_the_prompt(interact, datastores):
    flags = ["--tokenizer", "moses", *with_neighbors(datastores["plain"])]
    results = interact("plain", *flags, prompts=["w1,w7 w49"])
    assert results[0] == ("S", 0, ["w1 <unk> w7 w49"])


def test_generate_takes_prefixes(run, data, checkpoints, datastores):
    words = [data, "--path", checkpoints["plain"], *with_neighbors(datastores["plain"])]
    words += ["--sample-break-mode", "eos", "--tokens-per-sample", 32, "--prefix-size", 2]
    # with more beams fairseq fails where a prefix holds the end of a line
    words += ["--max-len-b", 20, "--batch-size", 40, "--beam", 1]
    results = run(fairseq_generate, options.get_generation_parser, words, "knnlm_lm")
    targets = {number: fields[0].split() for label, number, fields in results if label == "T"}
    generated = hypotheses(results)
    assert len(generated) == len(targets) > 50
    for number, tokens, scores in generated:
        prefix = [*targets[number], "</s>"][:2]
        assert tokens[: len(prefix)] == prefix and len(tokens) == len(scores)


def test_score_reference_is_eval_lm(run, data, checkpoints, datastores):
    flags = ["--sample-break-mode", "eos", "--tokens-per-sample", 32]
    flags += with_neighbors(datastores["adaptive"])
    words = [data, "--path", checkpoints["adaptive"], "--score-reference", "--batch-size", 40]
    results = run(fairseq_generate, options.get_generation_parser, words + flags, "knnlm_lm")
    scores = np.concatenate([scores for _, _, scores in hypotheses(results)])
    expected = evaluate(data, checkpoints["adaptive"], "--gen-subset", "test", *flags)
    assert np.exp(-scores.mean()) == pytest.approx(expected, rel=1e-4)


# -- memories --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_memories_stand_behind_their_hypothesis(batch, interact, datastores, data):
    flags = [*with_neighbors(datastores["plain"]), "--knn-show-neighbors", 2]
    flags += ["--beam", 3, "--nbest", 2, "--batch-size", batch, "--buffer-size", batch]
    results = interact("plain", *flags)
    values = np.load(datastores["plain"] / "values.npy")
    dictionary = Dictionary.load(str(data / "dict.txt"))
    ends = [place for place, line in enumerate(results) if line[0] == "P"]
    generated = hypotheses(results)
    assert len(ends) == len(generated) == 2 * len(PROMPTS)
    for place, (number, words, _) in zip(ends, generated):
        memories = []
        for label, id_, fields in results[place + 1 :]:
            if label != "N":
                break
            assert id_ == number
            memories.append(fields)
        prompt = len(PROMPTS[number].split())
        # of every generated token two, and the nearest with the token itself
        assert sorted({int(fields[0]) for fields in memories}) == list(
            range(prompt + 1, len(words) + 1)
        )
        assert 2 * (len(words) - prompt) <= len(memories) <= 3 * (len(words) - prompt)
        for token, word, weight, value, where, context in memories:
            row = int(re.search(r"row ([\d,]+)", where).group(1).replace(",", ""))
            assert word == words[int(token) - 1] and 0 <= float(weight) <= 1
            assert value == dictionary[values[row]]
            before = values[max(0, row - 8) : row]
            assert context.split() == [dictionary[token] for token in before]
    assert "print" not in vars(interactive)


@pytest.fixture
def equal_scores(monkeypatch):
    """All hypotheses have scores that are printed alike."""
    generate = SequenceGenerator.generate

    def generate_equal(self, *arguments, **options):
        generated = generate(self, *arguments, **options)
        for hypotheses in generated:
            for hypothesis in hypotheses:
                hypothesis["positional_scores"] = torch.zeros(1)
        return generated

    monkeypatch.setattr(SequenceGenerator, "generate", generate_equal)


@pytest.fixture
def another_order(monkeypatch):
    """Batches are in another order than the prompts, in whose order fairseq prints."""
    monkeypatch.setattr(
        NestedDictionaryDataset, "ordered_indices", lambda dataset: np.arange(len(dataset))[::-1]
    )


def test_memories_are_those_of_the_hypothesis_and_not_of_its_scores(
    equal_scores, another_order, interact, datastores
):
    flags = [*with_neighbors(datastores["plain"]), "--knn-show-neighbors", 1]
    flags += ["--beam", 3, "--nbest", 2, "--batch-size", 4, "--buffer-size", 4]
    results = interact("plain", *flags)
    generated = hypotheses(results)
    texts = {" ".join(fields) for label, _, fields in results if label == "P"}
    assert len(generated) == 2 * len(PROMPTS) and len(texts) == 1
    assert len({tuple(words) for _, words, _ in generated}) == len(generated)
    shown = memories_of_each(results)
    assert len(shown) == len(generated)
    for (number, words, _), memories in zip(generated, shown):
        prompt = len(PROMPTS[number].split())
        assert {int(fields[0]) for fields in memories} == set(range(prompt + 1, len(words) + 1))
        assert all(fields[1] == words[int(fields[0]) - 1] for fields in memories)
    assert "print" not in vars(interactive)


def memories_of_each(results):
    """The fields of the N- lines behind each P- line."""
    memories = []
    for label, _, fields in results:
        if label == "P":
            memories.append([])
        elif label == "N":
            memories[-1].append(fields)
    return memories


def refuse_missing_memories(results, prefix=2):
    """Every hypothesis that is longer than its prefix has memories."""
    generated, shown = hypotheses(results), memories_of_each(results)
    assert len(generated) == len(shown) > 50
    assert [len(words) > prefix for _, words, _ in generated] == list(map(bool, shown))


def test_memories_of_hypotheses_that_are_not_printed_are_dropped(
    run, data, checkpoints, datastores, capsys
):
    words = [data, "--path", checkpoints["plain"], *with_neighbors(datastores["plain"])]
    words += ["--sample-break-mode", "eos", "--tokens-per-sample", 32, "--prefix-size", 2]
    words += ["--max-len-b", 5, "--batch-size", 40, "--beam", 1, "--knn-show-neighbors", 1]
    quiet = run(fairseq_generate, options.get_generation_parser, [*words, "--quiet"], "knnlm_lm")
    assert quiet == []
    gc.collect()
    assert "print" not in vars(fairseq_generate) and "print" not in vars(interactive)
    results = run(fairseq_generate, options.get_generation_parser, words, "knnlm_lm")
    refuse_missing_memories(results)
    assert "print" not in vars(fairseq_generate) and "print" not in vars(interactive)


def test_memories_go_where_the_results_go(run, data, checkpoints, datastores, tmp_path):
    words = [data, "--path", checkpoints["plain"], *with_neighbors(datastores["plain"])]
    words += ["--sample-break-mode", "eos", "--tokens-per-sample", 32, "--results-path", tmp_path]
    words += ["--max-len-b", 5, "--batch-size", 40, "--beam", 1, "--knn-show-neighbors", 1]
    words += ["--prefix-size", 2]
    assert run(fairseq_generate, options.get_generation_parser, words, "knnlm_lm") == []
    results = printed((tmp_path / "generate-test.txt").read_text())
    refuse_missing_memories(results)


def test_memories_under_python_m(data, checkpoints, datastores):
    done = run_command(
        sys.executable, "-m", "fairseq_cli.generate", data, "--path", checkpoints["plain"],
        "--user-dir", USER_DIR, "--task", "knnlm_lm", "--sample-break-mode", "eos",
        "--tokens-per-sample", 32, "--prefix-size", 2, "--max-len-b", 5, "--batch-size", 40,
        "--beam", 1, "--cpu", *NO_THREADS, "--knn-show-neighbors", 1,
        *with_neighbors(datastores["plain"]),
    )  # fmt: skip
    refuse_missing_memories(printed(done.stdout))


def test_the_first_memory_is_the_nearest(interact, datastores, data, checkpoints):
    flags = [*with_neighbors(datastores["plain"]), "--knn-show-neighbors", 1, "--beam", 1]
    results = interact("plain", *flags, prompts=PROMPTS[:1])
    ((_, words, _),) = hypotheses(results)
    shown = {int(fields[0]): fields for label, _, fields in reversed(results) if label == "N"}
    task, model = oracle.load(data, checkpoints["plain"], 32)
    tokens = [task.source_dictionary.index(word) for word in ["</s>", *words[:-1]]]
    with KeyExtractor(model.decoder) as extractor, torch.no_grad():
        model(torch.tensor([tokens]), src_lengths=None)
        queries = extractor.keys[:, 0].numpy()
    keys = np.load(datastores["plain"] / "keys.npy")
    distances = small.all_distances(queries, keys)
    for token, fields in shown.items():
        row = int(re.search(r"row ([\d,]+)", fields[4]).group(1).replace(",", ""))
        nearest = np.sort(distances[token - 1])[:8]
        assert distances[token - 1, row] == pytest.approx(nearest[0], rel=1e-3, abs=1e-3)
        weights = np.exp((nearest[0] - nearest) / 10)
        assert float(fields[2]) == pytest.approx(1 / weights.sum(), abs=2e-3)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--knn-lambda", 1], "--knn-lambda below 1"),
        (["--knn-cache-size", 50], "generation knows no continuous cache"),
        (["--print-alignment"], "--print-alignment: a language model has no source"),
        (["--constraints"], "--constraints: fairseq has them for translation only"),
        (["--knn-show-neighbors", -1], "--knn-show-neighbors must be >= 0, got -1"),
        (["--knn-lambda", 0, "--knn-show-neighbors", 1], "needs --knn-datastore and --knn-lambda"),
        (["--beam", 0], "--beam must be >= 1, got 0"),
        (["--nbest", 0], "--nbest must be >= 1, got 0"),
        (["--max-len-b", -3], "--max-len-b must be >= 0, got -3"),
        (["--max-len-a", "inf"], "--max-len-a must be a finite number, got inf"),
        (["--lenpen", "nan"], "--lenpen must be a finite number, got nan"),
        (["--temperature", 0], "--temperature must be > 0, got 0"),
        (["--temperature", "nan"], "--temperature must be a finite number, got nan"),
        (["--beam", 4, "--diverse-beam-groups", 3], "--diverse-beam-groups must divide --beam 4"),
        (["--min-len", 25], "--min-len must be at most --max-len-b 24, got 25"),
        (["--min-len", 40, "--max-len-b", 90], "--min-len 40 is more than"),
        (["--max-tokens", 3], "a text is too long: .*max_tokens=3"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused(flags, message, interact, datastores):
    with pytest.raises(UserError, match=message):
        interact("plain", "--knn-datastore", datastores["plain"], "--knn-k", 8, *flags)


def test_a_prompt_beyond_the_longest_text_is_refused(interact):
    with pytest.raises(UserError, match="a text is too long: .*=40.*max_positions=32"):
        interact("plain", prompts=[" ".join(["w1"] * 39)])


@pytest.mark.parametrize(
    "name, flags, prompts, message",
    [
        ("interactive", ["--sampling", "--nbest", 2], b"w1\n", "--sampling requires --nbest"),
        ("interactive", ["--score-reference"], b"w1\n", "--score-reference: fairseq-interactive"),
        ("interactive", [], b"w1 \xff\n", "the input is no UTF-8 text"),
        ("generate", ["--tokens-per-sample", 32], b"", "--sample-break-mode must be eos"),
    ],
)
def test_what_a_command_refuses_ends_in_words(
    name, flags, prompts, message, data, checkpoints, datastores, tmp_path
):
    (tmp_path / "prompts").write_bytes(prompts)
    flags = [*flags, "--input", tmp_path / "prompts"] if name == "interactive" else flags
    done = run_command(
        sys.executable, "-m", f"fairseq_cli.{name}", data, "--path", checkpoints["plain"],
        "--user-dir", USER_DIR, "--task", "knnlm_lm", "--cpu", *NO_THREADS,
        *with_neighbors(datastores["plain"]), *flags, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stdout
    assert message in done.stdout[done.stdout.rindex("fairseq_knnlm: ") :]


def test_an_ensemble_is_refused():
    model = small.make_model()
    with pytest.raises(UserError, match="ensemble of 2 models"):
        KNNModel([model, model], None, Settings(knn_lambda=0.5))


def test_a_warning_says_where_a_prompt_is_cut(interact, datastores, caplog):
    prompts = [" ".join(["w1"] * 12)]
    flags = [*with_neighbors(datastores["plain"]), "--max-len-b"]
    with caplog.at_level(logging.WARNING):
        interact("plain", *flags, 12, prompts=prompts)
        assert "is cut" not in caplog.text
        ((_, words, _),) = hypotheses(interact("plain", *flags, 9, prompts=prompts))
    assert "a prompt of 12 tokens is cut after 9" in caplog.text
    assert words == ["w1"] * 9 + ["</s>"]
