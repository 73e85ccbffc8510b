"""In commands, threads that wait sleep; elsewhere, and where users decide, nothing is changed."""

import os
import subprocess
import sys

import pytest
import torch

from fairseq_knnlm.plugin import spinning

# Many short sums by two threads, with pauses in which the second waits for the next.
WAITING = """
import sys, time, torch
torch.set_num_threads(2)
if sys.argv[1] == "short":
    from fairseq_knnlm.plugin.spinning import spin_little
    spin_little()
numbers = torch.ones(1 << 17)
numbers.add_(1)
begun = time.process_time()
for _ in range(40):
    numbers.add_(1)
    time.sleep(0.01)
print(time.process_time() - begun)
"""
TELL = "import os, fairseq_knnlm; print(os.environ.get('GOMP_SPINCOUNT'))"
REMOVED = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def run(program, *words, **environment):
    kept = {name: value for name, value in os.environ.items() if name not in REMOVED}
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True, text=True, check=True, env={**kept, **environment},
    )  # fmt: skip
    return done.stdout.splitlines()[-1]


needs_two_cores = pytest.mark.skipif(
    not sys.platform.startswith("linux") or len(os.sched_getaffinity(0)) < 2,
    reason="threads of GNU's OpenMP wait for each other on two cores",
)


@needs_two_cores
def test_threads_that_wait_sleep_early():
    if "libgomp" not in open("/proc/self/maps").read():
        pytest.skip(f"torch {torch.__version__} has another OpenMP")
    spinning, sleeping = (float(run(WAITING, how)) for how in ("long", "short"))
    assert sleeping < 0.5 * spinning


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_asks_for_is_left_alone(name, monkeypatch):
    for other in REMOVED:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "123")
    monkeypatch.setattr(spinning.torch, "get_num_threads", pytest.fail)
    spinning.spin_little()
    asked = {other: os.environ.get(other) for other in REMOVED}
    assert asked == {**dict.fromkeys(REMOVED), name: "123"}


def test_it_is_done_in_commands_of_fairseq_and_not_in_scripts():
    # a console script imports its function under this name
    assert run(f"from fairseq_cli.eval_lm import cli_main; {TELL}") == "10000"
    assert run(TELL) == "None"
