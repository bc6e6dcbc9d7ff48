"""Keys on a real server: who is let in by which way, who is told what, and that no key is ever told."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from orchestrator.api.access import COOKIE
from orchestrator.client.http import ApiError
from tests.api.talk import events, http_client, oddity_service, problem, raw_get
from tests.server import RunningServer, mimic_service, running_server
from tests.support import eventually

CHAT = {"model": "alpha", "messages": [{"role": "user", "content": "hello"}]}
NO_KEYS = ["unused", "orc_00000000_" + "0" * 64, "ö"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """With a key of each scope; its tests may make more."""
    folder = tmp_path_factory.mktemp("keys")
    services = {"mimic": mimic_service(), "odd": oddity_service(folder / "marks")}
    models: dict[str, Any] = {"alpha": {}, "odd": {"service": "odd"}}
    with running_server(folder, models, services) as server:
        with server.client() as client:
            server.key = client.create_key("me", ["admin"])["key"]
        for model in models:
            server.load(model)
        yield server


@pytest.fixture(scope="module")
def keys(server: RunningServer) -> dict[str, str]:
    """By scope."""
    assert server.key is not None
    with server.client() as client:
        made = {scope: client.create_key(f"only-{scope}", [scope])["key"] for scope in ("inference", "lease")}
    return {"admin": server.key, **made}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def socket_url(server: RunningServer) -> str:
    return server.url.replace("http", "ws") + "/upstream/alpha/ws"


# --- which way a key is shown


CALLS = [
    ("POST", "/v1/chat/completions", CHAT),
    ("POST", "/v1/chat/completions", CHAT | {"stream": True}),
    ("GET", "/v1/models", None),
    ("GET", "/models", None),
    ("GET", "/props", None),
    ("GET", "/upstream/alpha/echo", None),
    ("POST", "/tokenize", {"model": "alpha", "content": "x"}),
]
by_call = pytest.mark.parametrize(("method", "path", "body"), CALLS, ids=lambda value: str(value)[:24])


@by_call
def test_a_key_opens_gateway_and_api(
    http: httpx.Client, keys: dict[str, str], method: str, path: str, body: Any
) -> None:
    for shown in (
        bearer(keys["inference"]),
        {"X-Api-Key": keys["inference"]},
        {"Authorization": f"bearer  {keys['inference']}"},
        {"Authorization": "Bearer unused", "X-Api-Key": keys["inference"]},
        bearer(keys["admin"]),
    ):
        answer = http.request(method, path, json=body, headers=shown)
        assert answer.status_code == 200, answer.text


@by_call
def test_without_a_key_nothing_opens(
    http: httpx.Client, keys: dict[str, str], method: str, path: str, body: Any
) -> None:
    code: Any = 401 if path == "/tokenize" else "missing_key"
    error = problem(answer := http.request(method, path, json=body), 401, code)
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "scope 'inference'" in error["message"]
    assert error["needed_scope"] == "inference"
    for wrong in NO_KEYS:
        for shown in (bearer(wrong), {"X-Api-Key": wrong}):
            headers = {name: value.encode("latin-1") for name, value in shown.items()}
            answer = http.request(method, path, json=body, headers=headers)
            error = problem(answer, 401)
            assert "not one of this server's" in error["message"]
            assert wrong == "ö" or wrong not in answer.text
    problem(http.request(method, path, json=body, headers=bearer(keys["lease"])), 403)


def test_a_key_with_too_little_is_told_what_it_has_and_what_it_needs(
    http: httpx.Client, keys: dict[str, str]
) -> None:
    answer = http.post("/models/unload", json={"model": "alpha"}, headers=bearer(keys["inference"]))
    error = problem(answer, 403, "insufficient_scope")
    assert (
        error["message"] == "This call needs the scope 'admin', and the key 'only-inference' has: inference."
    )
    assert (error["needed_scope"], error["scopes"]) == ("admin", ["inference"])


ADMINISTRATION = [
    ("POST", "/models/load"),
    ("POST", "/models"),
    ("DELETE", "/models?model=alpha"),
    ("GET", "/models?reload=1"),
    ("GET", "/state"),
    ("GET", "/events"),
    ("GET", "/log"),
    ("GET", "/logs/alpha"),
    ("GET", "/devices"),
    ("GET", "/doctor"),
    ("GET", "/operations/x"),
    ("GET", "/keys"),
    ("POST", "/keys"),
    ("DELETE", "/keys/me"),
    ("GET", "/dashboard"),
    ("GET", "/nowhere"),
]


@pytest.mark.parametrize(("method", "path"), ADMINISTRATION)
def test_the_house_is_for_its_administrators(
    http: httpx.Client, keys: dict[str, str], method: str, path: str
) -> None:
    problem(http.request(method, path), 401, "missing_key")
    for lesser in ("inference", "lease"):
        answer = http.request(method, path, headers=bearer(keys[lesser]), json={})
        problem(answer, 403, "insufficient_scope")


@pytest.mark.parametrize("path", ["/healthz", "/health", "/readyz", "/openapi.json", "/docs", "/login"])
def test_what_tells_nothing_is_open(http: httpx.Client, path: str) -> None:
    assert http.get(path).status_code == 200
    assert http.head(path).status_code in (200, 405)


def test_a_foreign_name_is_refused_before_its_key_is_looked_at(
    server: RunningServer, keys: dict[str, str]
) -> None:
    headers = ["Host: evil.example", f"Authorization: Bearer {keys['admin']}"]
    assert raw_get(server, "/models", *headers).status == 421


def test_a_stream_and_events_with_a_key(http: httpx.Client, keys: dict[str, str]) -> None:
    body = CHAT | {"stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body, headers=bearer(keys["inference"])) as answer:
        assert [event.data for event in events(answer)][-1] == "[DONE]"
    with http.stream("GET", "/events", headers={"X-Api-Key": keys["admin"]}) as answer:
        assert next(events(answer)).name == "snapshot"


@pytest.mark.parametrize(
    ("shown", "status"), [(None, 401), ("orc_0_0", 401), ("lease", 403), ("inference", 101)]
)
def test_a_socket_needs_a_key_too(
    server: RunningServer, keys: dict[str, str], shown: str | None, status: int
) -> None:
    given = bearer(keys.get(shown, shown)) if shown else {}
    if status == 101:
        with connect(socket_url(server), additional_headers=given) as ws:
            ws.send("hello")
            assert ws.recv(timeout=5) == "hello"
        return
    with pytest.raises(InvalidStatus) as refused, connect(socket_url(server), additional_headers=given):
        pass
    answer = refused.value.response
    assert answer.status_code == status
    assert answer.headers.get("www-authenticate") == ("Bearer" if status == 401 else None)
    assert "API key" in json.loads(answer.body)["error"]["message"] or status == 403


def test_the_openai_client(server: RunningServer, keys: dict[str, str]) -> None:
    def client(key: str) -> openai.OpenAI:
        transport = httpx.Client(trust_env=False)
        return openai.OpenAI(base_url=server.url + "/v1", api_key=key, http_client=transport, max_retries=0)

    messages: Any = CHAT["messages"]
    with client(keys["inference"]) as good:
        assert good.chat.completions.create(model="alpha", messages=messages).choices
        streamed = good.chat.completions.create(model="alpha", messages=messages, stream=True)
        assert len(list(streamed)) > 1
        assert "alpha" in [model.id for model in good.models.list()]
    with client("unused") as unused, pytest.raises(openai.AuthenticationError, match="not one of this"):
        unused.chat.completions.create(model="alpha", messages=messages)
    with client(keys["lease"]) as lesser, pytest.raises(openai.PermissionDeniedError, match="'inference'"):
        lesser.models.list()


def test_neither_key_nor_address_reaches_a_service(http: httpx.Client, keys: dict[str, str]) -> None:
    forged = {"X-Forwarded-For": "10.0.0.7", "X-Forwarded-Host": "x", "Forwarded": "for=x", "X-Real-Ip": "x"}
    answer = http.get("/upstream/alpha/echo", headers=bearer(keys["inference"]) | forged)
    seen = answer.json()["headers"]
    assert not {"authorization", *(name.lower() for name in forged)} & set(seen)
    assert keys["inference"] not in answer.text


# --- making and revoking them


def test_a_key_is_made_listed_used_and_revoked(server: RunningServer, http: httpx.Client) -> None:
    assert server.key is not None
    me = bearer(server.key)
    ask = {"name": "brief", "scopes": ["inference", "lease"], "expires_in": "90d"}
    answer = http.post("/keys", json=ask, headers=me)
    assert answer.status_code == 201
    assert answer.headers["cache-control"] == "no-store"
    made = answer.json()
    token = made.pop("key")
    assert token.startswith(f"orc_{made['id']}_")
    assert made["scopes"] == ["inference", "lease"]
    assert made["expires_at"] - made["created_at"] == 90 * 86400
    listed = http.get("/keys", headers=me)
    assert made in listed.json()["keys"]
    assert token not in listed.text
    assert http.get("/models", headers=bearer(token)).status_code == 200
    problem(http.post("/keys", json=ask, headers=me), 409, "key_exists")
    gone = http.delete("/keys/brief", headers=me)
    assert (gone.status_code, gone.json()["success"]) == (200, True)
    problem(http.get("/models", headers=bearer(token)), 401, "invalid_key")
    problem(http.delete("/keys/brief", headers=me), 404, "key_not_found")


def test_the_last_admin_key_cannot_be_revoked(
    server: RunningServer, http: httpx.Client, keys: dict[str, str]
) -> None:
    problem(http.delete("/keys/me", headers=bearer(keys["admin"])), 409, "last_admin_key")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"name": "with blank"}, '`name`: got "with blank", expected a name of letters, digits'),
        ({"name": ""}, "`name`"),
        ({"scopes": []}, "`scopes`: got [], expected a list with something in it"),
        ({"scopes": ["root"]}, "got \"root\", expected one of 'inference', 'lease' or 'admin'"),
        ({"scopes": "admin"}, "`scopes`"),
        ({"expires_in": "0s"}, '`expires_in`: got "0s", expected a duration above 0'),
        ({"expires": "90d"}, "`expires`"),
    ],
)
def test_what_a_key_cannot_be(
    server: RunningServer, http: httpx.Client, keys: dict[str, str], changed: dict[str, Any], told: str
) -> None:
    ask = {"name": "x", "scopes": ["inference"]} | changed
    error = problem(http.post("/keys", json=ask, headers=bearer(keys["admin"])), 400, "invalid_value")
    assert told in error["message"]


def test_an_expired_key_is_refused(server: RunningServer, http: httpx.Client) -> None:
    with server.client() as client:
        token = client.create_key("soon-over", ["inference"], "300ms")["key"]
    eventually(lambda: http.get("/models", headers=bearer(token)).status_code == 401)
    problem(http.get("/models", headers=bearer(token)), 401, "invalid_key")


def test_without_keys_nothing_is_asked_for_and_the_first_must_be_an_admins(tmp_path: Path) -> None:
    with running_server(tmp_path) as server, http_client(server) as http:
        assert http.get("/state", headers=bearer("unused")).status_code == 200
        assert doctor_says(server)["found"] == "none; only this machine can reach the server"
        ask = {"name": "webui", "scopes": ["inference"]}
        problem(http.post("/keys", json=ask), 409, "admin_key_first")
        with server.client() as client:
            token = client.create_key("me", ["admin"])["key"]
        problem(http.get("/state"), 401, "missing_key")
        server.restart()
        problem(http.get("/state"), 401, "missing_key")
        assert http.get("/state", headers=bearer(token)).status_code == 200
        server.stop()  # which notes that it was used
        server.start()
        (key,) = http.get("/keys", headers=bearer(token)).json()["keys"]
        assert key["last_used_at"] >= key["created_at"]
        assert http.delete("/keys/me", headers=bearer(token)).status_code == 200
        assert http.get("/state").status_code == 200


# --- browsers


PAGE = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8", "Sec-Fetch-Site": "none"}


def log_in(http: httpx.Client, server: RunningServer, key: str, **more: str) -> httpx.Response:
    headers = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    return http.post("/login", data={"key": key, **more}, headers=headers)


@contextmanager
def browser(server: RunningServer, key: str) -> Iterator[httpx.Client]:
    with http_client(server) as http:
        assert log_in(http, server, key).status_code == 303
        yield http


def test_a_browser_is_sent_to_the_login_page_and_back(
    server: RunningServer, http: httpx.Client, keys: dict[str, str]
) -> None:
    sent = http.get("/state?x=1&y=ä", headers=PAGE)
    assert sent.status_code == 303
    assert sent.headers["location"] == "/login?next=/state%3Fx%3D1%26y%3D%25C3%25A4"
    shown = http.get(sent.headers["location"], headers=PAGE)
    assert shown.headers["content-type"].startswith("text/html")
    assert 'name="next" value="/state?x=1&amp;y=%C3%A4"' in shown.text
    policy = shown.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "//" not in shown.text.replace("<!doctype", "")  # nothing is fetched from anywhere
    with http_client(server) as fresh:
        answer = log_in(fresh, server, keys["admin"], next="/state?x=1&y=%C3%A4")
        assert (answer.status_code, answer.headers["location"]) == (303, "/state?x=1&y=%C3%A4")
        cookie = answer.headers["set-cookie"]
        for word in (f"{COOKIE}=", "HttpOnly", "SameSite=strict", "Path=/", "Max-Age=604800"):
            assert word in cookie
        assert "Secure" not in cookie
        assert keys["admin"] not in cookie
        assert fresh.get("/state").status_code == 200


@pytest.mark.parametrize(
    "headers", [{}, {"Accept": "*/*"}, PAGE | bearer("wrong"), PAGE | {"X-Api-Key": "wrong"}], ids=str
)
def test_programs_are_not_sent_to_a_page(http: httpx.Client, headers: dict[str, str]) -> None:
    problem(http.get("/state", headers=headers), 401)
    problem(http.post("/models/load", json={"model": "alpha"}, headers=PAGE | headers), 401)


def test_a_wrong_key_is_told_on_the_page(server: RunningServer, http: httpx.Client) -> None:
    for wrong in ("", "<script>", "orc_00000000_" + "0" * 64):
        answer = log_in(http, server, wrong)
        assert answer.status_code == 401
        assert "not a key of this server" in answer.text
        assert "set-cookie" not in answer.headers
        assert not wrong or wrong not in answer.text


@pytest.mark.parametrize(
    "elsewhere",
    [
        "https://evil.example",
        "//evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/x\r\nSet-Cookie: a=b",
        "evil",
        "\t//evil.example",
        "/ä",
    ],
)
def test_login_leads_nowhere_else(server: RunningServer, keys: dict[str, str], elsewhere: str) -> None:
    with http_client(server) as http:
        answer = log_in(http, server, keys["inference"], next=elsewhere)
        assert answer.headers["location"] == "/docs"
        assert answer.headers.get_list("set-cookie")[0].startswith(COOKIE)
        assert len(answer.headers.get_list("set-cookie")) == 1


def test_a_page_of_another_site_can_neither_log_in_nor_act(
    server: RunningServer, keys: dict[str, str]
) -> None:
    evil = {"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    with browser(server, keys["admin"]) as http:
        for path in ("/login", "/logout", "/models/unload", "/keys", "/v1/completions"):
            problem(http.post(path, data={"key": keys["admin"]}, headers=evil), 403, "cross_site_refused")
        problem(http.delete("/keys/only-lease", headers=evil), 403, "cross_site_refused")
        own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
        assert http.post("/models/load", json={"model": "alpha"}, headers=own).status_code == 200


def test_a_session_may_what_its_key_may(server: RunningServer, keys: dict[str, str]) -> None:
    with browser(server, keys["inference"]) as http:
        assert http.get("/models").status_code == 200
        problem(http.get("/state", headers=PAGE), 403, "insufficient_scope")
        cookie = {"Cookie": f"a=b; {COOKIE}={http.cookies[COOKIE]}; c=d"}
        with connect(socket_url(server), additional_headers=cookie) as ws:
            ws.send("hello")
            assert ws.recv(timeout=5) == "hello"
        seen = http.get("/upstream/alpha/echo").json()["headers"]
        assert "cookie" not in seen


def test_logging_out(server: RunningServer, keys: dict[str, str]) -> None:
    with browser(server, keys["admin"]) as http:
        kept = {"Cookie": f"{COOKIE}={http.cookies[COOKIE]}"}
        answer = http.post("/logout", headers={"Origin": server.url})
        assert (answer.status_code, answer.headers["location"]) == (303, "/login")
        assert COOKIE not in http.cookies
        problem(http.get("/state", headers=kept), 401, "missing_key")
        assert http.post("/logout").status_code == 303


def test_a_session_survives_a_restart_and_ends_with_its_key(
    server: RunningServer, keys: dict[str, str]
) -> None:
    with server.client() as client:
        mine = client.create_key("tablet", ["admin"])["key"]
    with browser(server, mine) as http:
        server.restart()
        assert http.get("/state").status_code == 200
        with server.client() as client:
            client.revoke_key("tablet")
        problem(http.get("/state"), 401, "missing_key")
    server.load("alpha")


def test_a_service_cannot_set_cookies_of_ours(http: httpx.Client, keys: dict[str, str]) -> None:
    server_says = http.get("/upstream/odd/cookie", headers=bearer(keys["inference"]))
    assert server_says.status_code == 200
    assert server_says.json()["sets"] == COOKIE
    assert "set-cookie" not in server_says.headers


# --- who is trusted without one


HOME: dict[str, Any] = {
    "host": "127.0.0.1",
    "trusted_proxies": ["127.0.0.1"],
    "trusted_networks": {"10.1.0.0/16": ["inference", "admin"], "10.2.0.0/16": "inference"},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Behind a proxy on 127.0.0.1, which the tests are; 127.0.0.2 is somebody else."""
    with running_server(tmp_path_factory.mktemp("home"), settings=HOME) as server:
        server.key = (server.state_dir / "admin.key").read_text().strip()
        server.load("alpha")
        yield server


