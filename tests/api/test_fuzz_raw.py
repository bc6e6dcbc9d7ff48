"""Random bytes where clients send sense: targets, headers, bodies. Each gets one answer, and no 5xx but 503.

The same examples each time; API_FUZZ_EXAMPLES=1000 draws so many, new ones each time.
"""

import os
from collections.abc import Iterator

import httpx
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.talk import assert_unharmed, http_client, oddity_service, parsed_answer, problem, raw_bytes
from tests.server import RunningServer, mimic_service, running_server

EXAMPLES = int(os.environ.get("API_FUZZ_EXAMPLES", "0"))
LIMIT_S = 400 + 2 * EXAMPLES
MANY = settings(
    max_examples=EXAMPLES or 120,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("fuzz-raw")
    services = {"mimic": mimic_service(), "odd": oddity_service(folder / "marks")}
    with running_server(
        folder, {"alpha": {}, "odd": {"service": "odd", "aliases": ["al"]}}, services
    ) as server:
        yield server
        assert_unharmed(server, "odd", "alpha")


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with http_client(server) as client:
        yield client


# --- targets and headers

METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "PROPFIND", "QUERY"]
STARTS = [
    b"/",
    b"/models/",
    b"/models?",
    b"/models/load",
    b"/operations/",
    b"/logs/odd?",
    b"/logs/",
    b"/log?",
    b"/props?",
    b"/slots/",
    b"/v1/",
    b"/v1/x?model=odd&",
    b"/v1/models/",
    b"/upstream/",
    b"/upstream/odd/",
    b"http://localhost/upstream/odd/",
]
PIECES = [
    *(b"%00 %0a %0d%0a %2e%2e %2F %5c %ff%fe %c3%28 %ed%a0%80 %f4%90%80%80 % %z %zz %u0041 %25%30".split()),
    *(b".. . // \\ ; : @ # ? & = + * ~ | ^ ` { } [ ] < > \" ' $ ! ( ) ,".split()),
    *(b"model=odd model= model=nope model=%00 reload=0 limit=1 limit=-0 tail=0 attempt=..%2f..%2f".split()),
    *(b"autoload=false odd nope 0 -1 1e999 NaN 9999999999999999999999".split()),
    b"a" * 5000,
]
HEADERS = [
    b"Accept: */*;q=\xff",
    b"Connection: close, host, content-length, content-type",
    b"Connection: upgrade, ,,",
    b"Content-Type: application/json; charset=utf-7",
    b"Content-Type: multipart/form-data; boundary=\xff",
    b"Content-Type: multipart/mixed; boundary=--",
    b"Content-Type: \xff/\xff",
    b"Content-Type:",
    b"Cookie: " + b"a=b; " * 3000,
    b"Host: localhost",
    b"Host: \xff",
    b"Last-Event-ID: -1",
    b"Origin: http://[::1",
    b"Origin: //[",
    b"Origin: \xff",
    b"Range: bytes=-1-,5",
    b"Sec-Fetch-Site: \xff",
    b"Sec-Fetch-Site: none",
    b"Transfer-Encoding: identity",
    b"Upgrade: h2c",
    b"X-Deadline-Seconds: 1e-300",
    b"X-Deadline-Seconds: \xb2",
    b"X-Deadline-Seconds: 1_0",
    b"X-Forwarded-Host: evil.example",
    b"X-HTTP-Method-Override: DELETE",
]
RAW_PIECES = st.sampled_from(PIECES) | st.binary(min_size=1, max_size=3)
TARGETS = st.builds(
    lambda start, pieces: start + b"".join(pieces),
    st.sampled_from(STARTS),
    st.lists(RAW_PIECES, max_size=6),
)


def assert_one_answer(received: bytes) -> None:
    """One answer and no more, of the one shape where it is an error in JSON, and no 5xx but a 503."""
    assert received.count(b"HTTP/1.1 ") == 1, received
    answer = parsed_answer(received)
    assert answer.status < 500 or answer.status == 503, received
    if answer.status >= 400 and answer.headers.get("content-type") == "application/json" and answer.body:
        error = answer.json()["error"]
        assert {"message", "type", "code", "param"} <= set(error)
        assert error["message"]


@pytest.mark.timeout(LIMIT_S)
@MANY
@given(
    st.sampled_from(METHODS),
    TARGETS,
    st.lists(st.sampled_from(HEADERS), max_size=3),
    st.binary(max_size=20) | st.just(b'{"model": "odd"}'),
)
def test_any_target_and_headers(
    server: RunningServer, method: str, target: bytes, headers: list[bytes], body: bytes
) -> None:
    lines = [method.encode() + b" " + target + b" HTTP/1.1", *headers, b"Content-Length: %d" % len(body)]
    if not any(line.startswith(b"Host:") for line in headers):
        lines.append(b"Host: localhost")
    assert_one_answer(raw_bytes(server, b"\r\n".join([*lines, b"Connection: close", b"", body])))


