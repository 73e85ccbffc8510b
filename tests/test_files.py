"""Files are whole or not there, JSON has no infinities, and what cannot be written is refused."""

import json
import math
import os
import zlib

import numpy as np
import pytest
from helpers.small import flip_byte

from fairseq_knnlm import files
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.files import (
    atomic_file,
    checksum,
    damaged_ranges,
    file_checksums,
    json_bytes,
    refuse_unwritable,
    refuse_unwritable_directory,
    refuse_unwritable_outputs,
    render,
    without_infinities,
    write_all,
    write_atomically,
    write_json,
)

# -- writing ---------------------------------------------------------------------------------------


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "file"
    with atomic_file(str(path)) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_that_is_not_finished_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "file"
    write_atomically(str(path), b"old")
    with pytest.raises(error):
        with atomic_file(str(path)) as file:
            file.write(b"ne")
            raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_it_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, n=name, f=function: (calls.append(n), f(*args))[1]
        )
    write_atomically(str(tmp_path / "file"), b"data")
    assert calls == ["fsync", "replace"]


def test_what_takes_a_part_at_a_time_is_given_all():
    class Slow:
        data = b""

        def write(self, data):
            self.data += bytes(data[:3])
            return min(3, len(data))

    file, array = Slow(), np.arange(6, dtype=np.int16).reshape(2, 3)
    write_all(file, array)
    write_all(file, b"end")
    write_all(file, b"")
    assert file.data == array.tobytes() + b"end"


# -- JSON ------------------------------------------------------------------------------------------


def test_json_has_null_for_what_is_not_finite(tmp_path):
    value = {
        "a": [1.5, math.inf, {"b": -math.inf, "c": (math.nan, 2)}],
        "d": "inf",
        "e": None,
        "f": True,
        "g": np.float64("nan"),
    }
    expected = {"a": [1.5, None, {"b": None, "c": [None, 2]}], "d": "inf", "e": None, "f": True}
    expected["g"] = None
    assert without_infinities(value) == expected
    write_json(str(tmp_path / "file"), value)
    written = (tmp_path / "file").read_bytes()
    assert written == json_bytes(value) == json.dumps(expected, indent=1).encode()
    assert math.isinf(value["a"][1]), "the caller's value is not changed"


def test_what_is_rendered_holds_the_checksum_of_the_rest():
    value = {"b": 1, "a": [1, 2], "checksum": "old"}
    rendered = render(value)
    read = json.loads(rendered)
    rest = {"a": [1, 2], "b": 1}
    expected = zlib.crc32(json.dumps(rest, sort_keys=True).encode())
    assert read == {**rest, "checksum": f"{expected:08x}"}
    assert render(read) == rendered
    assert render({**read, "b": 2}) != rendered
    assert value["checksum"] == "old"


# -- checksums -------------------------------------------------------------------------------------


def test_a_checksum_is_the_crc_of_the_bytes():
    assert checksum(b"123456789") == "cbf43926"  # the check value of CRC-32 (IEEE 802.3)
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    assert checksum(array) == checksum(array.tobytes())
    assert checksum(b"") == "00000000"


def test_damage_is_named_by_its_segment(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SEGMENT_BYTES", 10)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(25)))
    checksums = file_checksums(str(path))
    assert len(checksums) == 3
    assert list(damaged_ranges(str(path), checksums)) == []
    for position, damage in ((0, (0, 9)), (9, (0, 9)), (10, (10, 19)), (24, (20, 24))):
        flip_byte(path, position)
        assert list(damaged_ranges(str(path), checksums)) == [damage]
        flip_byte(path, position)
    assert list(damaged_ranges(str(path), checksums[:2])) == [(20, 24)]


# -- refusing --------------------------------------------------------------------------------------


def test_a_file_that_could_not_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for path in ("new", "file", str(tmp_path / "new"), "./new"):
        refuse_unwritable("--output", path)
    for path in ("", str(tmp_path), "missing/new", "file/new"):
        with pytest.raises(UserError, match=f"^--output {path} cannot be written: it must name a"):
            refuse_unwritable("--output", path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_directory_that_could_not_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for path in (".", "new", "new/", str(tmp_path), str(tmp_path / "new")):
        refuse_unwritable_directory("--report", path)
    for path in ("", "file", "file/new", "missing/new"):
        with pytest.raises(UserError, match=f"^--report {path} cannot be written: it must name a"):
            refuse_unwritable_directory("--report", path)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_is_not_writable_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    for refuse in (refuse_unwritable, refuse_unwritable_directory):
        with pytest.raises(UserError, match="cannot be written"):
            refuse("--flag", str(tmp_path / "new"))


def test_two_outputs_of_one_name_are_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    path = str(tmp_path / "out")
    refuse_unwritable_outputs({"--html": path, "--json": None, "--text": f"{path}.txt"})
    for same in (path, str(tmp_path / "link" / "out")):
        with pytest.raises(UserError, match="--html and --json name the same file"):
            refuse_unwritable_outputs({"--html": path, "--json": same})
    with pytest.raises(UserError, match="--json .* cannot be written"):
        refuse_unwritable_outputs({"--html": path, "--json": str(tmp_path)})