def from_address(address: str, **told: str) -> dict[str, str]:
    return {"X-Forwarded-For": address} | {
        f"X-Forwarded-{name.title()}": value for name, value in told.items()
    }


@pytest.mark.parametrize(
    ("address", "chat", "state"),
    [
        ("10.1.2.3", 200, 200),
        ("10.2.2.3", 200, 401),
        ("10.3.2.3", 401, 401),
        ("10.1.2.3, 10.3.2.3", 401, 401),  # the client claimed the first
        ("10.3.2.3, 10.1.2.3", 200, 200),
        ("10.1.2.3, 127.0.0.1", 200, 200),
        ("nonsense", 401, 401),
        ("::ffff:10.1.2.3", 200, 200),
    ],
)
def test_networks_have_their_scopes_through_the_proxy(
    home: RunningServer, address: str, chat: int, state: int
) -> None:
    with http_client(home) as http:
        headers = from_address(address)
        assert http.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == chat
        assert http.get("/state", headers=headers).status_code == state


def test_a_trusted_network_needs_no_key_whatever_its_clients_send(home: RunningServer) -> None:
    assert home.key is not None
    with http_client(home) as http:
        dummy = from_address("10.2.2.3") | bearer("unused")
        assert http.post("/v1/chat/completions", json=CHAT, headers=dummy).status_code == 200
        problem(http.get("/state", headers=dummy), 401, "invalid_key")
        more = from_address("10.2.2.3") | bearer(home.key)
        assert http.get("/state", headers=more).status_code == 200