@pytest.mark.timeout(LIMIT_S)
@MANY
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_instead_of_a_request(server: RunningServer, noise: bytes, has_start: bool) -> None:
    """An answer, or a closed connection once there is a line end that makes it no HTTP."""
    start = b"POST /models/load HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" if has_start else b""
    received = raw_bytes(server, start + noise + b"\r\n\r\n\0\r\n\r\n")
    assert received.count(b"HTTP/1.1 ") <= 1
    assert not received or parsed_answer(received).status < 500


# --- bodies

NUMBERS = ["NaN", "-Infinity", "1e999", "-0", "1" * 400, "0.1e-400", "٣", "0x10", "1_0", "+1", "01"]
STRINGS = [
    '"\\ud800"',
    '"\\u0000"',
    '"a\\u0000"',
    '"' + "x" * 5000 + '"',
    '"odd "',
    '"../odd"',
    '""',
    "'odd'",
]
TOKENS = st.sampled_from(
    [*NUMBERS, *STRINGS, "null", "true", "[]", "{}", "{", "]", '"odd"', '"al"', '"nope"', ""]
)
VALUES = st.recursive(
    TOKENS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]")
        | st.tuples(inner, st.integers(1, 3000)).map(lambda pair: "[" * pair[1] + pair[0] + "]" * pair[1])
        | st.lists(st.tuples(TOKENS, inner), max_size=3).map(
            lambda pairs: "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=5,
)
FIELDS = st.sampled_from(
    ["model", "wait", "pin", "force", "hold", "stream", "x", "\\u006dodel", "\\ud800", ""]
)
OBJECTS = st.lists(st.tuples(FIELDS, VALUES), max_size=4).map(
    lambda pairs: "{" + ", ".join(f'"{field}": {value}' for field, value in pairs) + "}"
)
BODIES = st.one_of(
    OBJECTS.map(str.encode),
    VALUES.map(str.encode),
    OBJECTS.map(lambda text: text.encode("utf-16")),
    OBJECTS.map(lambda text: b"\xef\xbb\xbf" + text.encode()),
    st.tuples(OBJECTS, st.integers(0, 200), st.binary(max_size=3)).map(
        lambda drawn: drawn[0].encode()[: drawn[1]] + drawn[2] + drawn[0].encode()[drawn[1] :]
    ),
)
CALLS = ["/models/load", "/models/unload", "/v1/mirror", "/completion", "/v1/chat/completions"]


@pytest.mark.timeout(LIMIT_S)
@MANY
@given(st.sampled_from(CALLS), BODIES, st.sampled_from(["application/json", "text/plain", ""]))
def test_any_body(http: httpx.Client, path: str, body: bytes, kind: str) -> None:
    answer = http.post(path, content=body, headers={"Content-Type": kind, "X-Deadline-Seconds": "20"})
    if answer.status_code in (400, 404, 503):
        problem(answer, answer.status_code)
    else:
        assert answer.status_code == 200, answer.text
        assert orjson.loads(body)["model"] in ("odd", "al")


def form(parts: list[bytes], boundary: bytes, end: bytes) -> bytes:
    return b"".join(b"--" + boundary + b"\r\n" + part for part in parts) + end


PART_PIECES = [
    b'Content-Disposition: form-data; name="model"',
    b"content-disposition:form-data;name=model",
    b'Content-Disposition: form-data; name="file"; filename="model"',
    b"Content-Type: \xff",
    b"\r\n",
    b"\r\n\r\n",
    b"odd",
    b"nope",
    b"\xff\0",
    b"--b",
    b"--",
    b"x" * 5000,
]


@pytest.mark.timeout(LIMIT_S)
@MANY
@given(
    st.lists(st.lists(st.sampled_from(PART_PIECES), max_size=5).map(b"".join), max_size=4),
    st.sampled_from([b"b", b"", b"--b", b"c"]),
    st.sampled_from([b"--b--\r\n", b"", b"--b", b"\r\n"]),
)
def test_any_form(http: httpx.Client, parts: list[bytes], boundary: bytes, end: bytes) -> None:
    """Only a form with a whole part named `model` whose value is a model gets through."""
    body = form(parts, boundary, end)
    kind = "multipart/form-data; boundary=b"
    answer = http.post("/v1/mirror", content=body, headers={"Content-Type": kind})
    if answer.status_code == 200:
        assert answer.content == body
        assert b"odd" in body
    else:
        problem(answer, answer.status_code)
        assert answer.status_code in (400, 404)
