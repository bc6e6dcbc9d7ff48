"""Who may do what from where: names, origins, secrets, paths, pages, and listening beyond this machine."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.api.oddity import PAGE
from tests.api.talk import address_of, oddity_service, problem, raw_get, raw_request
from tests.server import RunningServer, mimic_service, running_server
from tests.support import free_port

ELSEWHERE = "http://evil.example"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("safety")
    services = {"mimic": mimic_service(), "odd": oddity_service(folder / "marks")}
    models: dict[str, Any] = {"alpha": {}, "cold": {}, "odd": {"service": "odd"}}
    with running_server(folder, models, services, {"allowed_hosts": ["box.lan"]}) as server:
        server.load("alpha")
        server.load("odd")
        yield server


def port_of(server: RunningServer) -> str:
    return server.url.rpartition(":")[2]


# --- names


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:{port}",
        "127.0.0.1:{port}",
        "[::1]:{port}",
        "192.168.1.5:8000",
        "orchestrator.lan",
        "llama.lan",
        "box.lan:{port}",
        "anything.localhost",
        socket.gethostname(),
    ],
)
def test_our_own_names_are_answered(server: RunningServer, host: str) -> None:
    answer = raw_get(server, "/models", "Host: " + host.format(port=port_of(server)))
    assert answer.status == 200
    assert answer.json()["data"]


FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "evil-localhost",
    "lan",
    "box.lan.evil.example",
    "user@evil.example",
]


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("path", ["/models", "/state", "/healthz", "/docs", "/upstream/alpha/health"])
def test_a_foreign_name_is_421_everywhere(server: RunningServer, path: str, host: str) -> None:
    answer = raw_get(server, path, "Host: " + host)
    assert answer.status == 421
    error = answer.json()["error"]
    assert error["code"] == "unknown_host"
    assert host in error["message"]
    assert "allowed_hosts" in error["message"]


def test_a_foreign_name_cannot_chat(server: RunningServer) -> None:
    body = b'{"model": "alpha", "prompt": "x"}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: evil.example\r\nContent-Length: {len(body)}\r\n"
    assert raw_request(server, head.encode() + b"Connection: close\r\n\r\n" + body).status == 421


def test_no_name_at_all_is_no_name_of_ours(server: RunningServer) -> None:
    assert raw_request(server, b"GET /models HTTP/1.0\r\n\r\n").status in (400, 421)


# --- other sites


CHANGES = [
    ("/models/unload", {"model": "alpha"}),
    ("/models/load", {"model": "cold"}),
    ("/v1/completions", {"model": "cold", "prompt": "x"}),
    ("/completion", {"model": "cold"}),
    ("/upstream/cold/echo", {}),
]
CROSS_SITE = [
    {"Origin": ELSEWHERE},
    {"Origin": "null"},
    {"Origin": "https://localhost.evil.example"},
    {"Origin": "http://203.0.113.5"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://127.0.0.1:8000"},
]


def is_untouched(server: RunningServer) -> bool:
    return server.model("alpha")["state"] == "ready" and server.model("cold")["state"] == "stopped"


@pytest.mark.parametrize("headers", CROSS_SITE, ids=str)
@pytest.mark.parametrize(("path", "body"), CHANGES)
def test_a_page_of_another_site_may_not_act(
    server: RunningServer, http: httpx.Client, path: str, body: dict[str, str], headers: dict[str, str]
) -> None:
    """As a form, which a browser sends without asking first."""
    sent = headers | {"Content-Type": "application/x-www-form-urlencoded"}
    try:
        code = 403 if path == "/completion" else "cross_site_refused"  # a number, on llama.cpp's own paths
        error = problem(http.post(path, content=json.dumps(body), headers=sent), 403, code)
        assert "another site" in error["message"]
        assert is_untouched(server)
    finally:
        server.unload("cold")
        server.load("alpha")


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_whatever_the_method(http: httpx.Client, method: str) -> None:
    answer = http.request(method, "/upstream/alpha/echo", headers={"Origin": ELSEWHERE})
    problem(answer, 403, "cross_site_refused")


def test_our_own_pages_may_act(server: RunningServer, http: httpx.Client) -> None:
    own: list[dict[str, str]] = [
        {"Origin": server.url, "Sec-Fetch-Site": "same-origin"},
        {"Origin": f"http://localhost:{port_of(server)}"},
        {"Origin": "https://box.lan"},
        {"Sec-Fetch-Site": "none"},
        {},
    ]
    for headers in own:
        answer = http.post("/v1/completions", json={"model": "alpha", "prompt": "x"}, headers=headers)
        assert answer.status_code == 200


CROSS_GETS = [
    {"Origin": ELSEWHERE, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    {"Origin": ELSEWHERE},
]
GETS = ["/upstream/cold/echo", "/v1/files?model=cold", "/completion?model=cold", "/models/load?model=cold"]


@pytest.mark.parametrize("headers", CROSS_GETS, ids=str)
@pytest.mark.parametrize("path", GETS)
def test_a_get_of_another_site_loads_nothing(
    server: RunningServer, http: httpx.Client, path: str, headers: dict[str, str]
) -> None:
    """An image's address is enough for a GET; it must not load a model, nor evict another for it."""
    try:
        answer = http.get(path, headers=headers)
        assert answer.status_code >= 400
        assert is_untouched(server)
    finally:
        server.unload("cold")


