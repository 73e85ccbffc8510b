"""What the documents say exists: links, flags, commands, modules and the code that they show."""

import ast
import importlib
import inspect
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest
import torch
import yaml
from fairseq import options
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.data.encoders.moses_tokenizer import MosesTokenizerConfig
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY

import fairseq_knnlm
import fairseq_knnlm.hub

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "fairseq_knnlm"
README = REPOSITORY / "README.md"
FLAGS = REPOSITORY / "docs" / "flags.md"
ARCHITECTURE = REPOSITORY / "docs" / "architecture.md"
DOCUMENTS = [
    README,
    *(REPOSITORY / name for name in ("CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *sorted((REPOSITORY / "examples").rglob("*.md")),
]
MOST_README_LINES = 150

STOCK_COMMANDS = {
    "fairseq-preprocess": options.get_preprocessing_parser,
    "fairseq-train": options.get_training_parser,
    "fairseq-eval-lm": options.get_eval_lm_parser,
    "fairseq-generate": options.get_generation_parser,
    "fairseq-interactive": options.get_interactive_generation_parser,
}
# Flags of other programs, pip and ruff, that the documents show, and what no parser lists.
FOREIGN_FLAGS = {
    *("--no-build-isolation", "--check", "--help", "--help-all"),
    "--sentencepiece-model",  # fairseq has it where --bpe sentencepiece is given
}

# Not of wildcards such as --knn-*.
FLAG = r"(?<![\w-])--[a-z0-9]+(?:-[a-z0-9]+)*(?![\w*-])"


class Block(NamedTuple):
    """A fenced block of code."""

    language: str
    text: str


def relative(path):
    return str(path.relative_to(REPOSITORY))


every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=relative)


# -- reading Markdown ------------------------------------------------------------------------------


@cache
def parts(path):
    """Prose without its fenced blocks, and those blocks."""
    prose, blocks, inside = [], [], None
    for line in path.read_text(encoding="utf-8").splitlines():
        fence = re.match(r" *```(\w*)", line)
        if fence and inside is None:
            inside = (fence[1], [])
        elif fence:
            blocks.append(Block(inside[0], "\n".join(inside[1])))
            inside = None
        else:
            (prose if inside is None else inside[1]).append(line)
    assert inside is None, f"{path}: a fence is never closed"
    return "\n".join(prose), blocks


def code_spans(path):
    """What stands between backticks in prose, a line break as a space."""
    return [
        " ".join(span.split()) for span in re.findall(r"`((?:[^`\n]|\n(?!\n))+)`", parts(path)[0])
    ]


def headings(path):
    return re.findall(r"^#{1,6} +(.+?) *#*$", parts(path)[0], re.M)


def anchors(path):
    """Of every heading, as GitHub makes them."""
    seen, found = Counter(), set()
    for heading in headings(path):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return found


def links(path):
    """Targets of links to something in this repository."""
    prose = re.sub(r"`[^`\n]+`", "", parts(path)[0])
    inline = re.findall(r"\]\(<?([^)\s>]+)>?(?: +\"[^\"]*\")?\)", prose)
    defined = re.findall(r"^ *\[[^\]]+\]: +(\S+)", prose, re.M)
    return [
        unquote(target) for target in inline + defined if not re.match(r"[a-z]+:", target, re.I)
    ]


def command_lines(path):
    """Every command line in blocks and in backticks, without comments, whole on one line."""
    prose, blocks = parts(path)
    lines = [
        line
        for block in blocks
        if block.language != "python"
        for line in re.sub(r"\\(?: *#.*)?\n", " ", block.text).splitlines()
    ]
    for line in lines + code_spans(path):
        line = re.sub(r"(?:^|\s)#.*", "", line).strip().removeprefix("$ ")
        if re.match(r"(fairseq-|python\s|pip\s|make\s)", line):
            yield line


# -- what there is ---------------------------------------------------------------------------------


@cache
def our_commands():
    """Modules of our commands, by the names that setup.py installs."""
    text = (REPOSITORY / "setup.py").read_text(encoding="utf-8")
    return dict(re.findall(r'"(fairseq-knnlm-[\w-]+) = ([\w.]+):main"', text))


def task_flags():
    """Flags of the fields of the task's dataclass that are ours."""
    fields = TASK_DATACLASS_REGISTRY["knnlm_lm"].__dataclass_fields__
    ours = ("knn_", "trime_")
    return {"--" + name.replace("_", "-") for name in fields if name.startswith(ours)}


def criterion_flags():
    """Flags of the fields of the criterion's dataclass that are ours."""
    fields = CRITERION_DATACLASS_REGISTRY["trime_loss"].__dataclass_fields__
    return {"--" + name.replace("_", "-") for name in fields if name.startswith("trime_")}


def flags_of(parser):
    return {
        flag
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--") and flag != "--help"
    }


@cache
def own_flags(command):
    """Flags that one of our commands has beside those of ``fairseq-eval-lm`` and of the task."""
    flags = flags_of(importlib.import_module(our_commands()[command]).make_parser())
    return flags - flags_of(options.get_eval_lm_parser()) if "--path" in flags else flags


@cache
def all_flags(command):
    """Every flag that a command takes, with those that the task adds."""
    if command in STOCK_COMMANDS:
        parser = STOCK_COMMANDS[command]()
    else:
        parser = importlib.import_module(our_commands()[command]).make_parser()
    # fairseq-preprocess has a --task as well, and takes none of its flags
    if "--task" in flags_of(parser) and command != "fairseq-preprocess":
        TASK_REGISTRY["knnlm_lm"].add_args(parser)
        gen_parser_from_dataclass(parser, MosesTokenizerConfig())  # of --tokenizer moses
    if command == "fairseq-train":
        return flags_of(parser) | criterion_flags()
    return flags_of(parser)


@cache
def script_flags():
    """Flags in the source of the examples: their own, and those that they hand to fairseq."""
    return {
        flag
        for script in (REPOSITORY / "examples").rglob("*.py")
        for flag in re.findall(rf'"({FLAG})', script.read_text(encoding="utf-8"))
    }


def knnlm_flags():
    return task_flags().union(*map(own_flags, our_commands()))


# -- links -----------------------------------------------------------------------------------------


@every_document
def test_links_resolve(path):
    broken = []
    for target in links(path):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists():
            broken.append(f"{target}: no such file")
        elif anchor and anchor not in anchors(file):
            broken.append(f"{target}: no such heading")
    assert not broken


def test_every_page_is_linked_from_the_readme():
    linked = {(README.parent / target.partition("#")[0]).resolve() for target in links(README)}
    pages = {path for path in DOCUMENTS if path.parent in (REPOSITORY, REPOSITORY / "docs")}
    assert pages - linked == {README}


@every_document
def test_named_source_files_exist(path):
    """Paths of Python files in backticks, from the repository, the package or the document."""
    named = {span for span in code_spans(path) if re.fullmatch(r"[\w./-]+/[\w-]+\.py", span)}
    roots = (REPOSITORY, PACKAGE, path.parent)
    assert {name for name in named if not any((root / name).is_file() for root in roots)} == set()


# -- commands and flags ----------------------------------------------------------------------------


@every_document
def test_named_commands_exist(path):
    named = set(re.findall(r"fairseq-knnlm-[a-z-]*[a-z]", path.read_text(encoding="utf-8")))
    assert named - set(our_commands()) == set()


@every_document
def test_commands_take_the_flags_they_are_shown_with(path):
    unknown = []
    for line in command_lines(path):
        name = line.split()[0]
        if name in STOCK_COMMANDS or name in our_commands():
            unknown += [(name, flag) for flag in set(re.findall(FLAG, line)) - all_flags(name)]
    assert not unknown


@every_document
def test_stock_commands_are_shown_with_the_task_of_our_flags(path):
    for line in command_lines(path):
        if line.split()[0] in STOCK_COMMANDS and "--knn-" in line and "..." not in line:
            assert "--task knnlm_lm" in line and "--user-dir" in line, line


@every_document
def test_scripts_are_there_and_take_the_flags_they_are_shown_with(path):
    for line in command_lines(path):
        script = re.match(r"python (\S+\.py)", line)
        if script:
            assert (REPOSITORY / script[1]).is_file(), line
            known = script_flags() | all_flags("fairseq-eval-lm")
            assert set(re.findall(FLAG, line)) - known == set(), line


@every_document
def test_every_flag_exists(path):
    text = path.read_text(encoding="utf-8")
    named = set(re.findall(FLAG, text))
    of_ours = {flag for flag in named if flag.startswith("--knn-")}
    assert of_ours - knnlm_flags() == set()
    known = script_flags().union(FOREIGN_FLAGS, *map(all_flags, [*STOCK_COMMANDS, *our_commands()]))
    assert named - known == set()


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
    for path in DOCUMENTS:
        for line in command_lines(path):
            if line.startswith("make "):
                assert line.split()[1] in targets, f"{relative(path)}: {line}"


def listed_flags():
    """First cells of the tables of docs/flags.md, by the heading above them."""
    found, heading = {}, None
    for line in parts(FLAGS)[0].splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        row = re.match(r"\| `(--[^`]+)` \|", line)
        if row:
            found.setdefault(heading, []).append(row[1])
    return found


def test_flags_page_lists_exactly_the_flags_that_exist():
    existing = {"The task knnlm_lm": task_flags(), "The criterion trime_loss": criterion_flags()}
    existing.update({command: own_flags(command) for command in our_commands()})
    existing = {heading: flags for heading, flags in existing.items() if flags}
    assert {heading: sorted(flags) for heading, flags in listed_flags().items()} == {
        heading: sorted(flags) for heading, flags in existing.items()
    }


# -- Python ----------------------------------------------------------------------------------------


def python_blocks(path):
    return [block.text for block in parts(path)[1] if block.language == "python"]


def resolve(name):
    """What a dotted name stands for: a module, or something in one."""
    module, *rest = name.split(".")
    found = importlib.import_module(module)
    for part in rest:
        if not hasattr(found, part) and inspect.ismodule(found):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def imported_names(tree):
    """What a piece of code imports from the package, by the names it has there."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "fairseq_knnlm":
                    resolve(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fairseq_knnlm":
            for alias in node.names:
                found[alias.asname or alias.name] = resolve(f"{node.module}.{alias.name}")
    return found


def called(function, names):
    """What is called, if it is an imported name or an attribute of one; else None."""
    if isinstance(function, ast.Attribute):
        owner = called(function.value, names)
        return None if owner is None else getattr(owner, function.attr)
    return names.get(function.id) if isinstance(function, ast.Name) else None


@every_document
def test_python_blocks_compile(path):
    for block in python_blocks(path):
        compile(block, relative(path), "exec")


@every_document
def test_python_blocks_import_and_call_what_exists(path):
    for block in python_blocks(path):
        tree = ast.parse(block)
        names = imported_names(tree)
        for node in ast.walk(tree):
            function = called(node.func, names) if isinstance(node, ast.Call) else None
            if function is not None:
                keywords = {keyword.arg: None for keyword in node.keywords}
                inspect.signature(function).bind(*node.args, **keywords)


def test_the_example_of_the_readme_runs_as_it_stands(data, checkpoints, datastores):
    (example,) = python_blocks(README)
    folder, file = checkpoints["plain"].parent, checkpoints["plain"].name
    placeholders = {
        "CHECKPOINTS": folder, "checkpoint_best.pt": file, "DATA": data,
        "DIR": datastores["plain"],
    }  # fmt: skip
    for name, place in placeholders.items():
        assert f'"{name}"' in example
        example = example.replace(f'"{name}"', repr(str(place)))
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    scored = fairseq_knnlm.hub.from_pretrained(
        str(folder), file, str(data), knn_datastore=str(datastores["plain"]), knn_k=64,
        knn_lambda=0.25, knn_temperature=10,
    ).score("My fellow citizens")  # fmt: skip
    assert len(names["log_p"]) == len(names["tokens"]) == 4
    torch.testing.assert_close(names["log_p"][:-1], scored["positional_scores"])


@every_document
def test_named_modules_exist(path):
    named = re.findall(r"(?<![\w/.-])fairseq_knnlm(?:\.\w+)+", path.read_text(encoding="utf-8"))
    for name in set(named):
        resolve(name)


# -- pages -----------------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_README_LINES


def test_architecture_page_has_every_package():
    rows = re.findall(r"^\| `([\w/]+)` \|.*\| (.+) \|$", parts(ARCHITECTURE)[0], re.M)
    folders = {folder.parent.name for folder in PACKAGE.glob("*/__init__.py")}
    assert {name.strip("/") for name, _ in rows} == {*folders, PACKAGE.name}
    for name, modules in rows:
        folder = PACKAGE if name == PACKAGE.name else PACKAGE / name
        missing = [
            module
            for module in re.findall(r"`(\w+)`", modules)
            if not (folder / f"{module}.py").is_file()
        ]
        assert not missing, name


def test_citation_file():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == fairseq_knnlm.__version__
    assert citation["license"] == "MIT"
    (paper,) = citation["references"]
    assert paper["url"] in README.read_text(encoding="utf-8")
    assert len(paper["authors"]) == 5


def test_the_documents_are_seen():
    # or else the tests above would pass for a reader that sees nothing
    lines = list(command_lines(README))
    assert "make demo" in lines and any(line.startswith("fairseq-knnlm-build ") for line in lines)
    assert any("--report-subset" in line for line in lines if "fairseq-knnlm-tune" in line)
    assert {"--knn-datastore", "--knn-k"} <= task_flags()
    assert "docs/flags.md" in links(README)
    assert python_blocks(README)
