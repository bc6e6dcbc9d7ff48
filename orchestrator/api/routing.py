"""Which model a request names: in JSON, in a multipart form, or in the query; and its name rewritten."""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from dataclasses import dataclass

import orjson

from orchestrator.api.asgi import Scope, header, query_value
from orchestrator.api.body import Body
from orchestrator.api.json_text import value_span
from orchestrator.api.problems import BadRequest

BOUNDARY = re.compile(rb'boundary=(?:"([^"]{1,200})"|([^\s;]{1,200}))', re.IGNORECASE)
MODEL_PART = re.compile(rb'content-disposition:[^\r\n]*\bname="?model"?[;\r\n]', re.IGNORECASE)
PART_HEADER_LIMIT = 4096
MOST_VALUES = 2_000_000


@dataclass(frozen=True, slots=True)
class Named:
    """The model's name as the client wrote it; `wants_stream` as its JSON says."""

    model: str
    wants_stream: bool = False
    is_json: bool = False
    span: tuple[int, int] | None = None  # where the name stands in a multipart body


class Unnamed(BadRequest):
    """The request names no model; `named` is all else that it says."""

    def __init__(self, message: str, named: Named) -> None:
        super().__init__(message, "model")
        self.named = named


async def name_model(scope: Scope, body: Body) -> Named:
    """Find the model's name. Raises BadRequest; Unnamed, which says where it should have been."""
    if not body.size:
        return named_by_query(scope)
    content_type = header(scope, b"content-type")
    if content_type.startswith(b"multipart/"):
        return await asyncio.to_thread(named_by_form, content_type, body)
    if body.file is None:
        return named_by_json(body.data)
    return await asyncio.to_thread(named_by_large_json, body)


def named_by_query(scope: Scope) -> Named:
    model = query_value(scope, "model")
    if not model:
        raise Unnamed("Name a model: send JSON with a `model` field, or ?model= in the URL.", Named(""))
    return Named(model)


def named_by_json(data: bytes) -> Named:
    try:
        parsed = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(parsed, dict):
        raise BadRequest("The body must be a JSON object with a `model` field.", code="invalid_json")
    model = parsed.get("model")
    wants_stream = parsed.get("stream") is True
    if "model" not in parsed:
        raise Unnamed(
            "`model` must be the name of a model, got nothing.", Named("", wants_stream, is_json=True)
        )
    if not isinstance(model, str) or not model:
        got = orjson.dumps(model).decode()[:60]
        raise BadRequest(f"`model` must be the name of a model, got {got}.", "model")
    return Named(model, wants_stream, is_json=True)


def named_by_large_json(body: Body) -> Named:
    """Images make bodies large, and lists of tokens; more values than MOST_VALUES would hold up everybody."""
    data = bytes(body.view())
    if data.count(b",") > MOST_VALUES:
        message = f"The body has more than {MOST_VALUES} values; that many are not parsed."
        raise BadRequest(message, code="body_too_complex", status=413)
    return named_by_json(data)


def named_by_form(content_type: bytes, body: Body) -> Named:
    """The form's `model` field, wherever it stands; files of any size are skipped, not read."""
    match = BOUNDARY.search(content_type)
    if match is None:
        raise BadRequest("The multipart body has no boundary in its Content-Type.", code="invalid_form")
    delimiter = b"--" + (match.group(1) or match.group(2))
    view = body.view()
    at = view.find(delimiter)
    while at >= 0:
        head_end = view.find(b"\r\n\r\n", at, at + len(delimiter) + PART_HEADER_LIMIT)
        after = view.find(delimiter, at + len(delimiter))
        if head_end >= 0 and after >= 0 and MODEL_PART.search(view[at : head_end + 2]):
            start, end = head_end + 4, max(head_end + 4, after - 2)
            return Named(view[start : min(end, start + 512)].decode("utf-8", "replace"), span=(start, end))
        at = after
    raise Unnamed("The form has no `model` field.", Named(""))


def rename(named: Named, body: Body, model: str) -> Body:
    """The body with the model's name replaced and every other byte as it was."""
    if named.span is not None:
        return renamed_form(named.span, body, model.encode())
    if not body.size:
        return body
    text = bytes(body.view()).decode()
    try:
        span = value_span(text, "model")
    except RecursionError:  # Python's parser is less deep than the one that has read it
        raise BadRequest("The body is nested too deeply.", code="invalid_json") from None
    assert span is not None, "the name was found before"
    renamed = Body((text[: span[0]] + json.dumps(model) + text[span[1] :]).encode())
    body.close()
    return renamed


def renamed_form(span: tuple[int, int], body: Body, name: bytes) -> Body:
    view = body.view()
    if body.file is None:
        return Body(bytes(view[: span[0]]) + name + bytes(view[span[1] :]))
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    copy.write(view[: span[0]])
    copy.write(name)
    with memoryview(view) as rest:
        copy.write(rest[span[1] :])
    copy.flush()
    old, body.file = body.file, copy
    old.close()
    return body
