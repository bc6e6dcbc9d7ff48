"""Every call has a row in the table of scopes."""

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Mount, Route

from orchestrator.api.build import build_api
from orchestrator.api.context import Context
from orchestrator.api.gateway import LLAMA_PATHS
from orchestrator.api.scopes import ROWS, needed_scope, scopes_of
from orchestrator.core.keys import Scope

API = build_api(cast(Context, SimpleNamespace(version="0")))


def calls_of(routes: Iterable[BaseRoute]) -> Iterator[tuple[str, str]]:
    """Methods and paths, also of included routers. What is of another kind must be looked at first."""
    for route in routes:
        if isinstance(route, Route | APIRoute):
            yield from ((method, route.path) for method in route.methods or () if method != "HEAD")
        elif isinstance(route, Mount):  # of files that are served as they are
            yield "GET", f"{route.path}/x.js"
        else:
            yield from calls_of(route.original_router.routes)  # type: ignore[attr-defined]


CALLS = sorted(set(calls_of(API.routes)))


def asked(method: str, path: str, query: str = "") -> dict[str, Any]:
    return {"type": "http", "method": method, "path": path, "query_string": query.encode()}


def test_the_calls_are_found() -> None:
    assert {("GET", "/state"), ("POST", "/models/load"), ("POST", "/keys"), ("GET", "/login")} <= set(CALLS)


@pytest.mark.parametrize(("method", "path"), CALLS)
def test_every_route_has_a_row(method: str, path: str) -> None:
    assert len(tuple(scopes_of(method, path))) == 1, "add it to orchestrator/api/scopes.py"


def test_no_row_is_there_twice() -> None:
    assert len({(method, path) for method, path, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    ("method", "path", "query", "needed"),
    [
        ("POST", "/v1/chat/completions", "", Scope.INFERENCE),
        ("GET", "/v1/models", "", Scope.INFERENCE),
        ("OPTIONS", "/v1/x", "", Scope.INFERENCE),
        ("DELETE", "/upstream/m/x", "", Scope.INFERENCE),
        ("GET", "/metrics", "", Scope.INFERENCE),
        ("GET", "/models", "", Scope.INFERENCE),
        ("HEAD", "/models", "", Scope.INFERENCE),
        ("GET", "/models", "autoload=1", Scope.INFERENCE),
        ("GET", "/models", "reload=1", Scope.ADMIN),
        ("GET", "/models", "reload=", Scope.ADMIN),
        ("GET", "/models", "%72eload=1", Scope.ADMIN),
        ("GET", "/models", "x&reload", Scope.ADMIN),
        ("GET", "/models/load", "", Scope.INFERENCE),  # the model called `load`
        ("POST", "/models/load", "", Scope.ADMIN),
        ("POST", "/models/load/", "", Scope.ADMIN),
        ("POST", "/models", "", Scope.ADMIN),
        ("DELETE", "/models", "model=x", Scope.ADMIN),
        ("GET", "/models/sse", "", Scope.INFERENCE),
        ("POST", "/leases", "", Scope.LEASE),
        ("DELETE", "/leases/1", "", Scope.LEASE),
        ("GET", "/state", "", Scope.ADMIN),
        ("POST", "/healthz", "", None),  # so that it is told which methods there are
        ("GET", "/healthz", "", None),
        ("GET", "/health", "", None),
        ("GET", "/login", "", None),
        ("GET", "/nowhere", "", Scope.ADMIN),
        ("GET", "/statex", "", Scope.ADMIN),
        ("GET", "//v1/models", "", Scope.ADMIN),
        *(("POST", path, "", Scope.INFERENCE) for path in sorted(LLAMA_PATHS)),
    ],
)
def test_what_a_call_needs(method: str, path: str, query: str, needed: Scope | None) -> None:
    assert needed_scope(asked(method, path, query)) is needed


def test_a_socket_needs_what_its_path_needs() -> None:
    socket = {"type": "websocket", "path": "/upstream/m/ws", "query_string": b""}
    assert needed_scope(socket) is Scope.INFERENCE
    assert needed_scope(socket | {"path": "/dashboard/ws"}) is Scope.ADMIN
    assert needed_scope(socket | {"path": "/anything"}) is Scope.ADMIN
