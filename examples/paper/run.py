#!/usr/bin/env python3
"""The claims of the paper, section by section, as commands that are printed and run in turn.

    python examples/paper/run.py                                     # small: two cores, one page
    python examples/paper/run.py --sections 4.2                      # only some of them
    python examples/paper/run.py --scale full --dry-run              # the paper's own scale: shown

Everything is written to the folder --work; report.md there is the page. Started again, it goes on
with the first step that has not finished, or whose command, inputs or outputs have changed since.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent

sys.path.insert(0, str(HERE.parent))  # no package: --user-dir would shadow fairseq's own examples
import later  # noqa: E402
import report  # noqa: E402
import section4_1  # noqa: E402
import section4_2  # noqa: E402
import section4_3  # noqa: E402
import section5  # noqa: E402
import section6  # noqa: E402
from pipeline import Pipeline, display, in_lines, in_time  # noqa: E402
from recipe import Lab  # noqa: E402
from scales import SCALES  # noqa: E402

SECTIONS = {
    "4.1": section4_1,
    "4.2": section4_2,
    "4.3": section4_3,
    "5": section5,
    "6": section6,
    "later": later,
}
FOLDERS = ("text", "tuned", "scores", "reports", "ngrams")


class Step(NamedTuple):
    """A step that was asked for: see ``Pipeline.run``."""

    name: str
    what: str
    command: list
    inputs: list
    outputs: list


class Listing:
    """In place of a ``Pipeline``: keeps the commands, and runs none."""

    def __init__(self):
        self.steps = []

    def run(self, name, what, command, inputs, outputs, **options):
        """Keep what a step is, and what it reads and writes."""
        command = [display(argument) for argument in command]
        self.steps.append(Step(name, what, command, inputs, outputs))


def listed(work, scale, sections):
    """All steps of some sections, as ``Listing`` keeps them."""
    listing = Listing()
    lab = Lab(work, scale, listing)
    for section in sections:
        section.steps(lab)
    return listing.steps


def run(work, scale, sections):
    """Run all steps, then write the report; return its path."""
    for folder in FOLDERS:
        (work / folder).mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(work, steps=len(listed(work, scale, sections)))
    lab = Lab(work, scale, pipeline)
    for section in sections:
        section.steps(lab)
    path = report.write(work, scale.name, [section.results(lab) for section in sections])
    print(f"\n{in_time(sum(pipeline.seconds.values()))} of work: {display(path)}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="(default: all)"
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="small",
        help="full: the paper's; text/CORPUS/train.txt, valid.txt, test.txt in the folder --work "
        "are yours to put there (%(default)s)",
    )
    parser.add_argument(
        "--work", type=Path, default=HERE / "work", help="folder for all results (%(default)s)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show all commands, run none")
    return parser.parse_args()


def main():
    args = parse_args()
    scale, sections = SCALES[args.scale], [SECTIONS[name] for name in args.sections]
    if args.dry_run:
        for number, step in enumerate(listed(args.work, scale, sections), start=1):
            print(f"\n[{number}] {step.name}: {step.what}\n{in_lines(step.command)}")
        return
    try:
        run(args.work, scale, sections)
    except KeyboardInterrupt:
        sys.exit("\nrun.py: interrupted; start it again to go on")


if __name__ == "__main__":
    main()
