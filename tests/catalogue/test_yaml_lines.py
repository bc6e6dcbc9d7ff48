from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.catalogue.yaml_lines import load_yaml
from orchestrator.core.errors import CatalogueError


def load(tmp_path: Path, text: str) -> object:
    (tmp_path / "f.yaml").write_text(text, encoding="utf-8")
    return load_yaml(tmp_path / "f.yaml").data


def test_lines_are_those_of_the_keys(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("# head\na:\n  b: 1\n\n  c:\n    - x\n    - y: 2\n")
    document = load_yaml(tmp_path / "f.yaml")

    assert document.data == {"a": {"b": 1, "c": ["x", {"y": 2}]}}
    assert document.line(("a",)) == 2
    assert document.line(("a", "b")) == 3
    assert document.line(("a", "c", 0)) == 6
    assert document.line(("a", "c", 1, "y")) == 7
    assert document.line(("a", "c", 1, "absent", 3)) == 7, "what is absent is where it should be"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("yes", "yes"),
        ("on", "on"),
        ("true", True),
        ("10:30", "10:30"),
        ("007", "007"),
        ("2026-01-02", "2026-01-02"),
        ("1_000", "1_000"),
        ("0x10", "0x10"),
        ("12", 12),
        ("-1", -1),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        (".inf", ".inf"),
        ("~", None),
        ("", None),
        ("'12'", "12"),
        ("!!str 12", "12"),
    ],
)
def test_only_json_kinds_are_told_apart(tmp_path: Path, text: str, value: object) -> None:
    assert load(tmp_path, f"k: {text}\n") == {"k": value}


def test_keys_are_text_and_files_may_be_empty(tmp_path: Path) -> None:
    assert load(tmp_path, "7: a\n1.50: b\nno: c\n") == {"7": "a", "1.50": "b", "no": "c"}
    assert load(tmp_path, "# nothing\n") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml, line 3: the key 'a' stands here twice, first in line 1"),
        ("a: 1\nb: [1, 2\n", "f.yaml, line 3: not valid YAML"),
        ("a: 1\n\tb: 2\n", "f.yaml, line 2: not valid YAML"),
        ("a: 1\nb: *nowhere\n", "f.yaml, line 2: not valid YAML"),
        ("a: &a\n  b: *a\n", "f.yaml, line 1: this alias repeats itself"),
        ("a: 1\nb: !!python/object:os.system x\n", "f.yaml, line 2: the tag"),
        ("a: 1\n? [x]\n: 2\n", "f.yaml, line 2: a key must be plain text"),
        ("a: 1\n---\nb: 2\n", "f.yaml, line 2: not valid YAML"),
        ("a: 1\nb: !!int xx\n", "f.yaml, line 2: 'xx' is not of the kind"),
        ("a: 1\nb: \x07\n", "f.yaml, line 2: a character"),
        ("[" * 3000, "f.yaml"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CatalogueError) as caught:
        load(tmp_path, text)
    assert caught.value.message.startswith(says)


def test_all_repeated_keys_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError) as caught:
        load(tmp_path, "a: 1\na: 2\nb: {c: 1, c: 2}\n")
    assert [part.split(":")[0][-6:] for part in caught.value.message.splitlines()] == ["line 2", "line 3"]


def test_many_aliases_do_not_grow_without_end(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    with pytest.raises(CatalogueError, match="without end"):
        load(tmp_path, "\n".join(rows))


def test_unreadable_files_are_errors_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match="cannot be read"):
        load_yaml(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(CatalogueError, match="line 2: not UTF-8"):
        load_yaml(tmp_path / "latin.yaml")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet=":-{}[]&*!|>'\"#%@`, \n\tab01.~?\x00é", max_size=60))
def test_any_text_is_data_or_an_error_with_the_file(tmp_path: Path, text: str) -> None:
    try:
        load(tmp_path, text)
    except CatalogueError as error:
        assert "f.yaml" in error.message
