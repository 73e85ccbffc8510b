"""What every public name does with an argument that cannot be: one message that names it."""

import inspect
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers.small import make_datastore, make_dictionary, make_model, random_keys, random_values

from fairseq_knnlm import building, datastore, encoding, probability, scoring, search, tuning
from fairseq_knnlm.arguments import check_arguments, or_none
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.fields import is_number, is_whole, one_of, whole

PACKAGES = (building, datastore, encoding, probability, scoring, search, tuning)
ROWS = torch.zeros(3)
DATA = tuning.TuningData(
    ROWS, torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
)


class House(NamedTuple):
    """What some of the arguments must be made of."""

    path: str
    folder: str
    model: torch.nn.Module


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    path = make_datastore(folder / "d", random_keys(1, 30, 8), random_values(1, 30, 300))
    return House(path, str(folder), make_model())


def blocks(**changed):
    items = [{"source": torch.zeros(2).long(), "target": torch.zeros(2).long()}]
    return encoding.BlockDataset(items, **{"sizes": [2], "pad": 1, **changed})


def writer(house, **changed):
    arguments = {"settings": {}, "chunk_sizes": [1], "dimension": 2, "dtype": np.uint8, **changed}
    return datastore.DatastoreWriter(f"{house.folder}/new", **arguments)


def settings_of(house, metric):
    return building.manifest_settings(
        house.model, make_dictionary(5), building.key_of(house.model), metric, {}, {}, {}
    )


def sample():
    return encoding.ChunkCollater(1, 8)([blocks()[0]])


def built(house, **settings):
    settings = {**settings_of(house, "l2"), **settings}
    return building.build_datastore(
        f"{house.folder}/built", house.model, blocks(), None, settings, "Nonesuch"
    )


def dumped(house):
    with writer(house, chunk_sizes=[5], dimension=8, overwrite=True) as entered:
        with encoding.KeyExtractor(house.model.decoder) as extractor:
            building.dump(house.model, [(0, sample())], extractor, entered)


def finished(house):
    with writer(house, chunk_sizes=[0], overwrite=True) as entered:
        building.finish(entered, "Flat", "cos")


