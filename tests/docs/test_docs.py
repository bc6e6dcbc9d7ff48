"""The documents name only what exists, and leave out nothing that a user may set or meet."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main
from typer.core import TyperGroup

from orchestrator.catalogue.placeholders import NAMES
from orchestrator.catalogue.schema import Health, ModelEntry, ServiceEntry, Source
from orchestrator.cli.main import app
from orchestrator.settings import Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

MODULE = re.compile(r"\b(?:orchestrator|tests|docs|cli|api|control|core|drivers)/[\w/]+\.py\b")
DEFINED = re.compile(r"`(\w+)(?:\.(?!json)(\w+))?`\s+(?:\(|in\s+)`(orchestrator/[\w/]+\.py)`")
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)\s]+))?\)")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
CODE_IN_SOURCE = re.compile(r"[a-z]+(?:_[a-z]+)*")
NOT_ERRORS = {"ready", "cancelled"}
"""A verdict that is a success, and a code that is never told: the stop that cancelled a start reports it."""

by_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def commands_in(text: str) -> Iterator[str]:
    """What a reader would type: lines of shell blocks, and inline code."""
    for language, block in FENCE.findall(text):
        if language in ("sh", "console", "ini"):
            for line in block.splitlines():
                yield line.removeprefix("$ ").removeprefix("ExecStart=").partition("  #")[0].strip()
    yield from SPAN.findall(FENCE.sub("", text))


def command_line() -> TyperGroup:
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return group


def options_of(name: str) -> set[str]:
    command = command_line().commands[name]
    parameters = [*command.params]
    if isinstance(command, TyperGroup):
        parameters += [parameter for inner in command.commands.values() for parameter in inner.params]
    return {option for parameter in parameters for option in parameter.opts} | {"-h", "--help"}


def headings(path: Path) -> set[str]:
    """The anchors of a document, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_generated_parts_are_fresh() -> None:
    check = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@by_document
def test_every_module_named_exists(document: Path) -> None:
    for name in MODULE.findall(document.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file() or (ROOT / "orchestrator" / name).is_file(), name


@by_document
def test_every_name_is_defined_where_it_is_said_to_be(document: Path) -> None:
    for name, member, path in DEFINED.findall(document.read_text(encoding="utf-8")):
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert {name, member or name} <= set(definitions(tree)), f"{name}.{member} in {path}"


def definitions(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


@by_document
def test_every_link_leads_somewhere(document: Path) -> None:
    for target, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:")):
            continue
        path = document.parent / target
        assert path.exists(), target
        assert not anchor or anchor in headings(path), f"{target}#{anchor}"


@by_document
def test_every_make_target_named_exists(document: Path) -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in commands_in(document.read_text(encoding="utf-8")):
        if match := re.match(r"make (\w+)", line):
            assert match[1] in targets, line


@by_document
def test_every_orchestrator_command_and_option_named_exists(document: Path) -> None:
    commands = command_line().commands
    for line in commands_in(document.read_text(encoding="utf-8")):
        match = re.match(r"(?:\S*/bin/)?orchestrator ([a-z]\w*)(.*)", line)
        if match is None:
            continue
        assert match[1] in commands, line
        for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", match[2]):
            assert option in options_of(match[1]), line


def described() -> list[str]:
    fields = [*Settings.model_fields, *ServiceEntry.model_fields, *ModelEntry.model_fields]
    fields += [f"health.{name}" for name in Health.model_fields]
    fields += [f"source.{name}" for name in Source.model_fields]
    return sorted({*fields, *(f"{{{name}}}" for name in NAMES)})


@pytest.mark.parametrize("name", described())
def test_configuration_describes_everything(name: str) -> None:
    """In the first column of a table."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    firsts = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert any(f"`{name}`" in first for first in firsts)


def test_configuration_describes_nothing_else() -> None:
    """Each field of the tables for settings, services and models still exists."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    known = {*described(), "n_gpu_layers"}
    for title in ("## Settings", "## service.yaml", "## models.yaml"):
        section = text.partition(f"\n{title}\n")[2].partition("\n## ")[0].partition("\n### ")[0]
        firsts = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
        assert firsts, title
        for name in (name for first in firsts for name in SPAN.findall(first)):
            assert name in known, name


@pytest.mark.parametrize("command", sorted(command_line().commands))
def test_the_readme_lists_every_command(command: str) -> None:
    assert f"`orchestrator {command}" in (ROOT / "README.md").read_text(encoding="utf-8")


def error_codes() -> set[str]:
    """Every code that the sources give to an error: an argument or a class attribute, always a literal."""
    found: set[str] = set()
    core, api = ROOT / "orchestrator" / "core", ROOT / "orchestrator" / "api"
    for path in (
        core / "wording.py",
        core / "errors.py",
        core / "entities.py",
        core / "endings.py",
        core / "keys.py",
    ):
        found.update(codes_in(path))
    for path in api.glob("*.py"):
        found.update(codes_in(path))
    return found - NOT_ERRORS


PLACES = {"Problem": 2, "Told": 1, "BadRequest": 2, "Failure": 1, "KeyConflict": 1}
"""Where each constructor takes its code."""


def codes_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        values: list[ast.expr | None] = []
        if isinstance(node, ast.Call):
            values = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            place = PLACES.get(getattr(node.func, "id", ""), 99)
            values += node.args[place : place + 1]
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            values = [node.value] if getattr(target, "id", "") == "code" else []
        for value in values:
            if isinstance(value, ast.BoolOp):
                value = value.values[-1]
            text = value.value if isinstance(value, ast.Constant) else None
            if isinstance(text, str) and CODE_IN_SOURCE.fullmatch(text):
                yield text


def test_error_codes_are_found() -> None:
    assert {"cannot_ever_fit", "model_not_found", "image_missing", "start_timeout"} <= error_codes()


@pytest.mark.parametrize("code", sorted(error_codes()))
def test_every_error_code_is_described(code: str) -> None:
    text = (ROOT / "docs" / "http-api.md").read_text(encoding="utf-8")
    firsts = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert any(f"`{code}`" in first for first in firsts)
