"""Manifest and tuned.json with anything in them: a refusal in words, or what was written."""

import copy as copying
import io
import json
import os

import numpy as np
import pytest
import torch
from helpers.gates import make_gates
from helpers.small import make_datastore, settings
from helpers.writing import COUNT, SIZES, make_rows
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fairseq_knnlm.datastore import Datastore, read_tuned, save_tuned
from fairseq_knnlm.datastore.manifest import MANIFEST, TUNED
from fairseq_knnlm.datastore.tuned import read_gate
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.files import render
from fairseq_knnlm.gating import Nest, from_bytes, to_bytes
from fairseq_knnlm.gating.ngram_counts import ORDERS
from fairseq_knnlm.scoring.settings import Settings, range_faults
from fairseq_knnlm.scoring.tuned_settings import settings_of_tuned

# The same examples every time, and none of earlier runs.
fuzzed = hypothesis_settings(
    max_examples=250,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# What JSON can hold, and what is near to what is there.
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.integers(),
    st.sampled_from([2**31, 2**63, 10**40, -(10**40)]),
    st.floats(allow_nan=True, allow_infinity=True),
)
TEXTS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(["l2", "ip", "Flat", "uint8", "float16", "int64", "auto", "zzz", "../x", "8"]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
# A way into nested dicts and lists, by numbers that are taken modulo what is there.
PATHS = st.lists(st.integers(0, 1000), min_size=1, max_size=4)
EDITS = st.lists(
    st.tuples(PATHS, st.sampled_from(["set", "remove", "repeat"]), VALUES), min_size=1, max_size=3
)


def edited(fields, edits):
    """Fields with some of them replaced, removed or, of a list, repeated."""
    fields = copying.deepcopy(fields)
    for path, kind, value in edits:
        parent, last = fields, None
        for step in path:
            names = sorted(parent) if isinstance(parent, dict) else range(len(parent))
            if not names:
                break
            last, holder = names[step % len(names)], parent
            parent = parent[last]
            if not isinstance(parent, (dict, list)):
                break
        if last is None:
            continue
        if kind == "remove":
            del holder[last]
        elif kind == "repeat" and isinstance(holder[last], list):
            holder[last] = holder[last] * 2
        else:
            holder[last] = value
    return fields


@pytest.fixture(scope="module")
def datastore(tmp_path_factory):
    """A datastore with all fields, and its manifest as written."""
    path = make_datastore(
        tmp_path_factory.mktemp("fuzz") / "d",
        *make_rows(),
        SIZES,
        data={"split": "train", "sha256": "c" * 64},
        context={"tokens_per_sample": 16, "context_window": 4, "sample_break_mode": "none"},
        versions={"python": "3"},
    )
    with open(os.path.join(path, MANIFEST)) as file:
        return path, json.load(file)


@pytest.fixture(scope="module")
def gates():
    """The file of a gate of each kind."""
    return {kind: to_bytes(gate) for kind, gate in make_gates().items()}


def write(path, name, fields):
    with open(os.path.join(path, name), "wb") as file:
        file.write(render(fields))


@fuzzed
@given(edits=EDITS)
def test_a_manifest_of_anything(datastore, edits):
    path, manifest = datastore
    write(path, MANIFEST, edited(manifest, edits))
    try:
        opened = Datastore.open(path)
        opened.check_rows(range(len(opened)))
        values = opened.values
        with opened.reading_index():
            pass
        assert list(opened.verify()) == []
    except UserError as error:
        assert path in str(error)
        return
    keys, expected = make_rows()
    assert len(opened) == COUNT
    assert np.array_equal(opened.keys, keys) and np.array_equal(values, expected)
    # Whoever reads these finds what the tables promise.
    for name in settings():
        assert type(opened.manifest.get(name, {})) in (dict, str)


TUNED_SETTINGS = {
    "k": 8, "knn_lambda": 0.25, "temperature": 10.0, "nprobe": 4, "distances": "exact",
    "cache_size": 100, "cache_lambda": 0.1, "cache_theta": 0.2, "cache_metric": "ip",
    "cache_reset": "none", "tuned_on": {"split": "valid"},
}  # fmt: skip


@fuzzed
@given(edits=EDITS)
def test_a_tuned_file_of_anything(datastore, edits):
    path, manifest = datastore
    write(path, MANIFEST, manifest)
    save_tuned([path], TUNED_SETTINGS)
    with open(os.path.join(path, TUNED)) as file:
        stored = json.load(file)
    write(path, TUNED, edited(stored, edits))
    try:
        found = settings_of_tuned(read_tuned(path), path)
    except UserError as error:
        assert TUNED in str(error)
        return
    used = Settings(**found)
    assert range_faults(used._asdict()) == []
    assert all(isinstance(number, int) and number >= 1 for number in (used.k, used.nprobe))
    assert 0 <= used.knn_lambda <= 1 and used.distances in ("exact", "index", "exhaustive")
    assert used.temperature == "auto" or 0 < used.temperature < np.inf


@fuzzed
@given(edits=EDITS)
def test_a_tuned_file_of_anything_with_a_gate(datastore, edits):
    path, manifest = datastore
    write(path, MANIFEST, manifest)
    gate = to_bytes(Nest(8, 10.0, alpha=0.3, tau=0.1, cache_share=0.2))
    save_tuned([path], {**TUNED_SETTINGS, "gate": "nest"}, gate)
    with open(os.path.join(path, TUNED)) as file:
        stored = json.load(file)
    write(path, TUNED, edited(stored, edits))
    try:
        found = read_gate(path, read_tuned(path))
    except UserError as error:
        assert TUNED in str(error)
        return
    assert found in (gate, None)


@fuzzed
@given(
    kind=st.sampled_from(["nest", "buckets", "learned"]),
    edits=EDITS,
    cut=st.integers(0, 400) | st.none(),
)
def test_a_gate_of_anything(gates, kind, edits, cut):
    """Numbers that a gate can have, or a refusal in words; also where the checksum fits."""
    with np.load(io.BytesIO(gates[kind])) as file:
        arrays = {name: file[name] for name in file.files}
    about = edited(json.loads(str(arrays["about"])), edits)
    file = io.BytesIO()
    np.savez(file, **{**arrays, "about": np.array(json.dumps(about))})
    data = file.getvalue() if cut is None else file.getvalue()[:-cut]
    try:
        gate = from_bytes(data)
    except UserError as error:
        assert "gate" in str(error)
        return
    before = None
    if gate.looks_before:
        before = gate.look(torch.zeros(3, 6), torch.zeros(3, 2), torch.full((3, ORDERS), -1))
    values = torch.zeros(3, gate.k, dtype=torch.long) if gate.k < 1000 else None
    if values is None:
        return
    weights = gate.weigh(before, torch.ones(3, gate.k), values)
    total = weights.knn_lambda + weights.cache
    assert (weights.knn >= 0).all() and (weights.cache >= 0).all() and (total <= 1 + 1e-5).all()