# By name, a call with an argument that cannot be, and what the message says of it.
REFUSED = [
    ("build_datastore", built, "'Nonesuch' (--knn-index) is no FAISS index"),
    ("dump", dumped, "rows 0 to 5 of keys.npy must be float16 of shape (5, 8)"),
    ("estimate_build", lambda h: building.estimate_build("Flat", 9, 8, "cos", np.uint8),
     "metric must be one of l2, ip, got 'cos'"),
    ("finish", finished, "metric must be one of l2, ip, got 'cos'"),
    ("key_of", lambda h: building.key_of(h.model, layer="x"), "layer (--knn-key-layer) must be"),
    ("key_of", lambda h: building.key_of(h.model, layer=True), "got True"),
    ("manifest_settings", lambda h: settings_of(h, "cos"), "metric must be one of l2, ip"),
    ("Datastore", lambda h: datastore.Datastore.open(f"{h.folder}/none"), "no such directory"),
    ("DatastoreWriter", lambda h: writer(h, dimension=0), "dimension must be a whole number >= 1"),
    ("read_manifest", lambda h: datastore.read_manifest(h.folder), "has no manifest.json"),
    ("save_tuned", lambda h: datastore.save_tuned(h.path, {}), "paths must be a list"),
    ("tuned_for", lambda h: datastore.tuned_for([]), "paths must be a list"),
    ("value_dtype", lambda h: datastore.value_dtype(2.5), "vocabulary_size must be a whole number"),
    ("BlockDataset", lambda h: blocks(context_window=-1), "context_window must be a whole number"),
    ("BlockDataset", lambda h: blocks(sizes=[1, 2]), "one entry for each of the 1 blocks"),
    ("BlockDataset", lambda h: blocks(document_starts=[True, False]), "document_starts must be"),
    ("BlockDataset", lambda h: blocks(max_length=2.5), "max_length must be a whole number >= 1"),
    ("ChunkCollater", lambda h: encoding.ChunkCollater(1, 0), "max_tokens must be a whole number"),
    ("ChunkCollater", lambda h: encoding.ChunkCollater(None, 8), "pad must be a whole number >= 0"),
    ("ChunkCollater", lambda h: encoding.ChunkCollater(1, 8, first_block=-1), "first_block must"),
    ("KeyExtractor", lambda h: encoding.KeyExtractor(h.model.decoder, "nonesuch"), "key must be"),
    ("KeyExtractor", lambda h: encoding.KeyExtractor(h.model.decoder, layer="x"), "got 'x'"),
    ("extractor_of", lambda h: encoding.extractor_of(h.model, {"type": "ffn-input", "layer": 9}),
     "must be a whole number from -3 to 2"),
    ("make_samples", lambda h: list(encoding.make_samples(blocks(), [range(1)], 0)), "max_tokens"),
    ("only_rows", lambda h: encoding.only_rows(sample(), 0, 3), "stop must be a whole number"),
    ("plan_chunks", lambda h: encoding.plan_chunks([3], 0), "chunk_tokens must be a whole number"),
    ("refuse_oversized", lambda h: encoding.refuse_oversized(blocks(), 1, 9), "the model takes 1"),
    ("shard", lambda h: encoding.shard([range(1)], 4, -1), "shard_id must be a whole number >= 0"),
    ("shard", lambda h: encoding.shard([range(1)], 0, 0), "num_shards must be a whole number >= 1"),
    ("split_evenly", lambda h: encoding.split_evenly([3], 0), "count must be a whole number >= 1"),
    ("ContinuousCache", lambda h: probability.ContinuousCache([True]), "got [True]"),
    ("best_weights", lambda h: probability.best_weights([ROWS]), "expected two or more"),
    ("TextMemory", lambda h: probability.TextMemory(0), "size must be a whole number >= 1, got 0"),
    ("joint_log_probs", lambda h: probability.joint_log_probs(ROWS, ROWS, ROWS, ROWS[:2]),
     "one shape (N,), got [(3,), (3,), (3,), (2,)]"),
    ("memory_log_sums", lambda h: probability.memory_log_sums(torch.zeros(2, 3, 4), ROWS, 1),
     "shape (B, T, D), (B, T) and (B,), got [(2, 3, 4), (3,)]"),
    ("knn_log_probs", lambda h: probability.knn_log_probs(ROWS, ROWS, ROWS), "one shape (N, k)"),
    ("knn_weights", lambda h: probability.knn_weights(torch.zeros(1, 1), 0.0), "must be > 0"),
    ("knn_weights", lambda h: probability.knn_weights(ROWS), "shape (N, k), got (3,)"),
    ("mix", lambda h: probability.mix(ROWS, ROWS.view(3, 1), knn_lambda=0.5),
     "log_p_knn must have the shape of log_p_lm (3,), got (3, 1)"),
    ("mix", lambda h: probability.mix(ROWS.view(3, 1), None, ROWS, cache_lambda=0.5),
     "log_p_cache must have the shape of log_p_lm (3, 1), got (3,)"),
    ("mix", lambda h: probability.mix(torch.tensor(0.0)), "log_p_lm must have shape (N,)"),
    ("paired_interval", lambda h: probability.paired_interval(ROWS, ROWS[:2], [0]), "(3,), (2,)"),
    ("paired_interval", lambda h: probability.paired_interval(ROWS, ROWS, [3]), "in [0, 3)"),
    ("paired_interval", lambda h: probability.paired_interval(ROWS, ROWS, None), "must be rows"),
    ("recall_at_k", lambda h: probability.recall_at_k([[1]], [[1], [2]]), "(1, 1) and (2, 1)"),
    ("vocabulary_log_probs", lambda h: probability.vocabulary_log_probs(ROWS, ROWS[:2], 9),
     "got (3,), (2,)"),
    ("vocabulary_log_probs", lambda h: probability.vocabulary_log_probs(ROWS, ROWS.long(), 9),
     "one shape (N, k), got (3,), (3,)"),
    ("KNNScorer", lambda h: scoring.KNNScorer(None, scoring.Settings(cache_reset="documents")),
     "cache_reset must be one of none, document, block, got 'documents'"),
    ("KNNScorer", lambda h: scoring.KNNScorer(None, scoring.Settings(k="9")),
     "k must be a whole number >= 1"),
    ("make_scorer", lambda h: scoring.make_scorer(None, scoring.Settings(distances="exat")),
     "distances must be one of exact, index, exhaustive"),
    ("Retriever", lambda h: search.Retriever.open(h.path), "paths must be a list of directories"),
    ("Retriever", lambda h: search.Retriever.open([h.path], k=31), "k (--knn-k) must be at most"),
    ("Retriever", lambda h: list(search.Retriever.open([h.path], k=3).batches(ROWS, 2.5)),
     "k must be in [1, 3], got 2.5"),
    ("Retriever", lambda h: search.Retriever.open([h.path], k=3).search(ROWS, True), "got True"),
    ("build_index", lambda h: search.build_index(np.zeros((1, 2)), "Flat", "cos", "", "/nonesuch"),
     "metric must be one of l2, ip, got 'cos'"),
    ("default_index_factory", lambda h: search.default_index_factory(-1, 8), "count must be a"),
    ("CacheSweep", lambda h: tuning.CacheSweep(DATA._replace(queries=ROWS), "ip", "none"),
     "keep_apart must be True or False, got 'none'"),
    ("Chosen",
     lambda h: tuning.Chosen(scoring.Settings(cache_reset="no")).tune_cache(DATA, [1], []),
     "cache_reset must be one of none, document, block, got 'no'"),
    ("Prefixes", lambda h: tuning.Prefixes(DATA, [3]), "k in [1, 2]"),
    ("best", lambda h: tuning.best([]), "there is no point to choose from"),
    ("best_lambda", lambda h: tuning.best_lambda(ROWS, ROWS[:2]), "of one shape (N,)"),
    ("best_of_each_k", lambda h: tuning.best_of_each_k([]), "there is no point to choose from"),
    ("collect", lambda h: tuning.collect(h.model, [], 1, 2), "the samples have 0 targets"),
    ("log_p_cache", lambda h: tuning.log_p_cache(DATA, [1], [1.0], "ip", False), "lacks queries"),
    ("log_p_knn", lambda h: tuning.log_p_knn(DATA, [1], 0.0), "temperatures in"),
    ("measure", lambda h: tuning.measure("valid", DATA, tuning.Chosen(scoring.Settings())),
     "data must have document_starts"),
    ("mixture_perplexities", lambda h: tuning.mixture_perplexities(ROWS, ROWS, [2.0]), "lambda"),
    ("save", lambda h: tuning.save("n.npz", DATA, {"k": 2}), "data lacks document_starts, parts"),
    ("sweep", lambda h: tuning.sweep(DATA, [1], temperatures=[]), "the grid is empty"),
]  # fmt: skip

