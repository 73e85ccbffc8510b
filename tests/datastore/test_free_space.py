"""What a build may take of the disk."""

import shutil

import pytest

from fairseq_knnlm.datastore.free_space import free_bytes
from fairseq_knnlm.datastore.manifest import KEYS


def test_what_is_there_already_counts_as_room_but_not_what_was_never_written(tmp_path):
    folder = tmp_path / "not" / "there"
    free = free_bytes(str(folder))
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.2)
    folder.mkdir(parents=True)
    with open(folder / KEYS, "wb") as file:
        file.write(bytes(1 << 20))
        file.truncate(1 << 42)
    assert free_bytes(str(folder)) < free + (1 << 41)