def test_who_is_no_proxy_is_not_believed(home: RunningServer) -> None:
    transport = httpx.HTTPTransport(local_address="127.0.0.2")
    with httpx.Client(base_url=home.url, transport=transport) as http:
        problem(http.get("/state", headers=from_address("10.1.2.3")), 401, "missing_key")
        forged = from_address("10.1.2.3", host="evil.example", proto="https")
        assert http.get("/healthz", headers=forged).status_code == 200


def test_the_proxys_own_address_is_not_trusted_by_itself(home: RunningServer) -> None:
    with http_client(home) as http:
        problem(http.get("/models"), 401, "missing_key")


def test_host_and_scheme_are_the_clients(home: RunningServer) -> None:
    assert home.key is not None
    with http_client(home) as http:
        problem(http.get("/healthz", headers=from_address("10.1.2.3", host="evil.example")), 421)
        told = from_address("10.3.2.3", host="orchestrator.lan", proto="https")
        page = {"Origin": "https://orchestrator.lan", "Sec-Fetch-Site": "same-origin"}
        answer = http.post("/login", data={"key": home.key}, headers=told | page)
        assert answer.status_code == 303
        assert "Secure" in answer.headers["set-cookie"]


def test_a_socket_of_a_trusted_network(home: RunningServer) -> None:
    with connect(socket_url(home), additional_headers=from_address("10.2.2.3")) as ws:
        ws.send("hello")
        assert ws.recv(timeout=5) == "hello"
    with (
        pytest.raises(InvalidStatus),
        connect(socket_url(home), additional_headers=from_address("10.3.2.3")),
    ):
        pass


