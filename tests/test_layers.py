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
    "catalogue": {"core", "catalogue", "estimate", "hub", "settings", "pydantic", "pydantic_core", "yaml"},
    "estimate": {"core", "estimate"},
    "hub": {"core", "control.ports", "hub", "httpx"},
    "api": {
        "core",
        "control",
        "api",
        "fastapi",
        "fastapi_offline",
        "starlette",
        "pydantic",
        "aiohttp",
        "yarl",
        "orjson",
        "structlog",
    },
    "client": {"client", "httpx"},
    "cli": {"cli", "client", "typer", "rich"},
    "local": {"core", "catalogue", "local", "gguf", "numpy", "xllamacpp"},
    "settings": {"core", "catalogue", "pydantic", "pydantic_settings"},
    "schedule": {"apscheduler"},
    "log_lines": {"structlog"},
    "one_write": {"uvicorn"},
    "choosing": {"core", "drivers", "settings", "docker"},
    "diagnosis": {"core", "control", "api", "catalogue", "settings"},
    "serve": {"app", "core", "log_lines", "one_write", "settings", "structlog", "uvicorn", "uvloop"},
    "__init__": set(),
    "__main__": {"cli"},
}
WIRES_EVERYTHING = "app"
NEEDS_NO_SERVER = {
    "cli/address.py": {"catalogue.yaml_lines", "core.errors"},
    "cli/serving.py": {"serve", "settings", "core.errors"},
    "cli/checks.py": {"catalogue", "choosing", "core", "diagnosis", "drivers.host", "settings", "store"},
    "cli/database.py": {"core", "settings", "store"},
    "cli/keys.py": {"core", "store"},
    "cli/learned.py": {"catalogue.read", "core", "settings", "store"},
    "cli/key_file.py": {"core.errors", "settings", "store.admin_key"},
    "cli/estimate.py": {"catalogue", "core", "estimate", "settings"},
}
"""Commands that need no server: `serve` itself, `doctor` where none answers, `database`, `key` and others;
the key that the server left for those on its own machine, and where it listens there."""

PURE = [
    "control/recovery.py",
    "control/resync.py",
    "control/changes.py",
    "control/forecast.py",
    "control/selfcheck.py",
    "control/status.py",
    "drivers/docker_spec.py",
    "estimate/alternatives.py",
    "estimate/compute.py",
    "estimate/context.py",
    "estimate/footprint.py",
    "estimate/ggml_types.py",
    "estimate/kv_cache.py",
    "estimate/layers.py",
    "estimate/offload.py",
    "estimate/plan.py",
    "estimate/weights.py",
    "hub/picking.py",
]
"""Modules outside the core that decide or translate, and do nothing."""
LIBRARY_OF_THE_PURE = {
    "__future__",
    "bisect",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "itertools",
    "json",
    "math",
    "posixpath",
    "re",
    "typing",
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
    if layer(path) == WIRES_EVERYTHING:
        return
    allowed = ALLOWED[layer(path)] | NEEDS_NO_SERVER.get(name, set())
    for imported in imports(path):
        if imported == "orchestrator":  # the bare package has nothing but its version
            continue
        ok = any(covers(a, imported) for a in allowed) or imported.split(".")[0] in sys.stdlib_module_names
        assert ok, f"{name} imports {imported}, which its layer may not"


def covers(allowance: str, imported: str) -> bool:
    inner = imported.removeprefix(OURS)
    return inner == allowance or inner.startswith(allowance + ".")


def test_no_layer_may_import_more_than_it_does() -> None:
    rules = {**ALLOWED, **NEEDS_NO_SERVER}
    used: dict[str, set[str]] = {rule: set() for rule in rules}
    for path in modules():
        for rule in {layer(path), str(path.relative_to(PACKAGE))} & rules.keys():
            used[rule] |= imports(path)
    for rule, allowed in rules.items():
        for allowance in allowed - {rule}:
            assert any(covers(allowance, name) for name in used[rule]), f"{rule} does not need {allowance}"


PURE_MODULES = [*sorted((PACKAGE / "core").glob("*.py")), *(PACKAGE / name for name in PURE)]


@pytest.mark.parametrize("path", PURE_MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_core_and_the_pure_have_no_clock_no_io_and_no_await(path: Path) -> None:
    of_others = {name.split(".")[0] for name in imports(path) if not name.startswith(OURS)}
    assert of_others <= LIBRARY_OF_THE_PURE
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
