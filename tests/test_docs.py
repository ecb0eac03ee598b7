"""What the Markdown files say is so: links, inputs, variables, metrics, commands, error sentences."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from lora.names import Names
from tests.conftest import Server
from tests.lora_files import shapes_of
from tools.cog_schema import ROOT, openapi_document
from tools.random_flux import FluxSize, new_networks

README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md"), *ROOT.glob("weights/demo-*/*.md")])
MOST_LINES, MOST_WORDS = 200, 1800  # of the README
VARIABLE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+")
SCHEMAS: dict[str, Any] = openapi_document((ROOT / "predict.py").read_text())["components"]["schemas"]
PROPERTIES: dict[str, Any] = SCHEMAS["Input"]["properties"]

every_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


@cache
def tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def inline(page: Path, kind: str) -> Iterator[Token]:
    """The links, images or code spans of a page."""
    for token in tokens(page):
        yield from (child for child in token.children or () if child.type == kind)


def headings(page: Path) -> Iterator[tuple[int, str]]:
    """Where each heading is among the tokens, and its text without markup."""
    for i, token in enumerate(tokens(page)):
        if token.type == "heading_open":
            text = "".join(child.content for child in tokens(page)[i + 1].children or ())
            yield i, text


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings: lower case, without punctuation, hyphens for spaces, numbered when repeated."""
    found: dict[str, int] = {}
    names = set()
    for _, text in headings(page):
        name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        count = found.get(name, 0)
        found[name] = count + 1
        names.add(f"{name}-{count}" if count else name)
    return names


def table_rows(page: Path, heading: str) -> list[list[Token]]:
    """The rows of the first table below a heading, without its header; a cell's content is its Markdown."""
    start = next(i for i, text in headings(page) if text == heading)
    rows: list[list[Token]] = []
    inside = False
    for token, following in zip(tokens(page)[start:], tokens(page)[start + 1 :], strict=False):
        if token.type == "table_close":
            break
        inside = inside or token.type == "tbody_open"
        if inside and token.type == "tr_open":
            rows.append([])
        if inside and token.type == "td_open":
            rows[-1].append(following)
    return rows


def names_of(page: Path, heading: str) -> list[str]:
    """What the first column of a table names."""
    return [row[0].content.strip("`") for row in table_rows(page, heading)]


@cache
def python_strings(*patterns: str) -> tuple[str, ...]:
    """Every piece of text in the Python files that match the patterns."""
    files = [file for pattern in patterns for file in ROOT.glob(pattern)]
    constants = (node for file in files for node in ast.walk(ast.parse(file.read_text())))
    return tuple(node.value for node in constants if isinstance(node, ast.Constant) and isinstance(node.value, str))


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    targets = [str(token.attrs["href"]) for token in inline(page, "link_open")]
    targets += [str(token.attrs["src"]) for token in inline(page, "image")]
    for target in targets:
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_relative_to(ROOT), f"{target} leads out of the repository"
        assert file.exists(), f"{target}: there is no such file"
        assert not anchor or anchor in anchors(file), f"{target}: there is no such heading"


def test_anchors_are_those_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `go_fast`, isn't it?\n\n## Same\n\n## [Same](x)\n\n## script/bench - here\n")
    assert anchors(page) == {"a-go_fast-isnt-it", "same", "same-1", "scriptbench---here"}


def test_the_readme_is_read_in_ten_minutes_and_leads_to_every_page() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.split()) <= MOST_WORDS
    linked = {(ROOT / str(token.attrs["href"]).partition("#")[0]).resolve() for token in inline(README, "link_open")}
    assert set(DOCS.glob("*.md")) <= linked


def test_the_inputs_table_is_the_schema() -> None:
    rows = [[cell.content for cell in row[:3]] for row in table_rows(README, "Inputs")]
    assert rows == [[f"`{name}`", values(name), default(name)] for name in PROPERTIES]


def values(name: str) -> str:
    field = PROPERTIES[name]
    if "allOf" in field:
        return " ".join(f"`{choice}`" for choice in SCHEMAS[name]["enum"])
    if "minimum" in field:
        return f"{field['minimum']} to {field['maximum']}"
    if field.get("format") == "uri":
        return "file"
    return {"string": "text", "integer": "whole number", "boolean": "true or false"}[field["type"]]


def default(name: str) -> str:
    if name in SCHEMAS["Input"]["required"]:
        return "required"
    value = PROPERTIES[name]["default"]
    if value is None:
        return ""
    return f"`{value}`" if "allOf" in PROPERTIES[name] else str(value).lower()


def test_the_variables_are_those_that_settings_reads() -> None:
    read = {text for text in python_strings("settings.py") if VARIABLE.fullmatch(text)}
    named = names_of(DOCS / "configuration.md", "Variables of the predictor")
    assert sorted(named) == sorted(read)


def test_the_metrics_are_those_of_a_response(server: Server, small: dict[str, Any]) -> None:
    named = names_of(DOCS / "configuration.md", "Metrics")
    assert sorted(named) == sorted(server(**small)["metrics"])


def test_the_metrics_of_the_fleet_are_those_that_it_counts() -> None:
    counted = {text for text in python_strings("fleet/metrics.py") if re.fullmatch(r"fleet_[a-z_]+", text)}
    assert sorted(names_of(DOCS / "fleet.md", "Metrics of the fleet")) == sorted(counted)


@pytest.mark.parametrize(("page", "heading"), [("loras.md", "Ten common errors"), ("configuration.md", "Errors")])
def test_the_errors_are_those_of_the_code(page: str, heading: str) -> None:
    sources = python_strings("*.py", "fetch/*.py", "flux/*.py", "lora/*.py", "service/*.py")
    sentences = [
        child.content
        for row in table_rows(DOCS / page, heading)
        for child in row[0].children or ()
        if child.type == "code_inline"
    ]
    assert len(sentences) >= 7
    for sentence in sentences:
        for part in filter(None, map(str.strip, sentence.split("..."))):
            assert any(part in source for source in sources), f"no error says {part!r}"


def test_the_keys_of_every_writer_are_understood() -> None:
    names = Names(shapes_of(**new_networks(FluxSize(), model="dev")))
    rows = table_rows(DOCS / "loras.md", "Formats")
    assert len(rows) >= 12
    for row in rows:
        key = next(child.content for child in row[1].children or () if child.type == "code_inline")
        assert names.understand(key), f"nothing is called {key}"


@every_page
def test_commands_files_and_tests_exist(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"(?<![\w/])(?:script|\.ci)/\w+", text):
        assert (ROOT / name).is_file(), f"there is no {name}"
    for name in re.findall(r"script/bench ([a-z]\w+)", text):
        assert (ROOT / "bench" / f"{name}.py").is_file(), f"there is no benchmark {name}"
    for name in re.findall(r" -i (\w+)=", text):
        assert name in PROPERTIES, f"there is no input {name}"
    for token in inline(page, "code_inline"):
        file, _, test = token.content.partition("::")
        if re.fullmatch(r"(\w+/)*\w+\.py", file):
            assert (ROOT / file).is_file(), f"there is no {file}"
            assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file} has no {test}"
