"""What a build is said to cost, beside what it cost."""

import os

import numpy as np
import pytest
from helpers.commands import build, call
from helpers.small import contents, make_datastore, random_keys, random_values

from fairseq_knnlm.building.estimate import Estimate, estimate_build, table
from fairseq_knnlm.cli import build as build_command
from fairseq_knnlm.datastore.manifest import INDEX, KEYS, VALUES
from fairseq_knnlm.errors import UserError
from fairseq_knnlm.search import index_build
from fairseq_knnlm.search.index_cost import estimate_cost
from fairseq_knnlm.units import in_bytes

COUNT, DIMENSION, TYPES = 20_000, 32, 70_000


@pytest.mark.parametrize(
    "factory",
    ["Flat", "IVF64,PQ32x4fs", "IVF64,PQ8", "IVF64,SQfp16", "IVF64,RaBitQfs"],
)
def test_the_files_are_as_large_as_estimated(factory, tmp_path):
    values = random_values(1, COUNT, TYPES)
    keys = random_keys(0, COUNT, DIMENSION)
    path = make_datastore(tmp_path / "d", keys, values, factory=factory)
    costs = estimate_build(factory, COUNT, DIMENSION, "l2", values.dtype)
    size = {name: os.path.getsize(os.path.join(path, name)) for name in (KEYS, VALUES, INDEX)}
    assert costs.disk[KEYS] == size[KEYS] and costs.disk[VALUES] == size[VALUES]
    assert costs.disk[INDEX] == pytest.approx(size[INDEX], rel=0.03)


def test_the_parts_of_an_index_are_on_the_disk_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(index_build, "PART_ROWS", 3000)
    keys = random_keys(0, COUNT, DIMENSION)
    most, save = 0, index_build.save

    def watched(built, path):
        nonlocal most
        before = sum(map(len, contents(tmp_path / "work").values()))
        save(built, path)
        most = max(most, before + os.path.getsize(path))

    monkeypatch.setattr(index_build, "save", watched)
    arguments = ("IVF64,PQ32x4fs", "l2")
    index_build.build_index(keys, *arguments, str(tmp_path / INDEX), str(tmp_path / "work"), str)
    cost = estimate_cost(arguments[0], COUNT, DIMENSION, arguments[1])
    assert cost.file + cost.parts == pytest.approx(most, rel=0.03)
    assert cost.parts > 0.4 * cost.file


def test_the_parts_of_the_memory_are_added_up():
    costs = Estimate({KEYS: 5, VALUES: 2}, training=1 << 53, building=1 << 52, loaded=1 << 51)
    lines = {
        line[:22].strip(): line[22:34].strip()
        for line in table(costs, 3, 100, 1 << 50, None).splitlines()
    }
    assert lines["keys.npy"] == "5 bytes"
    assert lines["together"] == "7 bytes"
    # The process itself is less than what is rounded away.
    assert lines["training the index"] == lines["together, about"] == in_bytes(1 << 53)
    assert lines["building the index"] == in_bytes(1 << 52)
    assert lines["evaluation, k 1024"] == in_bytes((1 << 51) + (1 << 50))


def test_the_command_says_what_the_build_then_takes(data, checkpoints, tmp_path, capsys):
    arguments = (data, checkpoints["adaptive"], tmp_path / "d", "--context-window", 8)
    build(*arguments, "--estimate")
    printed = capsys.readouterr().out
    assert not (tmp_path / "d").exists()
    build(*arguments)
    count = len(np.load(tmp_path / "d" / VALUES))
    assert f"{count:,} entries of 32 dimensions, index Flat" in printed
    for name in (KEYS, VALUES):
        size = in_bytes(os.path.getsize(tmp_path / "d" / name))
        assert f"  {name:<20}{size:>12}\n" in printed
    assert "tokens/s on one process" in printed


def command(directory, *flags):
    """The build command, as it may be typed before there are a text and a checkpoint."""
    words = ["nowhere", "--path", "none.pt", "--knn-datastore", directory, *flags, "--cpu"]
    call(build_command.main, *words)


@pytest.mark.parametrize("entries", ["12345", "12,345", "1.2345e4"])
def test_sizes_stand_for_a_text_and_a_checkpoint(entries, tmp_path, capsys):
    command(tmp_path / "d", "--estimate", "--entries", entries, "--dimension", 16)
    assert "12,345 entries of 16 dimensions" in capsys.readouterr().out
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("entries", ["1.5", "many", "inf", "nan", "1e-1"])
def test_parts_of_an_entry_are_refused(entries, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(tmp_path / "d", "--estimate", "--entries", entries, "--dimension", 16)
    assert f"expected a whole number, such as 100000000 or 1e8, got '{entries}'" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--entries", 5, "--dimension", 5],
        ["--estimate", "--entries", 5],
        ["--estimate", "--entries", 0, "--dimension", 5],
    ],
)
def test_half_of_the_sizes_is_refused(flags, tmp_path):
    with pytest.raises(UserError, match="--entries and --dimension, both >= 1, are for --estim"):
        command(tmp_path / "d", *flags)


def test_a_disk_too_small_fails_the_estimate(tmp_path, capsys):
    with pytest.raises(UserError, match="needs about .* TB .* more than its disk has free"):
        command(tmp_path / "d", "--estimate", "--entries", 4 * 10**9, "--dimension", 65536)
    assert "together" in capsys.readouterr().out
