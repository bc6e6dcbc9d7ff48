"""Durations, sizes and placeholders."""

import pytest

from orchestrator.catalogue.placeholders import NAMES, check, fill
from orchestrator.catalogue.units import suggestion
from orchestrator.core.units import parse_duration, parse_duration_or_never, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30m", 1800), ("10s", 10), ("1.5h", 5400), ("2d", 172800), ("250ms", 0.25), (7, 7), ("7", 7), (0, 0)],
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", "m", "-1s", -1, "1 fortnight", True, None, [], "1e3s", "9999999999d", float("nan"), float("inf")],
)
def test_no_durations(text: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", [None, "never", "Never", "null"])
def test_never(text: object) -> None:
    assert parse_duration_or_never(text) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GiB", 12 * 2**30),
        ("6600MiB", 6600 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("64 KiB", 65536),
        ("3B", 3),
        ("1TiB", 2**40),
        (0, 0),
    ],
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["12", 12, "12G", "12gib", "-1GiB", "GiB", None, True, False, "1e3MiB", "99999999TiB"]
)
def test_no_sizes(text: object) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(text)


def test_placeholders_are_filled_once_and_other_braces_are_text() -> None:
    values = {"path": "/a/{model}", "model": "m"}
    assert fill('{path} {model} {port} {"a": {}}', values) == '/a/{model} m {port} {"a": {}}'
    assert check('{"json": {"a": 1}} {path}') == '{"json": {"a": 1}} {path}'
    for name in NAMES:
        assert check(f"x{{{name}}}y")


@pytest.mark.parametrize("text", ["{home}", "{Path}", "{__class__}", "{path} {nothing}"])
def test_unknown_placeholders_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"unknown placeholder .*allowed: \{path\}, "):
        check(text)


@pytest.mark.parametrize("text", ["{path.__class__}", "{path!r}", "{0}", "{path:>10}"])
def test_nothing_of_str_format_is_understood(text: str) -> None:
    assert fill(check(text), {"path": "/a"}) == text


def test_suggestions() -> None:
    assert suggestion("contxt_size", ["context_size", "parallel"]) == "; did you mean 'context_size'?"
    assert suggestion("zebra", ["context_size"]) == ""
