"""Who may import whom: the layering of the package, checked on every import statement."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "orchestrator"

OURS = "orchestrator."
ALLOWED: dict[str, set[str]] = {
    # folder or module: what of ours it may import, and which libraries
    "core": {"core"},
    "control": {"core", "control", "structlog"},
    "drivers": {
        "core",
        "control.ports",
        "drivers",
        "orjson",
        "structlog",
        "docker",
        "requests",
        "urllib3",
        "httpx",
        "pynvml",
    },
    "store": {"core", "control.ports", "store", "orjson", "sqlalchemy", "sqlmodel", "alembic", "structlog"},
    "catalogue": {"core", "catalogue", "estimate", "local", "settings", "pydantic", "pydantic_core", "yaml"},
    "estimate": {"core", "estimate"},
    "api": {
        "core",
        "control",
        "api",
        "fastapi",
        "starlette",
        "pydantic",
        "aiohttp",
        "yarl",
        "orjson",
        "structlog",
    },
    "client": {"client", "httpx"},
    "cli": {"cli", "client", "core.units", "typer", "click", "rich"},
    "local": {"core", "catalogue", "local", "gguf", "numpy", "xllamacpp"},
    "settings": {"core", "catalogue", "pydantic", "pydantic_settings"},
    "schedule": {"apscheduler"},
    "log_lines": {"structlog"},
    "one_write": {"uvicorn"},
    "__init__": set(),
    "__main__": {"cli"},
}
WIRES_EVERYTHING = {"app", "serve", "choosing", "diagnosis"}
STARTS_A_SERVER = {"cli/serving.py": {"serve", "settings", "core.errors"}, "cli/checks.py": {"*"}}
"""Commands that need no server: `serve` itself, and `doctor` where none answers."""

PURE = {"core"}
FORBIDDEN_IN_PURE = {
    "asyncio",
    "time",
    "os",
    "pathlib",
    "random",
    "logging",
    "socket",
    "subprocess",
    "threading",
}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of the modules it imports, also those inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            if node.module == "orchestrator":
                found |= {f"orchestrator.{alias.name}" for alias in node.names if alias.name != "__version__"}
            else:
                found.add(node.module)
    return found


def layer(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_layer_may(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    if layer(path) in WIRES_EVERYTHING:
        return
    allowed = ALLOWED[layer(path)] | STARTS_A_SERVER.get(name, set())
    for imported in imports(path):
        if "*" in allowed or imported == "orchestrator":  # the bare package has nothing but its version
            continue
        if imported.startswith(OURS):
            inner = imported.removeprefix(OURS)
            ok = any(inner == a or inner.startswith(a + ".") for a in allowed)
        else:
            ok = imported.split(".")[0] in sys.stdlib_module_names | allowed
        assert ok, f"{name} imports {imported}, which its layer may not"


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=lambda p: p.stem)
def test_the_core_has_no_clock_no_io_and_no_await(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & FORBIDDEN_IN_PURE
    tree = ast.parse(path.read_text())
    assert not any(isinstance(node, ast.AsyncFunctionDef | ast.Await) for node in ast.walk(tree))
    calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not calls & {"open", "print", "input"}


def test_functions_and_modules_are_short() -> None:
    for path in modules():
        text = path.read_text()
        assert text.count("\n") <= 500, f"{path} has more than one subject?"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno
                assert length <= 50, f"{path}: {node.name} is {length} lines long"