def test_a_get_of_another_site_does_not_read_the_catalogue_again(
    server: RunningServer, http: httpx.Client
) -> None:
    models = server.folder / "models.yaml"
    before = models.read_text()
    written = yaml.safe_load(before)
    written["models"]["added"] = {"service": "mimic", "memory": "64MiB"}
    models.write_text(yaml.safe_dump(written))
    try:
        http.get("/models?reload=1", headers={"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"})
        assert "added" not in [model["id"] for model in http.get("/models").json()["data"]]
    finally:
        models.write_text(before)
        http.get("/models?reload=1").raise_for_status()


def test_other_sites_are_told_nothing_that_lets_them_read(http: httpx.Client) -> None:
    for path in ("/state", "/models", "/upstream/alpha/health"):
        answer = http.get(path, headers={"Origin": ELSEWHERE})
        assert "access-control-allow-origin" not in answer.headers
    asked = {"Origin": ELSEWHERE, "Access-Control-Request-Method": "POST"}
    answer = http.options("/models/load", headers=asked)
    assert answer.status_code >= 400
    assert "access-control-allow-origin" not in answer.headers


# --- WebSockets


def socket_url(server: RunningServer, path: str) -> str:
    return server.url.replace("http", "ws") + path


@pytest.mark.parametrize("headers", CROSS_SITE, ids=str)
def test_a_page_of_another_site_gets_no_socket(server: RunningServer, headers: dict[str, str]) -> None:
    given = dict(headers)
    origin: Any = given.pop("Origin", None)
    for model in ("alpha", "cold"):
        url = socket_url(server, f"/upstream/{model}/ws")
        with pytest.raises(InvalidStatus) as refused, connect(url, origin=origin, additional_headers=given):
            pass
        assert refused.value.response.status_code == 403
    assert is_untouched(server)


def test_our_own_pages_get_a_socket(server: RunningServer) -> None:
    origin: Any = server.url
    same = {"Sec-Fetch-Site": "same-origin"}
    url = socket_url(server, "/upstream/alpha/ws")
    with connect(url, origin=origin, additional_headers=same) as ws:
        ws.send("hello")
        assert ws.recv(timeout=5) == "hello"