# --- the first start


def test_the_first_start_beyond_this_machine_makes_a_key_once(tmp_path: Path) -> None:
    with running_server(tmp_path, settings={"host": "0.0.0.0"}) as server:
        file = server.state_dir / "admin.key"
        assert str(file) in server.log()
        assert file.stat().st_mode & 0o777 == 0o600
        with pytest.raises(ApiError, match="needs an API key"):
            server.state()
        server.key = first = file.read_text().strip()
        assert server.state()["models"]
        server.restart()
        assert file.read_text().strip() == first
        with server.client() as client:
            assert [key["name"] for key in client.list_keys()] == ["admin"]
            server.key = client.create_key("mine", ["admin"])["key"]
        with server.client() as client:
            client.revoke_key("admin")
        assert not file.exists()
        assert first not in server.log()


def doctor_says(server: RunningServer) -> dict[str, str]:
    with server.client() as client:
        (check,) = [check for check in client.doctor()["checks"] if check["name"] == "keys"]
    return {"status": check["status"], "found": check["found"]}


def test_doctor_says_who_may_call(server: RunningServer, home: RunningServer, keys: dict[str, str]) -> None:
    assert doctor_says(server)["status"] == "ok"
    assert doctor_says(server)["found"].endswith("every call needs one")
    assert doctor_says(home)["found"] == "1; every call needs one, except from 10.1.0.0/16, 10.2.0.0/16"


