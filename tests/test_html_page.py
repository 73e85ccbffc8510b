"""The templates of all pages, as a linter sees them."""

import math
import re
import shutil
import subprocess

import jinja2
import pytest
from helpers.commands import REPOSITORY
from helpers.page import Page
from jinja2 import meta

from fairseq_knnlm import html_page

PACKAGE = REPOSITORY / "fairseq_knnlm"
FILES = sorted(path for path in PACKAGE.rglob("templates/*"))
TEMPLATES = [path for path in FILES if path.suffix == ".j2"]


def relative(path):
    return str(path.relative_to(PACKAGE))


def test_the_templates_are_seen():
    assert {path.suffix for path in FILES} == {".j2", ".css", ".js"}
    assert {"page.html.j2", "passage.html.j2", "report.html.j2"} <= {
        path.name for path in TEMPLATES
    }


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_template_parses_and_escapes_everything(path):
    source = path.read_text(encoding="utf-8")
    parsed = html_page.environment().parse(source)
    assert not re.search(r"\|\s*safe\b|autoescape|Markup", source)
    for name in meta.find_referenced_templates(parsed):
        assert (PACKAGE / name).exists(), name
    if path.suffix != ".j2":  # shown as it is: nothing in it is a template's
        assert not list(parsed.find_all(jinja2.nodes.Name))
        assert "</" not in source  # would end the element that it is put into


@pytest.mark.parametrize("path", TEMPLATES, ids=relative)
def test_attributes_are_quoted(path):
    """What is escaped is safe between quotes, and only there; no handler may be in an attribute."""
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"<[^<>%{}]*\s[\w-]+={{", source)
    assert not re.search(r"\son\w+=", source)


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".css"], ids=relative)
def test_a_style_sheet_loads_nothing_and_closes_its_braces(path):
    source = path.read_text(encoding="utf-8")
    assert source.count("{") == source.count("}")
    assert not re.search(r"url\(|@import|expression", source)
    # a colour that is no variable would be the same in the dark
    colors = re.findall(r"^(?!\s*--).*#[0-9a-f]{3,8}\b.*$", source, re.M)
    assert all("--" in line for line in colors)


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".js"], ids=relative)
def test_a_script_runs_no_text(path):
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|fetch", source)
    if shutil.which("node"):
        subprocess.run(["node", "--check", path], check=True)


def test_a_misspelt_name_is_an_error():
    environment = html_page.environment()
    assert environment.autoescape is True
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ nonesuch }}").render()
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ row.nonesuch }}").render(row={"name": 1})


def test_facts_are_escaped():
    nasty = """<script>alert("1")</script>'&amp;"""
    template = '{% from "templates/parts.html.j2" import definitions %}{{ definitions(facts) }}'
    text = html_page.environment().from_string(template).render(facts={nasty: nasty, "n": 1})
    page = Page(text)
    assert page.tags == ["dl", *["div", "dt", "dd"] * 2]
    assert nasty + nasty in page.text


@pytest.mark.parametrize(
    "log_ratio, words",
    [
        (0.0, "×1.00"), (math.log(2), "×2.00"), (math.log(1234), "×1,234"),
        (math.log(3e8), "×3.0e+08"), (-math.inf, "×0.00"),
    ],
)  # fmt: skip
def test_factors(log_ratio, words):
    assert html_page.factor(log_ratio) == words


def test_numbers_in_words():
    assert html_page.number(1234.567) == "1,234.57"
    assert html_page.number(math.inf) == html_page.percent(math.inf) == "infinite"
    assert html_page.percent(-0.1234, sign="+") == "-12.3%"
    assert html_page.percent(0.5, 0) == "50%"
    assert html_page.probability(0.12345) == "0.123"
    assert html_page.probability(math.nan) == html_page.NONE
