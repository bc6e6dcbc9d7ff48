"""Requests on their way to a model and back: routed, untouched, unbuffered, and ended in every case."""

import gzip
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, ConnectionClosedOK, InvalidStatus
from websockets.sync.client import connect

from tests.api.oddity import PACKED
from tests.api.talk import Event, address_of, events, http_client, oddity_service, problem, raw_get
from tests.server import RunningServer, mimic_service, running_server
from tests.support import eventually

MIB = 1024 * 1024
REQUEST_LIMIT_S = 3
NEVER = {"MIMIC_NEVER_HEALTHY": "1"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("gateway")
    services = {
        "mimic": mimic_service(),
        "odd": oddity_service(folder / "marks"),
        "plain": mimic_service(api="http"),
    }
    models: dict[str, Any] = {
        "alpha": {"aliases": ["al"]},
        "named": {"aliases": ["nick"], "served_name": "inner"},
        "odd": {"service": "odd", "aliases": ["strange/thing"]},
        "mortal": {"service": "odd"},
        "plain": {"service": "plain"},
        "slow": {"environment": {"MIMIC_LOAD_S": "11"}},
        "never": {"environment": NEVER, "queue_limit": 2},
        "brief": {"idle_after": "1s"},
        "cold": {},
        "on-demand": {},
    }
    settings = {"request_limit": REQUEST_LIMIT_S, "body_limit_mib": 16}
    with running_server(folder, models, services, settings) as server:
        yield server


@pytest.fixture(scope="module")
def held(server: RunningServer) -> Iterator[Future[list[tuple[float, Event]]]]:
    """Streams that wait for a model that loads for 11 s, begun before the other tests and looked at last.

    Each event with the time it came; the service answers them with an error in the end.
    """
    body = {"model": "slow", "stream": True, "messages": [], "mimic": {"status": 500}}

    def wait() -> list[tuple[float, Event]]:
        began_s = time.monotonic()
        with (
            http_client(server, timeout_s=60) as http,
            http.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            return [(time.monotonic() - began_s, event) for event in events(answer)]

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(wait)


@pytest.fixture(scope="module", autouse=True)
def loaded(server: RunningServer, held: object) -> None:
    for model in ("alpha", "odd"):
        server.load(model)


@contextmanager
def instance(server: RunningServer, model: str) -> Iterator[httpx.Client]:
    """The model's own service, asked directly."""
    with httpx.Client(base_url=f"http://{address_of(server, model)}", timeout=10, trust_env=False) as direct:
        yield direct


def stats(server: RunningServer, model: str = "alpha") -> dict[str, int]:
    with instance(server, model) as direct:
        found: dict[str, int] = direct.get("/stats").json()
        return found


def completion(model: str = "alpha", **mimic: Any) -> dict[str, Any]:
    return {"model": model, "prompt": "x", "mimic": mimic}


def in_thread(ask: Callable[[], Any]) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(ask)
    pool.shutdown(wait=False)
    return future


# --- bytes


def test_request_bytes_are_untouched(http: httpx.Client) -> None:
    body = bytes(range(256)) * 5000
    seen = http.post("/upstream/alpha/echo", content=body).json()
    assert seen["sha256"] == hashlib.sha256(body).hexdigest()
    assert seen["body_bytes"] == len(body)


def test_json_of_too_many_values_is_refused_before_it_holds_up_everybody(http: httpx.Client) -> None:
    def body(values: int) -> bytes:
        return b'{"model": "odd", "prompt": [' + b"1," * values + b"1]}"

    assert http.post("/v1/mirror", content=body(100_000)).status_code == 200
    problem(http.post("/v1/mirror", content=body(2_000_000)), 413, "body_too_complex")


@pytest.mark.parametrize("size", [0, 400_000])
def test_json_that_names_the_model_itself_is_untouched(http: httpx.Client, size: int) -> None:
    body = (
        b'{ "z": 1.0,\n\t"model":"odd", "a":1e2, "\\u00e9" : "\\ud83d\\ude00", "x": "' + b"y" * size + b'"}'
    )
    assert http.post("/v1/mirror", content=body).content == body


@pytest.mark.parametrize("count", [1, 3000])
def test_response_bytes_are_untouched(server: RunningServer, http: httpx.Client, count: int) -> None:
    body = {"model": "alpha", "input": [f"text {number}" for number in range(count)]}
    with instance(server, "alpha") as direct:
        expected = direct.post("/v1/embeddings", json=body)
    answer = http.post("/v1/embeddings", json=body)
    assert answer.content == expected.content
    assert answer.headers["content-type"] == expected.headers["content-type"]
    assert answer.headers["content-length"] == expected.headers["content-length"]


def test_a_compressed_answer_is_passed_through(http: httpx.Client) -> None:
    with http.stream("GET", "/upstream/odd/v1/packed") as answer:
        assert answer.headers["content-encoding"] == "gzip"
        assert b"".join(answer.iter_raw()) == PACKED


def test_a_compressed_request_is_passed_through(http: httpx.Client) -> None:
    body = gzip.compress(b"x" * 1000)
    headers = {"Content-Encoding": "gzip"}
    answer = http.post("/upstream/odd/v1/mirror", content=body, headers=headers)
    seen = json.loads(answer.headers["x-seen"])
    assert seen["content-encoding"] == "gzip"


def test_a_chunked_request_body(http: httpx.Client) -> None:
    chunks = [b'{"model": "odd", ', b'"x": "', b"y" * 300_000, b'"}']
    answer = http.post("/v1/mirror", content=iter(chunks))
    assert answer.content == b"".join(chunks)


def test_head(server: RunningServer, http: httpx.Client) -> None:
    answer = http.head("/upstream/alpha/echo")
    assert answer.status_code == 200
    assert int(answer.headers["content-length"]) > 0
    assert answer.content == b""
    assert http.get("/upstream/alpha/health").json() == {"status": "ok"}  # the connection is still in step


@pytest.mark.parametrize(
    "query", ["a=1&b=%2F&c=%20d+e&a=2", "x", "q=%C3%BC&r=%26", "=&&=", "a=b=c;d", "p=%zz"]
)
def test_query_strings_arrive_as_they_were_sent(server: RunningServer, query: str) -> None:
    assert raw_get(server, f"/upstream/alpha/echo?{query}").json()["query"] == query


@pytest.mark.parametrize("path", ["/echo/a%2Fb", "/echo/%C3%BC", "/echo/a%20b", "/echo/a+b;c=d", "/echo//x/"])
def test_paths_arrive_as_they_were_sent(server: RunningServer, path: str) -> None:
    assert raw_get(server, f"/upstream/alpha{path}").json()["path"] == path


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_methods_arrive(http: httpx.Client, method: str) -> None:
    assert http.request(method, "/upstream/alpha/echo").json()["method"] == method


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_errors_of_the_service_are_its_own(server: RunningServer, http: httpx.Client, status: int) -> None:
    body = completion(status=status)
    with instance(server, "alpha") as direct:
        expected = direct.post("/v1/completions", json=body)
    answer = http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.content) == (status, expected.content)


@pytest.mark.parametrize("path", ["/upstream/odd/v1/mirror", "/v1/mirror?model=odd"])
def test_the_last_bytes_of_a_large_body_arrive(server: RunningServer, path: str) -> None:
    """It waits in a file, and its end comes later and is small."""
    body = b'{"model": "odd", "x": "' + b"y" * 300_000 + b'"}'
    before = temporary_files(server)
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + b"Connection: close\r\n\r\n" + body[:-100])
        eventually(lambda: temporary_files(server) - before)
        connection.sendall(body[-100:])
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.startswith(b"HTTP/1.1 200")
    got = received.partition(b"\r\n\r\n")[2]
    assert len(got) == len(body)
    assert got == body