# --- never told


def test_no_key_is_ever_told(server: RunningServer, http: httpx.Client, keys: dict[str, str]) -> None:
    """Not in logs, answers, events, the database or a list of processes, whatever it was used for."""
    with server.client() as client:
        keys = keys | {"revoked": client.create_key("to-be-revoked", ["admin"])["key"]}
    with browser(server, keys["admin"]) as logged_in:
        cookie = logged_in.cookies[COOKIE]
        for key in keys.values():
            for shown in (bearer(key), {"X-Api-Key": key}, bearer(key[:-1] + "x"), bearer(key + key)):
                http.post("/v1/chat/completions", json=CHAT, headers=shown)
                http.post("/v1/chat/completions", content=b"{", headers=shown)
                http.get("/upstream/nobody/x", headers=shown)
                http.get("/state", headers=shown)
        with server.client() as client:
            client.revoke_key("to-be-revoked")
        with http.stream("GET", "/events", headers=bearer(keys["admin"])) as answer:
            snapshot = next(events(answer)).data
        places = {
            path: http.get(path, headers=bearer(keys["admin"])).text
            for path in ("/state", "/log?limit=1000", "/doctor", "/keys", "/models", "/logs/alpha", "/readyz")
        }
    places |= {"events": snapshot, "server log": server.log()}
    for file in server.state_dir.rglob("*"):
        if file.is_file():
            places[str(file)] = file.read_text(errors="replace")
    for pid in (server.pid, *server.model_processes()):
        for part in ("cmdline", "environ"):
            places[f"{part} of {pid}"] = Path(f"/proc/{pid}/{part}").read_text(errors="replace")
    secrets = [key.rpartition("_")[2] for key in keys.values()] + [cookie]
    found = [place for place, text in places.items() for secret in secrets if secret in text]
    assert found == []
    assert "refused a key that is not valid" in server.log()
    assert len(places) > 12


BUG = """
import structlog
from orchestrator.log_lines import set_up_logging

set_up_logging("info")
def call(headers):
    raise RuntimeError("a bug")
try:
    call({"authorization": "Bearer " + "-".join(["our", "key"])})
except RuntimeError:
    structlog.get_logger().exception("it failed")
"""


def test_a_bug_does_not_print_what_it_was_called_with() -> None:
    ended = subprocess.run([sys.executable, "-c", BUG], capture_output=True, text=True, check=True)
    assert "RuntimeError: a bug" in ended.stderr
    assert "our-key" not in ended.stderr
