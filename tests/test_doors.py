"""Who may import whom: the packages of docs/architecture.md, read from the source."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import REPOSITORY

PACKAGE = REPOSITORY / "fairseq_knnlm"

# A package, or a module beside the packages, imports only from those before it, and from itself.
ORDER = [
    "version",
    "errors",
    "fields",
    "arguments",
    "options",
    "units",
    "progress",
    "html_page",
    "files",
    "neighbors",
    "probability",
    "datastore",
    "search",
    "encoding",
    "gating",
    "scoring",
    "inspection",
    "tuning",
    "building",
    "reporting",
    "plugin",
    "__init__",
    "hub",
    "cli",
]
PLACE = {package: number for number, package in enumerate(ORDER)}

# What only some packages may import.
DOORS = {
    "fairseq": {"plugin", "hub", "cli"},
    "fairseq_cli": {"plugin", "cli"},
    "omegaconf": {"hub", "plugin", "cli"},
    "bm25s": {"plugin"},
    "faiss": {"search"},
    "matplotlib": {"reporting"},
    "jinja2": {"html_page"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def package_of(file):
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file):
    """The modules that a file imports, anywhere in it, by their full names."""
    package = ["fairseq_knnlm", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "fairseq_knnlm":
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def imported_packages(file):
    """The packages of ours that a file imports from."""
    for module in imports(file):
        parts = module.split(".")
        if parts[0] == "fairseq_knnlm":
            package = parts[1] if len(parts) > 1 else "__init__"
            is_package = (PACKAGE / package).is_dir() or (PACKAGE / f"{package}.py").exists()
            yield package if is_package else "__init__"


def file_id(file):
    return str(file.relative_to(PACKAGE))


@pytest.mark.parametrize("file", FILES, ids=file_id)
def test_imports_come_from_above(file):
    package = package_of(file)
    assert package in PLACE, f"{package} is a new package: give it a place in {Path(__file__).name}"
    for other in imported_packages(file):
        assert PLACE[other] < PLACE[package] or other == package, f"{package} imports {other}"


@pytest.mark.parametrize("library, packages", DOORS.items(), ids=list(DOORS))
def test_only_some_packages_import(library, packages):
    found = {
        package_of(file)
        for file in FILES
        if any(module.split(".")[0] == library for module in imports(file))
    }
    assert found == packages


def attributes(file):
    """Every dotted name that a file reads, such as ``sys.modules``."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def test_nobody_goes_around_the_doors():
    """A library that a package may not import is not reached by another way either."""
    for name in ("sys.modules", "importlib.import_module"):
        users = {file_id(file) for file in FILES if name in set(attributes(file))}
        assert users <= {"plugin/commands.py"}, name
    for file in FILES:
        names = {node.id for node in ast.walk(ast.parse(file.read_text())) if hasattr(node, "id")}
        for library, packages in DOORS.items():
            assert library not in names or package_of(file) in packages, (
                f"{file_id(file)}: {library}"
            )


def test_fairseq_would_not_import_our_folders_by_itself():
    # it imports every file of folders of these names in a user-dir
    assert not {"models", "tasks"} & {path.name for path in PACKAGE.rglob("*") if path.is_dir()}


def test_the_doors_are_seen():
    # or else the tests above would pass for a parser that sees nothing
    assert {"fairseq.models", "fairseq_knnlm.search.retriever"} <= set(
        imports(PACKAGE / "plugin" / "opening.py")
    )
    assert {"building", "datastore", "plugin"} <= {
        package for file in (PACKAGE / "cli").glob("*.py") for package in imported_packages(file)
    }
    assert "faiss" in set(imports(PACKAGE / "search" / "faiss_import.py"))
    assert "sys.modules" in set(attributes(PACKAGE / "plugin" / "commands.py"))


def run_python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_importing_the_plugin_leaves_faiss_out():
    assert run_python("import fairseq_knnlm, sys; print('faiss' in sys.modules)") == ["False"]


def test_torch_is_imported_before_faiss():
    """The other order gave users of other kNN packages wrong results."""
    code = "import sys, fairseq_knnlm.search; print(*[m for m in sys.modules if m in {names}])"
    assert run_python(code.format(names="{'torch', 'faiss'}")) == ["torch", "faiss"]
    # without the rest of the package, which needs torch by itself
    code = (
        "import sys, types\n"
        "for name in ('fairseq_knnlm', 'fairseq_knnlm.search'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "    sys.modules[name].__path__ = [name.replace('.', '/')]\n"
        "import fairseq_knnlm.search.faiss_import\n"
        "print(*[m for m in sys.modules if m in {'torch', 'faiss'}])"
    )
    assert run_python(code) == ["torch", "faiss"]


PUBLIC = ["datastore", "search", "probability", "encoding", "scoring", "tuning", "building", "hub"]


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_there(package):
    module = __import__(f"fairseq_knnlm.{package}", fromlist=["__all__"])
    assert sorted(set(module.__all__), key=str.lower) == sorted(module.__all__, key=str.lower)
    for name in module.__all__:
        assert getattr(module, name).__doc__, f"{package}.{name} has no docstring"


def functions_of(thing):
    """A function, or the methods and properties that a class of ours adds."""
    if not inspect.isclass(thing):
        return [thing] if inspect.isfunction(thing) else []
    members = [part for name, part in vars(thing).items() if not name.startswith("_")]
    members = [getattr(part, "fget", None) or getattr(part, "__func__", part) for part in members]
    return [part for part in members if inspect.isfunction(part)]


@pytest.mark.parametrize("package", PUBLIC)
def test_public_functions_say_what_they_return(package):
    module = __import__(f"fairseq_knnlm.{package}", fromlist=["__all__"])
    functions = [part for name in module.__all__ for part in functions_of(getattr(module, name))]
    assert functions
    for function in map(inspect.unwrap, functions):
        annotation = inspect.signature(function).return_annotation
        assert annotation is not inspect.Signature.empty, f"{package}: {function.__qualname__}"
