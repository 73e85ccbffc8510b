"""Steps of an example end with it, and a folder is never shared with one that is left over."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers.commands import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "examples"))
from pipeline import LINE_WIDTH, shown  # noqa: E402

# A step that starts a process of its own, says the ids of both, and lasts.
STEP = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("at work", os.getpid(), child.pid, flush=True)
time.sleep(60)
"""
PIPELINE = """
import sys
from pathlib import Path
sys.path.insert(0, {examples!r})
from pipeline import Pipeline
try:
    pipeline = Pipeline(Path({work!r}), steps=1)
    pipeline.run("step", "lasts", [sys.executable, "-c", {step!r}], [], [], show=".")
except KeyboardInterrupt:
    sys.exit("interrupted")
"""


def start(work, step=STEP):
    code = PIPELINE.format(examples=str(REPOSITORY / "examples"), work=str(work), step=step)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ids_at_work(process):
    for line in process.stdout:
        found = re.search(r"at work (\d+) (\d+)", line)
        if found and "print" not in line:
            return [int(number) for number in found.groups()]
    raise AssertionError("the step did not begin")


def is_alive(process_id):
    try:
        with open(f"/proc/{process_id}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(process_ids):
    deadline = time.monotonic() + 10
    while any(map(is_alive, process_ids)):
        assert time.monotonic() < deadline, "a process outlived the example"
        time.sleep(0.02)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_steps_end_with_the_example(tmp_path, ending):
    process = start(tmp_path)
    ids = ids_at_work(process)
    process.send_signal(ending)
    assert "interrupted" in process.communicate(timeout=20)[0]
    assert process.returncode == 1
    wait_until_gone(ids)


def test_a_folder_is_refused_while_a_step_of_a_killed_run_is_left(tmp_path):
    first = start(tmp_path)
    step, child = ids_at_work(first)
    first.kill()
    first.wait()
    try:
        second = start(tmp_path)
        text = second.communicate(timeout=20)[0]
        assert second.returncode == 1 and is_alive(step)
        assert f"(process {step}) is at work in {tmp_path}" in text and "--work" in text
    finally:
        os.kill(child, signal.SIGKILL)
        os.kill(step, signal.SIGKILL)
    wait_until_gone([step, child])
    third = start(tmp_path, "print('done')")
    assert "done" in third.communicate(timeout=20)[0] and third.returncode == 0


def test_a_folder_is_refused_while_another_run_is_at_work(tmp_path):
    first = start(tmp_path)
    ids = ids_at_work(first)
    second = start(tmp_path)
    assert f"(process {first.pid})" in second.communicate(timeout=20)[0]
    assert second.returncode == 1 and all(map(is_alive, ids))
    first.terminate()
    first.communicate(timeout=20)
    wait_until_gone(ids)


def test_lines_are_wrapped_and_never_cut():
    words = [f"word{number}" for number in range(60)]
    text = shown(f"2026-01-01 00:00:00 | INFO | fairseq_knnlm.tune | {' '.join(words)}\n")
    assert text.split() == words
    assert max(map(len, text.splitlines())) <= LINE_WIDTH


def test_a_command_can_be_copied():
    command = "fairseq-eval-lm data --path " + " ".join(f"--flag-{n} 'a b'" for n in range(30))
    lines = shown(f"INFO | fairseq_knnlm.tune | evaluate with: {command}\n").splitlines()
    copied = " ".join(line.strip().removesuffix("\\").strip() for line in lines[1:])
    assert copied.removeprefix("$ ") == command
    assert all(line.endswith("\\") for line in lines[1:-1])


def test_lines_of_training_keep_what_tells_how_far_it_is():
    line = "epoch 001:    100 / 2600 loss=8.7, ppl=417.1, wps=6170, ups=6.03, wpb=1023.3, bsz=4, "
    line += "num_updates=100, lr=0.0015, gnorm=1.36, train_wall=16, gb_free=2, wall=17"
    assert (
        shown(line)
        == "    epoch 001:    100 / 2600 loss=8.7, ppl=417.1, wps=6170, num_updates=100, wall=17"
    )
