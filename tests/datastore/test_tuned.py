"""What was tuned holds for the datastores that it was tuned with, and for no others."""

import json
import shutil

import pytest
from helpers.small import flip_byte, make_datastore
from helpers.writing import make_rows

from fairseq_knnlm.datastore import read_manifest, read_tuned, save_tuned, tuned_for
from fairseq_knnlm.datastore.manifest import TUNED
from fairseq_knnlm.errors import UserError

SETTINGS = {"k": 8, "knn_lambda": 0.25, "temperature": 10.0}


@pytest.fixture
def other(tmp_path):
    keys, values = make_rows()
    return make_datastore(tmp_path / "other", keys[:50], values[:50])


def test_what_is_stored_is_read_back(copy):
    assert read_tuned(str(copy)) is None
    path = save_tuned([str(copy)], SETTINGS)
    assert path == str(copy / TUNED)
    stored = read_tuned(str(copy))
    assert {name: stored[name] for name in SETTINGS} == SETTINGS
    assert stored["datastores"] == [read_manifest(str(copy))["checksum"]]
    assert tuned_for([str(copy)]) == stored


def test_it_holds_for_a_datastore_that_was_moved(copy, tmp_path):
    save_tuned([str(copy)], SETTINGS)
    moved = shutil.copytree(copy, tmp_path / "moved")
    assert tuned_for([str(moved)])["k"] == 8


def test_of_several_datastores_it_lies_in_the_first(copy, other):
    both = [str(copy), other]
    save_tuned(both, SETTINGS)
    assert read_tuned(other) is None
    assert tuned_for(both)["knn_lambda"] == 0.25
    with pytest.raises(UserError, match="tuned with 2 datastores .* names 1"):
        tuned_for([str(copy)])
    with pytest.raises(UserError, match="has no tuned.json"):
        tuned_for([other, str(copy)])


def test_it_does_not_hold_for_others(copy, other):
    save_tuned([str(copy)], SETTINGS)
    shutil.copy(copy / TUNED, other)
    with pytest.raises(UserError, match="is not what was tuned with") as error:
        tuned_for([other])
    for path in (str(copy), other):
        assert read_manifest(path)["checksum"] in str(error.value)


def test_what_is_damaged_edited_or_of_another_release_is_refused(copy):
    save_tuned([str(copy)], SETTINGS)
    written = (copy / TUNED).read_bytes()
    for edited in (
        b"",
        b"[]",
        b"{}",
        written[:-2],
        json.dumps({**json.loads(written), "k": 9}, indent=1, sort_keys=True).encode(),
        written.replace(b'"format_version": 1', b'"format_version": 2'),
    ):
        (copy / TUNED).write_bytes(edited)
        with pytest.raises(UserError, match="is damaged .* run fairseq-knnlm-tune again"):
            read_tuned(str(copy))
    (copy / TUNED).write_bytes(written)
    for position in range(0, len(written), 7):
        flip_byte(copy / TUNED, position)
        with pytest.raises(UserError, match="is damaged"):
            read_tuned(str(copy))
        flip_byte(copy / TUNED, position)
    assert read_tuned(str(copy))["k"] == 8


@pytest.mark.parametrize("paths", [[], "d"])
def test_datastores_must_be_named(paths):
    for function in (tuned_for, lambda paths: save_tuned(paths, SETTINGS)):
        with pytest.raises(UserError, match="a list of one or more directories"):
            function(paths)