def temporary_files(server: RunningServer) -> set[str]:
    """The files without a name that the server has open; each is called by its number on the disk."""
    links = []
    for handle in Path(f"/proc/{server.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(handle.readlink()))
    return {link for link in links if "(deleted)" in link}


# --- names


@pytest.mark.parametrize(("asked", "told"), [("al", "alpha"), ("named", "inner"), ("nick", "inner")])
@pytest.mark.parametrize("size", [0, 400_000])
def test_a_name_becomes_what_the_service_calls_it(
    http: httpx.Client, asked: str, told: str, size: int
) -> None:
    body = {"model": asked, "input": "x", "padding": "y" * size}
    assert http.post("/v1/embeddings", json=body).json()["model"] == told
    form = {"model": (None, asked), "file": ("a.wav", b"z" * size)}
    assert http.post("/v1/audio/transcriptions", files=form).json()["model"] == told


@pytest.mark.parametrize("size", [0, 400_000])
def test_an_alias_changes_nothing_else_in_json(http: httpx.Client, size: int) -> None:
    sent = {
        "stream": False,
        "model": "strange/thing",
        "nested": {"model": "strange/thing"},
        "text": 'é😀\u2028"\\/ \u0000',
        "float": 0.1,
        "whole": 1.0,
        "big": 2**64 + 1,
        "padding": "y" * size,
    }
    got = http.post("/v1/mirror", json=sent).json()
    assert got == sent | {"model": "odd"}
    assert list(got) == list(sent)
    assert isinstance(got["whole"], float)


@pytest.mark.parametrize("size", [10, 5 * MIB])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("quote", ["", '"'])
def test_a_form_is_routed_wherever_its_model_stands(
    http: httpx.Client, size: int, first: bool, quote: str
) -> None:
    """Its other bytes, a file with a form inside included, arrive as they were."""
    inner = b'\r\nContent-Disposition: form-data; name="model"\r\n\r\nnope\r\n'
    field = b'--bou\r\nContent-Disposition: form-data; name="model"\r\n\r\nstrange/thing\r\n'
    file = b'--bou\r\nContent-Disposition: form-data; name="file"; filename="model"\r\n\r\n'
    file += inner + bytes(range(256)) * (size // 256) + b"\r\n"
    body = (field + file if first else file + field) + b"--bou--\r\n"
    kind = f"multipart/form-data; boundary={quote}bou{quote}"
    answer = http.post("/v1/mirror", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 200, answer.text
    assert answer.content == body.replace(b"strange/thing", b"odd")
    assert json.loads(answer.headers["x-seen"])["content-type"] == kind


@pytest.mark.parametrize("label", ["application/x-www-form-urlencoded", None, "text/plain"])
def test_json_without_its_label_is_labelled(http: httpx.Client, label: str | None) -> None:
    headers = {"Content-Type": label} if label else {}
    answer = http.post("/v1/mirror", content=b'{"model":"odd"}', headers=headers)
    assert json.loads(answer.headers["x-seen"])["content-type"] == "application/json"


def test_large_json_without_its_label_is_labelled(http: httpx.Client) -> None:
    body = b'{"model":"odd","x":"' + b"y" * 400_000 + b'"}'
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    answer = http.post("/v1/mirror", content=body, headers=headers)
    assert json.loads(answer.headers["x-seen"])["content-type"] == "application/json"


def test_a_name_with_a_slash_under_upstream(server: RunningServer) -> None:
    for name in ("strange/thing", "strange%2Fthing"):
        assert raw_get(server, f"/upstream/{name}/deep/path").json()["path"] == "/deep/path"


def test_what_does_not_speak_openai_is_reached_under_upstream_only(http: httpx.Client) -> None:
    error = problem(http.post("/v1/completions", json=completion("plain")), 400)
    assert "/upstream/plain/" in error["message"]
    assert http.get("/upstream/plain/echo").status_code == 200


LLAMA_PATHS = [
    "/completion",
    "/completions",
    "/chat/completions",
    "/infill",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/embedding",
    "/embeddings",
    "/rerank",
    "/reranking",
]


@pytest.mark.parametrize("path", LLAMA_PATHS)
def test_llama_paths_are_routed_by_model(http: httpx.Client, path: str) -> None:
    for name in ("odd", "strange/thing"):
        assert http.post(path, json={"model": name}).json()["path"] == path
    assert problem(http.post(path, json={"model": "nope"}), 404)["code"] == 404
    assert problem(http.post(path, json={}), 400)["code"] == 400


@pytest.mark.parametrize("path", ["/slots", "/props", "/metrics"])
def test_llama_views_are_routed_by_query(http: httpx.Client, path: str) -> None:
    assert http.get(f"{path}?model=odd&x=1").json() == {
        "method": "GET",
        "path": path,
        "query": "model=odd&x=1",
        "body_bytes": 0,
    }
    assert problem(http.get(f"{path}?model=nope"), 404)["code"] == 404


def test_a_late_error_on_a_llama_path_has_an_integer_code(http: httpx.Client) -> None:
    answer = http.post('/completion?mimic={"cut_after":0}', json={"model": "alpha"})
    assert problem(answer, 502)["code"] == 502
    waiting = {"X-Deadline-Seconds": "0.2"}
    answer = http.post("/completion", json={"model": "never"}, headers=waiting)
    assert problem(answer, 503)["code"] == 503


# --- streams


def test_a_stream_is_not_buffered(server: RunningServer, http: httpx.Client) -> None:
    """Its head comes while no token has been made, its first event while it cannot end."""
    with instance(server, "alpha") as direct:
        direct.post("/control/stream-hold", json={"hold": True})
        try:
            body = completion(tokens=3, tokens_per_s=20) | {"stream": True}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                coming = events(answer)
                direct.post("/control/stream-hold", json={"hold": False})
                first = next(coming)
                direct.post("/control/stream-hold", json={"hold": True})
                assert first.json()["choices"][0]["text"] == "mimic"
                assert stats(server)["in_flight"] == 1
                direct.post("/control/stream-hold", json={"hold": False})
                rest = [event.data for event in coming]
            assert rest[-1] == "[DONE]"
            assert len(rest) == 4
        finally:
            direct.post("/control/stream-hold", json={"hold": False})


def test_stream_bytes_are_untouched(http: httpx.Client) -> None:
    body = completion(tokens=500) | {"stream": True, "stream_options": {"include_usage": True}}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        got = list(events(answer))
    assert [event.data for event in got].index("[DONE]") == len(got) - 1
    assert len(got) == 503
    assert json.loads(got[-2].data)["usage"]["completion_tokens"] == 500


def test_a_death_in_a_stream_is_an_error_event(http: httpx.Client) -> None:
    body = completion(tokens=5, cut_after=2) | {"stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        got = [event.data for event in events(answer)]
    assert len(got) == 3
    error = json.loads(got[-1])["error"]
    assert error["code"] == "upstream_failed"
    assert "alpha" in error["message"]
    assert "[DONE]" not in got


def test_a_death_in_any_other_body_cuts_the_connection(http: httpx.Client) -> None:
    many = {"model": "alpha", "input": ["x"] * 3000, "mimic": {"cut_after": 1}}
    with pytest.raises(httpx.RemoteProtocolError):
        http.post("/v1/embeddings", json=many)
    with pytest.raises(httpx.RemoteProtocolError):
        http.post("/upstream/odd/v1/torn")


def test_a_death_in_a_short_body_is_no_silent_end(http: httpx.Client) -> None:
    """What was cut is never passed off as whole."""
    try:
        answer = http.post("/v1/completions", json=completion(cut_after=1))
    except httpx.RemoteProtocolError:
        return
    problem(answer, 502, "upstream_failed")


def test_a_stream_of_another_service_that_dies(http: httpx.Client) -> None:
    with http.stream("POST", "/upstream/odd/v1/torn-events") as answer:
        got = [event.data for event in events(answer)]
    assert got[:-1] == ["0", "1"]
    assert json.loads(got[-1])["error"]["code"] == "upstream_failed"


# --- deaths before the first byte


def test_a_reused_connection_that_dies_is_tried_again_on_a_fresh_one(http: httpx.Client) -> None:
    for _ in range(3):
        assert http.post("/v1/completions", json=completion()).status_code == 200
        assert http.post("/v1/completions", json=completion(cut_if_reused=True)).status_code == 200


@pytest.mark.parametrize("large", [False, True])
def test_it_is_tried_again_with_the_same_body(server: RunningServer, http: httpx.Client, large: bool) -> None:
    assert http.post("/v1/completions", json=completion()).status_code == 200
    body = completion(cut_if_reused=True) | {"padding": "y" * (400_000 if large else 0), "model": "al"}
    before = stats(server)["requests"]
    assert http.post("/v1/completions", json=body).json()["model"] == "alpha"
    assert stats(server)["requests"] == before + 2


def test_what_never_answers_is_tried_twice_and_no_more(server: RunningServer, http: httpx.Client) -> None:
    before = stats(server)["requests"]
    error = problem(http.post("/v1/completions", json=completion(cut_after=0)), 502, "upstream_failed")
    assert "alpha" in error["message"]
    assert stats(server)["requests"] == before + 2


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("wish", [{"cut_after": 0}, {"cut_if_reused": True}])
def test_under_upstream_nothing_is_tried_twice(
    server: RunningServer, http: httpx.Client, method: str, wish: dict[str, Any]
) -> None:
    assert http.get("/upstream/alpha/echo").status_code == 200
    before = stats(server)["requests"]
    answer = http.request(method, "/upstream/alpha/echo", params={"mimic": json.dumps(wish)})
    problem(answer, 502, "upstream_failed")
    assert stats(server)["requests"] == before + 1


def test_an_instance_that_dies_before_its_first_byte_is_started_again(
    server: RunningServer, http: httpx.Client
) -> None:
    server.load("mortal")
    first = server.model("mortal")["instance"]["attempt"]
    answer = http.post("/v1/die-once", json={"model": "mortal"})
    assert answer.json() == {"survived": True}
    assert server.model("mortal")["instance"]["attempt"] != first


# --- clients that leave


def leave_early(server: RunningServer, path: str, body: dict[str, Any], after: Callable[[], Any]) -> None:
    """Send a request, wait for `after`, and hang up without having got an answer."""
    data = json.dumps(body).encode()
    host, port = server.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.encode() + data)
        eventually(after)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_passed_on_at_once(server: RunningServer, stream: bool) -> None:
    before = stats(server)["client_left"]
    body = completion(delay_s=60) | {"stream": stream}
    leave_early(server, "/v1/completions", body, lambda: stats(server)["in_flight"] == 1)
    eventually(lambda: stats(server)["client_left"] == before + 1, timeout_s=2)
    eventually(lambda: server.model("alpha")["instance"]["in_flight"] == 0, timeout_s=2)


def test_a_client_that_leaves_in_a_stream_is_passed_on_at_once(server: RunningServer) -> None:
    before = stats(server)["client_left"]
    body = completion(tokens=10_000, tokens_per_s=50) | {"stream": True}
    with http_client(server) as http, http.stream("POST", "/v1/completions", json=body) as answer:
        next(events(answer))
    eventually(lambda: stats(server)["client_left"] == before + 1, timeout_s=2)
    eventually(lambda: server.model("alpha")["instance"]["in_flight"] == 0, timeout_s=2)


def waiting_for(server: RunningServer, model: str) -> int:
    return sum(entry["waiting"] for entry in server.state()["queue"] if entry["model"] == model)


def test_a_client_that_leaves_ends_its_own_wait_only(server: RunningServer) -> None:
    leave_early(server, "/v1/completions", completion("never"), lambda: waiting_for(server, "never") == 1)
    eventually(lambda: waiting_for(server, "never") == 0, timeout_s=2)
    assert server.model("never")["state"] == "starting"


# --- limits


def test_a_deadline_that_passes_while_it_waits(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json=completion("never"), headers={"X-Deadline-Seconds": "0.3"})
    problem(answer, 503, "deadline_exceeded")
    assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_a_deadline_that_passes_before_the_first_byte(server: RunningServer, http: httpx.Client) -> None:
    before = stats(server)["client_left"]
    headers = {"X-Deadline-Seconds": "0.7"}
    answer = http.post("/v1/completions", json=completion(delay_s=60), headers=headers)
    error = problem(answer, 503, "deadline_exceeded")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert "300 s" not in error["message"], "it says the model's deadline, not the one that passed"
    assert "within 1 s" in error["message"]
    eventually(lambda: stats(server)["client_left"] == before + 1)


def test_a_deadline_does_not_end_an_answer_that_has_begun(http: httpx.Client) -> None:
    body = completion(tokens=5, tokens_per_s=10) | {"stream": True}
    headers = {"X-Deadline-Seconds": "0.2"}
    with http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
        assert [event.data for event in events(answer)][-1] == "[DONE]"


def test_the_queue_of_a_model_is_limited(server: RunningServer, http: httpx.Client) -> None:
    patience = {"X-Deadline-Seconds": "15"}

    def wait() -> httpx.Response:
        with http_client(server) as other:
            return other.post("/v1/completions", json=completion("never"), headers=patience)

    waiting = [in_thread(wait) for _ in range(2)]
    eventually(lambda: waiting_for(server, "never") == 2)
    answer = http.post("/v1/completions", json=completion("never"), headers=patience)
    error = problem(answer, 503, "queue_full")
    assert error["queue_limit"] == 2
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    server.unload("never")
    for waited in waiting:
        problem(waited.result(10), 503, "model_unloaded")


def test_no_request_lasts_longer_than_its_limit(server: RunningServer) -> None:
    def whole() -> httpx.Response:
        with http_client(server) as http:
            return http.post("/v1/completions", json=completion(delay_s=60))

    def stream() -> list[str]:
        body = completion(tokens=10_000, tokens_per_s=5) | {"stream": True}
        with http_client(server) as http, http.stream("POST", "/v1/completions", json=body) as answer:
            return [event.data for event in events(answer)]

    asked, streamed = in_thread(whole), in_thread(stream)
    problem(asked.result(20), 504, "request_limit")
    got = streamed.result(20)
    assert len(got) > 1
    error = json.loads(got[-1])["error"]
    assert error["code"] == "request_limit"
    assert "request_limit" in error["message"]


# --- WebSockets


def socket_url(server: RunningServer, path: str) -> str:
    return server.url.replace("http", "ws") + path


def test_a_socket_echoes_text_and_bytes(server: RunningServer) -> None:
    with connect(socket_url(server, "/upstream/alpha/ws"), max_size=None) as ws:
        for message in ("hello", "é😀" * 1000, b"\x00\xff" * 100, b"", "", b"x" * (2 * MIB)):
            ws.send(message)
            assert ws.recv(timeout=10) == message


def test_a_socket_loads_on_demand(server: RunningServer) -> None:
    assert server.model("on-demand")["state"] == "stopped"
    with connect(socket_url(server, "/upstream/on-demand/ws"), open_timeout=20) as ws:
        ws.send("loaded?")
        assert ws.recv(timeout=10) == "loaded?"
    assert server.model("on-demand")["state"] == "ready"


def test_a_socket_counts_as_busy_and_no_longer_when_it_is_closed(server: RunningServer) -> None:
    with connect(socket_url(server, "/upstream/alpha/ws")) as ws:
        ws.send("x")
        ws.recv(timeout=10)
        assert server.model("alpha")["instance"]["in_flight"] == 1
    eventually(lambda: server.model("alpha")["instance"]["in_flight"] == 0)


def test_a_socket_speaks_the_protocol_that_was_agreed(server: RunningServer) -> None:
    protocols: Any = ["unknown", "even"]
    with connect(socket_url(server, "/upstream/odd/ws/headers"), subprotocols=protocols) as ws:
        assert ws.subprotocol == "even"


@pytest.mark.parametrize(("code", "reason"), [(1000, "done"), (1001, ""), (4321, "because"), (1011, "sorry")])
def test_how_a_service_closes_reaches_the_client(server: RunningServer, code: int, reason: str) -> None:
    url = socket_url(server, f"/upstream/odd/ws/close?code={code}&reason={reason}")
    with connect(url) as ws:
        ws.send("close, please")
        with pytest.raises(ConnectionClosed) as closed:
            ws.recv(timeout=10)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == code


@pytest.mark.parametrize("code", [1000, 4001])
def test_how_a_client_closes_reaches_the_service(server: RunningServer, code: int) -> None:
    mark = server.folder / "marks" / f"closed-{code}"
    with connect(socket_url(server, f"/upstream/odd/ws/record?name={mark.name}")) as ws:
        ws.send("x")
        ws.recv(timeout=10)
        ws.close(code, "bye")
    assert eventually(lambda: mark.exists() and mark.read_text()) == str(code)


def test_a_service_that_dies_does_not_close_cleanly(server: RunningServer) -> None:
    with connect(socket_url(server, "/upstream/mortal/ws/die"), open_timeout=20) as ws:
        ws.send("die")
        with pytest.raises(ConnectionClosedError) as closed:
            ws.recv(timeout=10)
    assert not isinstance(closed.value, ConnectionClosedOK)


def test_a_socket_that_the_service_does_not_have(server: RunningServer) -> None:
    for path in ("/upstream/alpha/nothing-here", "/upstream/nope/ws", "/upstream/alpha/health"):
        with pytest.raises(InvalidStatus) as refused, connect(socket_url(server, path)):
            pass
        assert refused.value.response.status_code >= 400
    eventually(lambda: server.model("alpha")["instance"]["in_flight"] == 0)


def test_a_socket_of_nobody(server: RunningServer) -> None:
    with pytest.raises(InvalidStatus) as refused, connect(socket_url(server, "/nothing")):
        pass
    assert refused.value.response.status_code >= 400


# --- looking


LOOKS = [
    "/upstream/{m}/health",
    "/upstream/{m}/metrics",
    "/upstream/{m}/slots",
    "/upstream/{m}/props",
    "/upstream/{m}/v1/models",
    "/upstream/{m}/echo?autoload=false",
    "/props?model={m}",
    "/slots?model={m}",
    "/metrics?model={m}",
    "/v1/models",
    "/models",
    "/models/{m}",
    "/state",
    "/devices",
    "/props",
    "/readyz",
    "/doctor",
    "/log",
]


@pytest.mark.parametrize("path", LOOKS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_looking_loads_nothing(server: RunningServer, http: httpx.Client, path: str, method: str) -> None:
    answer = http.request(method, path.format(m="cold"))
    assert answer.status_code in (200, 400, 405)
    if method == "GET" and "{m}" in path and path != "/models/{m}":
        expected = 400 if "=" in path and "upstream" not in path else "model_not_loaded"
        assert problem(answer, 400)["code"] == expected
    view = server.model("cold")
    assert (view["state"], view["status"]) == ("stopped", {"value": "unloaded"})


@pytest.mark.parametrize("flag", ["false", "0"])
def test_autoload_false_loads_nothing(server: RunningServer, http: httpx.Client, flag: str) -> None:
    for path, body in (("/v1/completions", completion("cold")), ("/completion", {"model": "cold"})):
        problem(http.post(f"{path}?autoload={flag}", json=body), 400)
    assert server.model("cold")["state"] == "stopped"


def test_autoload_false_still_counts_what_a_loaded_model_does(
    server: RunningServer, http: httpx.Client
) -> None:
    """It answers somebody, so it is in flight, and must not be evicted meanwhile."""
    body = completion(tokens=10_000, tokens_per_s=20) | {"stream": True}
    with http.stream("POST", "/v1/completions?autoload=false", json=body) as answer:
        assert answer.status_code == 200
        told = events(answer)  # kept: a generator that is dropped hangs up
        next(told)
        assert server.model("alpha")["instance"]["in_flight"] == 1


def test_looking_does_not_keep_a_model_loaded(server: RunningServer, http: httpx.Client) -> None:
    """Idle after 1 s, and it leaves although somebody looks all the time."""
    server.load("brief")
    seen: list[int] = []

    def is_gone() -> bool:
        for path in (path for path in LOOKS[:9] if "autoload" not in path):  # that one uses what is loaded
            http.get(path.format(m="brief"))
        view = server.model("brief")
        seen.append(view.get("instance", {}).get("requests", 0))
        return bool(view["state"] in ("stopping", "reclaiming", "stopped"))

    eventually(is_gone, timeout_s=8)
    assert set(seen) == {0}


def test_health_under_upstream_is_the_service_s_own(http: httpx.Client) -> None:
    assert http.get("/upstream/alpha/health").json() == {"status": "ok"}
    assert "mimic_requests_total" in http.get("/upstream/alpha/metrics").text


# --- many at once


def test_counts_come_back_after_a_crowd(server: RunningServer) -> None:
    before = server.model("alpha")["instance"]["requests"]
    barrier = threading.Barrier(16)

    def ask(number: int) -> int:
        with http_client(server) as http:
            barrier.wait(10)
            stream = number % 2 == 0
            answer = http.post("/v1/completions", json=completion(tokens=50) | {"stream": stream})
            return answer.status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(ask, range(16))) == {200}
    view = eventually(
        lambda: (found := server.model("alpha")["instance"])["in_flight"] == 0 and found, timeout_s=5
    )
    assert view["requests"] == before + 16


# --- last, because it takes longest


def test_a_stream_that_waits_is_kept_alive_and_then_told_the_error(
    held: Future[list[tuple[float, Event]]],
) -> None:
    got = held.result(60)
    comments = [(at_s, event) for at_s, event in got if event.comment is not None]
    assert comments
    assert 9 < comments[0][0] < 11.5
    assert "slow" in str(comments[0][1].comment)
    last = got[-1][1].json()
    assert last["error"]["code"] == 500
    assert last["error"]["message"] == "asked to answer 500"
    assert len([event for _, event in got if event.data]) == 1
