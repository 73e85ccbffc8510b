"""What is installed: the wheel, its commands, and what the README says of them."""

import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
from helpers.commands import REPOSITORY, command, run

import fairseq_knnlm

TEMPLATES = {
    str(path.relative_to(REPOSITORY))
    for path in (REPOSITORY / "fairseq_knnlm").rglob("templates/*")
}
COMMANDS = [f"fairseq-knnlm-{name}" for name in ("build", "tune", "eval", "inspect", "info")]


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """A copy of what git has of the repository."""
    source = tmp_path_factory.mktemp("source") / "source"
    subprocess.run(
        ["git", "checkout-index", "--all", f"--prefix={source}/"], cwd=REPOSITORY, check=True
    )
    return source


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation",
        "--wheel-dir", folder, source,
    )  # fmt: skip
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = {
        str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "fairseq_knnlm").rglob("*.py")
    }
    sources.add("fairseq_knnlm/py.typed")  # the annotations are for users' type checkers
    assert {name for name in names if ".dist-info/" not in name} == sources | TEMPLATES


def test_sdist_holds_the_templates(source, tmp_path):
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=source)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert TEMPLATES <= names


def test_installed_pages_render(wheel, tmp_path):
    """From the wheel alone, its templates included."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "from fairseq_knnlm import html_page\n"
        "environment = html_page.environment()\n"
        "print(html_page.__file__, *environment.list_templates(['j2']))\n"
        "for name in environment.list_templates(['j2']): environment.get_template(name)"
    )
    printed = run(sys.executable, "-c", code, cwd=tmp_path).stdout
    assert f"{tmp_path}/fairseq_knnlm/html_page.py inspection/templates/passage.html.j2" in printed


def test_wheel_names_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    text = archive.read(metadata).decode()
    assert f"Version: {fairseq_knnlm.__version__}" in text
    required = re.findall(r"Requires-Dist: ([\w-]+)[^;\n]*(?:; python_version.*)?$", text, re.M)
    assert sorted(required) == [
        "fairseq", "fairseq-fixed", "jinja2", "numpy", "sacremoses", "torch",
    ]  # fmt: skip


def test_wheel_works_outside_the_repository(wheel, data, checkpoints, tmp_path):
    """The installed package's own directory serves as --user-dir."""
    run(
        sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site",
        wheel,
    )  # fmt: skip
    done = subprocess.run(
        [
            command("fairseq-eval-lm"), data, "--user-dir", tmp_path / "site" / "fairseq_knnlm",
            "--task", "knnlm_lm", "--path", checkpoints["plain"], "--cpu",
            "--tokens-per-sample", "32",
        ],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "Perplexity" in done.stdout, done.stdout[-2000:]


@pytest.mark.parametrize("name", COMMANDS)
def test_installed_commands_help(name):
    text = run(command(name), "--help").stdout
    assert "usage:" in text
    if name != "fairseq-knnlm-info":
        assert "--knn-datastore" in text and "--tokens-per-sample" in text
