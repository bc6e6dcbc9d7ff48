"""Requests that are wrong: each gets one clear answer, loads nothing, and harms nobody."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.talk import events, http_client, problem, raw_get, raw_request
from tests.server import RunningServer, running_server
from tests.support import eventually

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("bad-input")
    (folder / "spool").mkdir()
    models: dict[str, Any] = {"alpha": {"aliases": ["al"]}, "beta": {}}
    with running_server(
        folder, models, settings={"body_limit_mib": 1}, env={"TMPDIR": str(folder / "spool")}
    ) as server:
        yield server
        assert server.model_processes() == {}
        with http_client(server) as http:
            assert http.get("/readyz").status_code == 200


@pytest.fixture(autouse=True)
def nothing_happened(http: httpx.Client) -> Iterator[None]:
    """After each test the server answers as before, and no model was touched."""
    yield
    state = http.get("/state").json()
    assert [(model["id"], model["state"]) for model in state["models"]] == [
        ("alpha", "stopped"),
        ("beta", "stopped"),
    ]
    assert state["instances"] == state["queue"] == []


# --- which model


UNKNOWN = [
    ("POST", "/models/load", {"model": "nope"}),
    ("POST", "/models/unload", {"model": "nope"}),
    ("POST", "/v1/chat/completions", {"model": "nope", "messages": []}),
    ("POST", "/v1/embeddings", {"model": "Alpha", "input": "x"}),
    ("GET", "/models/nope", None),
    ("GET", "/v1/models/nope", None),
    ("GET", "/upstream/nope/health", None),
    ("POST", "/upstream/nope/x", {"model": "alpha"}),
    ("GET", "/logs/nope", None),
    ("GET", "/log?model=nope", None),
]


@pytest.mark.parametrize(("method", "path", "body"), UNKNOWN)
def test_an_unknown_model_is_404_with_the_names_there_are(
    http: httpx.Client, method: str, path: str, body: object
) -> None:
    error = problem(http.request(method, path, json=body), 404, "model_not_found")
    assert error["type"] == "not_found_error"
    assert error["param"] == "model"
    assert "alpha" in error["message"]
    assert "beta" in error["message"]


def test_an_unknown_model_in_a_form_is_404(http: httpx.Client) -> None:
    form = {"model": (None, "nope"), "file": ("a.wav", b"0123")}
    error = problem(http.post("/v1/audio/transcriptions", files=form), 404, "model_not_found")
    assert "'nope'" in error["message"]


@pytest.mark.parametrize(("method", "path"), [("POST", "/completion"), ("GET", "/props?model=nope")])
def test_an_unknown_model_on_llama_paths_has_an_integer_code(
    http: httpx.Client, method: str, path: str
) -> None:
    body = {"model": "nope"} if method == "POST" else None
    assert problem(http.request(method, path, json=body), 404)["code"] == 404


@pytest.mark.parametrize("name", ["../../etc/passwd", "alpha\0", "é" * 40, "x" * 5000, "alpha "])
def test_a_strange_name_is_an_unknown_model(http: httpx.Client, name: str) -> None:
    body = json.dumps({"model": name})
    answer = http.post("/models/load", content=body, headers={"Content-Type": "application/json"})
    problem(answer, 404, "model_not_found")


def test_half_a_character_is_no_name(http: httpx.Client) -> None:
    answer = http.post(
        "/models/load", content=b'{"model": "\\ud800"}', headers={"Content-Type": "application/json"}
    )
    assert problem(answer, 400)["param"] == "model"


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": 5}, {"model": ""}, {"model": ["alpha"]}])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/completion"])
def test_openai_calls_need_a_model(http: httpx.Client, path: str, body: dict[str, object]) -> None:
    error = problem(http.post(path, json=body), 400)
    assert error["param"] == "model"
    assert "`model`" in error["message"]
    if body.get("model"):
        assert json.dumps(body["model"]).replace(" ", "") in error["message"]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_openai_calls_without_a_body_need_a_model(http: httpx.Client, method: str) -> None:
    assert problem(http.request(method, "/v1/files"), 400)["param"] == "model"


def test_a_form_needs_a_model(http: httpx.Client) -> None:
    form = {"file": ("model", b'name="model"\r\n\r\nalpha'), "language": (None, "en")}
    assert problem(http.post("/v1/audio/transcriptions", files=form), 400)["param"] == "model"


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary="])
def test_a_form_without_a_boundary(http: httpx.Client, kind: str) -> None:
    answer = http.post("/v1/audio/transcriptions", content=b"--x\r\n", headers={"Content-Type": kind})
    assert "boundary" in problem(answer, 400)["message"]


# --- JSON


BROKEN = [b"", b"{", b'{"model": }', b"nonsense", b"\xff\xfe{}", b'{"model": "alpha"} x', b"[" * 20_000]
NOT_OBJECTS = [b"[]", b'["alpha"]', b'"alpha"', b"5", b"null", b"true"]


@pytest.mark.parametrize("path", ["/models/load", "/models/unload", "/v1/chat/completions", "/completion"])
@pytest.mark.parametrize("body", BROKEN + NOT_OBJECTS, ids=lambda body: body[:20].decode("latin-1"))
def test_what_is_no_json_object_is_400(http: httpx.Client, path: str, body: bytes) -> None:
    answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
    error = problem(answer, 400)
    assert re.search("JSON|model|parsing", error["message"])


@pytest.mark.parametrize("depth", [1000, 1020])
@pytest.mark.parametrize(("start", "end"), [("[", "]"), ('{"a":', "}")])
def test_json_too_deep_to_replace_an_alias_in_is_400(
    http: httpx.Client, start: str, end: str, depth: int
) -> None:
    """What reads the whole body goes deeper than what finds the place of the name in it."""
    body = f'{{"x": {start * depth}1{end * depth}, "model": "al"}}'
    problem(http.post("/v1/chat/completions", content=body), 400, "invalid_json")


@pytest.mark.parametrize("call", ["load", "unload"])
def test_a_field_named_by_half_a_character_is_refused(http: httpx.Client, call: str) -> None:
    body = b'{"model": "alpha", "\\ud800": true}'
    problem(http.post(f"/models/{call}", content=body), 400)


def test_the_label_does_not_matter(http: httpx.Client) -> None:
    """`curl -d` sends its JSON as a form; so does a body without any label."""
    for headers in ({"Content-Type": "application/x-www-form-urlencoded"}, {}):
        answer = http.post("/models/load", content=b'{"model": "nope"}', headers=headers)
        problem(answer, 404, "model_not_found")


# --- fields of load and unload


NO_BOOL: list[object] = ["yes", "true", 1, 0, None, [], {}, 0.5]
NO_TEXT: list[object] = [5, None, [], {}, True, ["alpha"]]
NO_HOLD: list[object] = ["soon", "", "10 apples", -5, "-5m", [], {}, True]
WRONG = (
    [(call, "model", value, "string|text|name") for call in ("load", "unload") for value in NO_TEXT]
    + [(call, "wait", value, "boolean|true") for call in ("load", "unload") for value in NO_BOOL]
    + [("load", "pin", value, "boolean|true") for value in NO_BOOL if value is not None]
    + [("unload", "force", value, "boolean|true") for value in NO_BOOL]
    + [("unload", "hold", value, r"10m|30s|seconds|duration") for value in NO_HOLD]
)


@pytest.mark.parametrize(("call", "field", "value", "allowed"), WRONG)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(
    http: httpx.Client, call: str, field: str, value: object, allowed: str
) -> None:
    answer = http.post(f"/models/{call}", json={"model": "alpha", field: value})
    error = problem(answer, 400, "invalid_value")
    assert error["param"] == field
    assert f"`{field}`" in error["message"]
    assert repr(value) in error["message"] or json.dumps(value) in error["message"]
    assert re.search(allowed, error["message"])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_hold_is_a_finite_time(http: httpx.Client, number: str) -> None:
    body = f'{{"model": "alpha", "hold": {number}}}'
    answer = http.post("/models/unload", content=body, headers={"Content-Type": "application/json"})
    problem(answer, 400)


@pytest.mark.parametrize("call", ["load", "unload"])
def test_a_model_may_not_be_empty_or_missing(http: httpx.Client, call: str) -> None:
    for body in ({"model": ""}, {}):
        error = problem(http.post(f"/models/{call}", json=body), 400)
        assert error["param"] == "model"


@pytest.mark.parametrize(("call", "field"), [("load", "wiat"), ("load", "force"), ("unload", "pin")])
def test_an_unknown_field_is_refused_by_name(http: httpx.Client, call: str, field: str) -> None:
    error = problem(http.post(f"/models/{call}", json={"model": "alpha", field: True}), 400)
    assert error["param"] == field
    assert f"`{field}`" in error["message"]


def test_wrong_queries_are_named(http: httpx.Client) -> None:
    for path, field, told in (
        ("/log?limit=0", "limit", 'got "0", expected a positive whole number'),
        ("/log?limit=many", "limit", 'got "many", expected a whole number'),
        ("/logs/alpha?tail=-1", "tail", 'got "-1", expected at least 0'),
        ("/logs/alpha?tail=x", "tail", 'got "x", expected a whole number'),
        ("/logs/alpha?follow=perhaps", "follow", 'got "perhaps", expected true or false'),
        ("/logs/alpha?attempt=a b", "attempt", 'got "a b", expected an attempt\'s id, as '),
    ):
        error = problem(http.get(path), 400)
        assert error["param"] == field
        assert error["message"].startswith(f"`{field}`: {told}")


# --- headers


NO_SECONDS = ["soon", "-1", "0", "nan", "inf", "-inf", "1e9", "1,5", "0x10", "", "1_0", "."]


@pytest.mark.parametrize("value", NO_SECONDS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/upstream/alpha/echo", "/completion"])
def test_a_deadline_is_a_number_of_seconds(http: httpx.Client, path: str, value: str) -> None:
    answer = http.post(path, json={"model": "alpha"}, headers={"X-Deadline-Seconds": value})
    error = problem(answer, 400)
    assert error["param"] == "X-Deadline-Seconds"
    assert value in error["message"]


@pytest.mark.parametrize("value", [b"abc", b"-1", b"9" * 30, b"1.5", b"", b"\xb2", b"1;drop"])
def test_an_event_id_that_is_none_begins_with_the_snapshot(http: httpx.Client, value: bytes) -> None:
    with http.stream("GET", "/events", headers={b"Last-Event-ID": value}) as answer:
        assert answer.status_code == 200
        first = next(event for event in events(answer) if event.comment is None)
    assert first.name == "snapshot"
    assert first.json()["models"]


# --- bodies that are too large


def leftovers(server: RunningServer) -> list[str]:
    """What lies in the folder for temporary files, and what of it is open though deleted."""
    spool = server.folder / "spool"
    handles = Path(f"/proc/{server.pid}/fd").iterdir()
    links = [str(handle.readlink()) for handle in handles if handle.is_symlink()]
    return [str(path) for path in spool.iterdir()] + [link for link in links if str(spool) in link]


def send_large(server: RunningServer, path: str, kind: str, start: bytes, *, chunked: bool) -> httpx.Response:
    body = start + b"x" * (3 * MIB)
    content: Any = (body[at : at + 65536] for at in range(0, len(body), 65536)) if chunked else body
    with http_client(server) as http:
        return http.post(path, content=content, headers={"Content-Type": kind})


FORM_START = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nalpha\r\n--b\r\n\r\n'


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    ("path", "kind", "start"),
    [
        ("/v1/chat/completions", "application/json", b'{"model": "alpha", "x": "'),
        ("/v1/audio/transcriptions", "multipart/form-data; boundary=b", FORM_START),
        ("/upstream/alpha/echo", "application/octet-stream", b""),
        ("/completion", "application/json", b'{"model": "alpha", "x": "'),
        ("/models/load", "application/json", b'{"model": "alpha", "x": "'),
    ],
)
def test_a_body_beyond_the_limit_is_413_and_nothing_stays_on_disk(
    server: RunningServer, path: str, kind: str, start: bytes, chunked: bool
) -> None:
    error = problem(send_large(server, path, kind, start, chunked=chunked), 413)
    assert "1 MiB" in error["message"]
    assert "body_limit_mib" in error["message"]
    eventually(lambda: leftovers(server) == [])


def test_a_client_that_leaves_in_the_middle_of_a_body_leaves_nothing_on_disk(server: RunningServer) -> None:
    """Half a spooled body, then the connection is shut."""
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {MIB - 100}\r\nConnection: close\r\n\r\n"
    )
    with pytest.raises((ConnectionError, IndexError, ValueError)):
        raw_request_then_leave(server, head.encode() + b'{"model": "alpha", "x": "' + b"x" * (MIB // 2))
    eventually(lambda: leftovers(server) == [])


def raw_request_then_leave(server: RunningServer, data: bytes) -> None:
    """Send, and stop sending: the answer to half a request is the end of the connection."""
    import socket

    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        eventually(lambda: leftovers(server))  # it lies on disk now
        connection.shutdown(socket.SHUT_WR)
        if not connection.recv(1):
            raise ConnectionError("closed without an answer")


# --- paths and methods


@pytest.mark.parametrize(
    "path", ["/nope", "/models/", "/v2/models", "/upstream", "/operations/op-nope", "/%00"]
)
def test_what_is_not_there_is_404_in_the_one_shape(http: httpx.Client, path: str) -> None:
    problem(http.get(path), 404)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/state"),
        ("PUT", "/models/load"),
        ("DELETE", "/models/load"),
        ("POST", "/events"),
        ("PATCH", "/healthz"),
        ("POST", "/v1/models"),
    ],
)
def test_a_wrong_method_is_405_in_the_one_shape(http: httpx.Client, method: str, path: str) -> None:
    problem(http.request(method, path, json={}), 405, "method_not_allowed")


def test_what_is_no_http_is_refused_and_the_server_lives(server: RunningServer) -> None:
    assert raw_request(server, b"\x16\x03\x01 hello\r\n\r\n").status == 400
    assert raw_get(server, "/healthz").status == 200


# --- and after all of it


def test_it_still_works(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"model": "al", "prompt": "x"})
    assert answer.status_code == 200
    assert answer.json()["model"] == "alpha"
    http.post("/models/unload", json={"model": "alpha"}).raise_for_status()
