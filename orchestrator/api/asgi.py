"""The few ASGI words that the plain endpoints share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeAlias
from urllib.parse import parse_qs

from orchestrator.api.problems import Problem

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers: TypeAlias = Iterable[tuple[bytes, bytes]]


def header(scope: Scope, name: bytes) -> bytes:
    """The header's first value, empty where it is missing; ASGI names are lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""


def with_header(scope: Scope, name: bytes, value: bytes) -> Scope:
    headers = [(key, old) for key, old in scope["headers"] if key != name]
    return {**scope, "headers": [*headers, (name, value)]}


def query_value(scope: Scope, name: str) -> str | None:
    raw = scope.get("query_string") or b""
    if name.encode() not in raw and b"%" not in raw:  # which may write any letter
        return None
    values = parse_qs(raw.decode("latin-1"), keep_blank_values=True).get(name)
    return values[0] if values else None


async def send_problem(
    send: Send, problem: Problem, *, integer_code: bool = False, kind: str = "http.response"
) -> None:
    body = problem.body(integer_code=integer_code)
    headers = [(k.encode(), v.encode()) for k, v in problem.headers().items()]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": f"{kind}.start", "status": problem.status, "headers": headers})
    await send({"type": f"{kind}.body", "body": body})