def test_a_foreign_name_gets_no_socket(server: RunningServer) -> None:
    answer = raw_get(
        server,
        "/upstream/alpha/ws",
        "Host: evil.example",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    assert answer.status in (400, 403, 421)


# --- secrets


SECRETS = {
    "Authorization": "Bearer our-key",
    "Cookie": "session=ours",
    "X-Api-Key": "our-key",
    "Proxy-Authorization": "Basic ours",
    "X-Deadline-Seconds": "20",
}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_secrets_never_reach_a_service(http: httpx.Client, method: str) -> None:
    more = {"X-Mine": "kept", "Accept": "text/x", "User-Agent": "me/1"}
    answer = http.request(method, "/upstream/alpha/echo", headers=SECRETS | more)
    seen = answer.json()["headers"]
    assert not {name.lower() for name in SECRETS} & set(seen)
    assert "ours" not in json.dumps(seen)
    assert "our-key" not in json.dumps(seen)
    assert seen["x-mine"] == "kept"
    assert seen["accept"] == "text/x"
    assert seen["user-agent"] == "me/1"


def test_secrets_never_reach_a_service_by_v1(http: httpx.Client) -> None:
    answer = http.post("/v1/mirror", json={"model": "odd"}, headers=SECRETS)
    seen = json.loads(answer.headers["x-seen"])
    assert not {name.lower() for name in SECRETS} & set(seen)


def test_secrets_never_reach_a_service_by_a_socket(server: RunningServer) -> None:
    with connect(socket_url(server, "/upstream/odd/ws/headers"), additional_headers=SECRETS) as ws:
        seen = json.loads(ws.recv(timeout=5))
    assert not {name.lower() for name in SECRETS} & set(seen)
    assert "our-key" not in json.dumps(seen)


def test_headers_of_one_hop_end_there(server: RunningServer) -> None:
    hop = ["TE: trailers", "Keep-Alive: timeout=9", "Proxy-Connection: keep-alive", "Upgrade: h2c"]
    seen = raw_get(server, "/upstream/alpha/echo", *hop).json()["headers"]
    assert not {"te", "keep-alive", "proxy-connection", "upgrade"} & set(seen)


def test_a_header_that_connection_names_ends_there_too(server: RunningServer) -> None:
    host = "Host: localhost"
    data = f"GET /upstream/alpha/echo HTTP/1.1\r\n{host}\r\nConnection: close, X-Hop\r\nX-Hop: 1\r\n\r\n"
    assert "x-hop" not in raw_request(server, data.encode()).json()["headers"]


# --- paths


class Trap:
    """A listener that nobody should ever reach; `caught` has what did."""

    def __init__(self) -> None:
        self.port = free_port()
        self.caught: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with closing(connection):
                self.caught.append(connection.recv(4096))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def trap() -> Iterator[Trap]:
    trap = Trap()
    yield trap
    trap.close()


TRICKS = [
    "/upstream/alpha//{evil}/x",
    "/upstream/alpha///{evil}/x",
    "/upstream/alpha/@{evil}/x",
    "/upstream/alpha/user:pass@{evil}/x",
    "/upstream/alpha/%40{evil}/x",
    "/upstream/alpha/http://{evil}/x",
    "/upstream/alpha/%2f%2f{evil}/x",
    "/upstream/alpha/\\\\{evil}/x",
    "/upstream/alpha/%5c%5c{evil}/x",
    "/upstream/alpha/..//{evil}/x",
    "/upstream/alpha/%2e%2e/%2e%2e//{evil}",
    "/upstream/alpha/;@{evil}",
    "/upstream/alpha/#@{evil}",
    "/upstream/alpha/%23@{evil}/x",
    "/upstream/alpha/?@{evil}",
    "/upstream/alpha/echo?x=//{evil}/",
    "/upstream/alpha/%0d%0aHost:%20{evil}%0d%0a/x",
    "/upstream/alpha@{evil}/x",
    "/upstream/alpha:80@{evil}/x",
    "/upstream//{evil}/x",
    "/upstream/@{evil}/x",
    "/upstream/%2f%2f{evil}/x",
    "http://{evil}/upstream/alpha/echo",
    "/v1/@{evil}/?model=alpha",
    "/v1//{evil}/x?model=alpha",
]


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_path_leads_elsewhere(server: RunningServer, trap: Trap, trick: str, method: str) -> None:
    answer = raw_get(server, trick.format(evil=trap.address), method=method)
    assert answer.status in range(200, 600)
    assert trap.caught == []


@pytest.mark.parametrize(
    "path",
    ["/echo//{evil}", "/echo/@{evil}", "/echo/http://{evil}/", "/echo/%40{evil}", "/echo/%0d%0aX-Made: 1"],
)
def test_the_instance_is_asked_by_its_own_address(server: RunningServer, trap: Trap, path: str) -> None:
    """And sees the path as it was sent."""
    sent = path.format(evil=trap.address).replace(" ", "%20")
    seen = raw_get(server, "/upstream/alpha" + sent).json()
    assert seen["headers"]["host"] == address_of(server, "alpha")
    assert "x-made" not in seen["headers"]
    assert seen["path"] == sent


@pytest.mark.parametrize("path", ["/../../state", "/%2e%2e/%2e%2e/state", "/..%2f..%2fstate", "/./../state"])
def test_dots_do_not_lead_back_to_us(server: RunningServer, path: str) -> None:
    answer = raw_get(server, "/upstream/alpha" + path)
    assert answer.status == 404
    assert answer.json()["error"]["type"] == "not_found_error"
    assert b"sample_age_s" not in answer.body


# --- pages


@pytest.mark.parametrize("path", ["/page", "/drawing"])
def test_pages_of_a_service_are_sandboxed(http: httpx.Client, path: str) -> None:
    answer = http.get("/upstream/odd" + path)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox")
    assert "allow-same-origin" not in policy
    assert "allow-top-navigation" not in policy
    if path == "/page":
        assert answer.content == PAGE


def test_data_of_a_service_is_left_as_it_is(http: httpx.Client) -> None:
    assert "content-security-policy" not in http.get("/upstream/odd/health").headers


def test_pages_are_sandboxed_by_whatever_path_they_come(http: httpx.Client) -> None:
    answer = http.post("/v1/mirror?model=odd", content=b"", headers={"Content-Type": "text/html"})
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.headers["content-security-policy"].startswith("sandbox")


# --- listening


def test_listening_beyond_this_machine_without_keys_must_be_wanted(tmp_path: Path) -> None:
    """Else there is a key (test_keys.py)."""
    with running_server(tmp_path, settings={"host": "0.0.0.0", "allow_remote": True}) as server:
        assert "serving on http://0.0.0.0:" in server.log()
        with server.client() as client:
            (check,) = [check for check in client.doctor()["checks"] if check["name"] == "keys"]
        assert "whoever can reach this server may do everything" in check["found"]
        assert not (server.state_dir / "admin.key").exists()
