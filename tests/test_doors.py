"""Who may import whom: the rooms of the design, read from the source."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fairseq_knnlm"

# A room imports only from the floors below its own.
FLOORS = [
    ["errors", "html_page", "near_pairs", "version"],
    ["bootstrap", "checkpoints", "fingerprint", "interpolation", "metrics"],
    ["exhaustive", "list_search"],
    ["cache", "context", "datastore", "index", "inspection", "key_extractor"],
    ["datastore_writer", "neighbors", "neighbors_file", "search_index", "tuned"],
    ["inspection_html", "inspection_text", "report_html"],
    ["cache_sweep", "retriever", "scorer", "sweep"],
    ["analysis", "config", "estimate", "eval_lm", "generator", "memories", "temperature"],
    ["report", "task"],
    ["__init__"],
    ["cli", "hub"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# What only some rooms may import.
GUARDED = {
    "fairseq": {"config", "task", "generator", "hub", "cli"},
    "fairseq_cli": {"cli"},
    "omegaconf": {"config", "task", "generator", "hub", "cli"},
    "faiss": {"index"},
    "matplotlib": {"report"},
}


def room_of(file):
    return "cli" if file.parent.name == "cli" else file.stem


def imports(file):
    """The modules that a file imports, anywhere in it, by their full names."""
    package = ["fairseq_knnlm", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module in ("fairseq_knnlm", "fairseq_knnlm.cli"):
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def imported_rooms(file):
    """The rooms of the package that a file imports from."""
    for module in imports(file):
        parts = module.split(".")
        if parts[0] == "fairseq_knnlm":
            room = parts[1] if len(parts) > 1 else "__init__"
            yield room if room in FLOOR or (PACKAGE / f"{room}.py").exists() else "__init__"


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_run_downwards(file):
    room = room_of(file)
    assert room in FLOOR, f"{file.name} is a new room: give it a floor in {Path(__file__).name}"
    for other in imported_rooms(file):
        assert other in FLOOR, f"{other} has no floor"
        assert FLOOR[other] < FLOOR[room] or other == room == "cli", f"{room} imports {other}"


@pytest.mark.parametrize("guarded, rooms", GUARDED.items(), ids=list(GUARDED))
def test_only_some_rooms_import(guarded, rooms):
    found = {
        room_of(file)
        for file in FILES
        if any(module.split(".")[0] == guarded for module in imports(file))
    }
    assert found <= rooms


def test_the_doors_are_seen():
    # or else the tests above would pass for a parser that sees nothing
    assert {"fairseq.tasks", "fairseq_knnlm.retriever"} <= set(imports(PACKAGE / "task.py"))
    assert "scorer" in set(imported_rooms(PACKAGE / "cli" / "build.py"))
    assert "search_index" in set(imported_rooms(PACKAGE / "retriever.py"))
    assert "faiss" in set(imports(PACKAGE / "index.py"))