# Their arguments are files, models, texts or samples of other types, at which Python itself stops.
TYPES_ALONE = {
    "dictionary_fingerprint", "document_starts", "encode", "file_fingerprint", "load", "perplexity",
    "read_tuned", "sample_of", "target_log_probs", "to_device", "weights_fingerprint",
}  # fmt: skip


@pytest.mark.parametrize("name, call, message", REFUSED, ids=lambda part: part)
def test_an_argument_that_cannot_be_is_named(house, name, call, message):
    with pytest.raises(UserError, match=re.escape(message)):
        call(house)


def is_record(value):
    return hasattr(value, "_fields") and not any(
        inspect.isfunction(part) for name, part in vars(value).items() if not name.startswith("_")
    )


def test_every_public_name_is_in_the_table():
    callables = {
        name
        for package in PACKAGES
        for name in package.__all__
        for value in [getattr(package, name)]
        if callable(value) and not is_record(value) and not getattr(value, "_is_protocol", False)
    }
    assert callables == {name for name, _, _ in REFUSED} | TYPES_ALONE


def test_a_metric_that_cannot_be_leaves_no_directory(tmp_path):
    work = tmp_path / "work"
    with pytest.raises(UserError, match="metric must be"):
        search.build_index(np.zeros((1, 2)), "Flat", "cos", str(tmp_path / "i"), str(work))
    assert not work.exists()


def test_all_faults_are_told_at_once():
    with pytest.raises(UserError, match="^f: a must be a whole number >= 1, got 0; b must be one"):
        check_arguments("f", a=(0, whole(1)), b=("z", one_of("xy")), c=(None, or_none(whole(1))))


def test_numbers_of_numpy_are_numbers():
    assert is_whole(np.int64(3), 1) and is_number(np.float32(0.5))
    assert not is_whole(3.0, 1) and not is_whole(True, 0) and not is_whole("3", 1)
    assert not is_number(float("nan")) and not is_number(True) and is_number(10**400)
