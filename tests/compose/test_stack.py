"""The first evening: compose brings everything up, and the house talks to it through Caddy."""

import json
import re
import shlex
import ssl
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from orchestrator.catalogue.shared_cache import IMAGE
from tests.compose.stack import ADMIN_KEY, HOSTS, REPO, Stack, running_stack, salad_hub
from tests.images.build import build_base
from tests.support import eventually

pytestmark = [pytest.mark.docker, pytest.mark.llama]

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
UNLOAD = """
import requests
answer = requests.post("http://orchestrator.lan/models/unload", json={"model": "salad"})
print(answer.text)
"""
REACH = """
import socket
for host, port in (("socket-proxy", 2375), ("orchestrator", 8000)):
    try:
        socket.create_connection((host, port), timeout=3).close()
        print(host, "reached")
    except OSError:
        print(host, "not reached")
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    with salad_hub(folder) as hub, running_stack(folder, hub) as stack:
        yield stack


@pytest.fixture
def loaded(stack: Stack) -> Stack:
    for model in ("salad", "mimic"):
        answer = stack.ask("POST", f"{stack.http}/models/load", json={"model": model, "wait": True})
        assert answer.status_code == 200, answer.text
    return stack


def docker(*words: str) -> str:
    """What a docker command prints. Raises AssertionError if it fails."""
    done = subprocess.run(["docker", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


# --- through the door


def test_plain_http_answers_on_names_and_on_the_bare_address(stack: Stack) -> None:
    for host in HOSTS:
        answer = stack.ask("GET", f"{stack.http}/health", host)
        assert answer.status_code == 200
        assert answer.json() == {"status": "ok"}
    assert stack.ask("GET", f"{stack.http}/health", "evil.example").status_code == 421


def test_https_answers_with_the_installations_own_authority(stack: Stack) -> None:
    for host in HOSTS:
        assert stack.ask("GET", f"{stack.https}/health", host).status_code == 200
    assert stack.ask("GET", f"{stack.https}/ca.crt").text == stack.authority()
    assert "BEGIN CERTIFICATE" in stack.authority()


def test_a_strangers_name_gets_no_certificate(stack: Stack) -> None:
    for host in ("evil.example", "x1.localhost"):
        with pytest.raises(httpx.ConnectError):
            stack.ask("GET", f"{stack.https}/health", host)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_chat_loads_the_model(stack: Stack, scheme: str) -> None:
    url = {"http": stack.http, "https": stack.https}[scheme]
    answer = stack.ask("POST", f"{url}/v1/chat/completions", "llama.lan", json={"model": "salad", **CHAT})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"


def test_a_person_looks_into_the_container_by_its_name(loaded: Stack) -> None:
    log = docker("logs", loaded.name)
    assert "listening on" in log
    folder = f"/data/.huggingface/hub/models--{REPO.replace('/', '--')}/"
    assert "snapshots" in docker("exec", loaded.name, "ls", "-la", folder)


def test_the_services_own_name_needs_no_model_and_has_its_metrics(loaded: Stack) -> None:
    answer = loaded.ask("POST", f"{loaded.http}/v1/chat/completions", "llama.lan", json=CHAT)
    assert answer.status_code == 200, answer.text
    listed = loaded.ask("GET", f"{loaded.https}/v1/models", "llama.lan").json()["data"]
    assert [model["id"] for model in listed] == ["salad"]
    assert loaded.ask("GET", f"{loaded.https}/metrics", "llama.lan").status_code == 200


def test_a_stream_is_not_buffered(loaded: Stack) -> None:
    """The first token is here long before the last is said, and a client that leaves is missed at once."""
    endless = {"max_tokens": 100_000, "mimic": {"tokens": 100_000, "tokens_per_s": 50}}
    body = {**CHAT, "model": "mimic", "stream": True, **endless}
    url = f"{loaded.https}/v1/chat/completions"

    def in_flight() -> int:
        return int(loaded.ask("GET", f"{loaded.http}/models/mimic").json()["instance"]["in_flight"])

    with loaded.client("orchestrator.lan") as http, http.stream("POST", url, json=body) as answer:
        lines = answer.iter_lines()  # whoever lets go of these has left
        assert next(lines).startswith("data: ")
        assert in_flight() == 1
    eventually(lambda: in_flight() == 0)


def test_a_websocket_passes(loaded: Stack) -> None:
    trust = ssl.create_default_context(cadata=loaded.authority())
    url = loaded.https.replace("https", "wss") + "/upstream/mimic/ws"
    key = {"X-Api-Key": loaded.key}
    with connect(url, ssl=trust, server_hostname="127.0.0.1", additional_headers=key, proxy=None) as socket:
        socket.send("hello")
        assert socket.recv(timeout=10) == "hello"


# --- inside


def test_another_container_unloads_by_name(loaded: Stack) -> None:
    """Without a key, since its network is trusted."""
    told = json.loads(loaded.run_inside(UNLOAD))
    assert told["success"] is True
    assert loaded.ask("GET", f"{loaded.http}/models/salad").json()["state"] == "stopped"


def test_others_need_the_key_that_the_first_start_has_made(stack: Stack) -> None:
    """This machine is beside the trusted network: as Docker's gateway, through a proxy that is in it."""
    bare = httpx.post(f"{stack.http}/models/unload", json={"model": "salad"}, trust_env=False)
    assert (bare.status_code, bare.json()["error"]["code"]) == (401, "missing_key")
    wrong = stack.ask("GET", f"{stack.http}/models", headers={"X-Api-Key": f"{stack.key}0"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_key")
    assert stack.orchestrator("stat", "-c", "%a %u", ADMIN_KEY).split() == ["600", "1000"]


def test_only_the_orchestrator_reaches_the_socket_proxy(loaded: Stack) -> None:
    assert loaded.run_inside(REACH) == "socket-proxy not reached\norchestrator reached\n"
    _, output = loaded.model_container("mimic").exec_run(["python3", "-c", REACH])
    assert output.decode() == "socket-proxy not reached\norchestrator reached\n"
    networks = {
        s: set(loaded.container(s).attrs["NetworkSettings"]["Networks"]) for s in ("caddy", "socket-proxy")
    }
    assert networks == {"caddy": {f"{loaded.name}_front"}, "socket-proxy": {f"{loaded.name}_control"}}


def test_memory_is_told_apart_in_a_container_too(loaded: Stack) -> None:
    """Which takes the machine's own process ids."""
    (device,) = loaded.ask("GET", f"{loaded.http}/devices").json()["devices"]
    assert device["attributed"] is True

    def used_mib() -> int:
        memory = loaded.ask("GET", f"{loaded.http}/models/salad").json()["instance"]["memory"]
        return int(memory["host"]["used_mib"])

    assert eventually(used_mib) < 256


def test_nothing_of_ours_runs_as_root_with_rights(stack: Stack) -> None:
    for service in ("orchestrator", "caddy", "socket-proxy"):
        attrs = stack.container(service).attrs
        host = attrs["HostConfig"]
        assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["Privileged"], service
        assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert stack.container("orchestrator").attrs["Config"]["User"] == "1000:1000"
    code, output = stack.container("orchestrator").exec_run(["healthy"])
    assert code == 0, output.decode()
    code, output = stack.container("orchestrator").exec_run(["orchestrator", "ps"])
    assert code == 0, output.decode()


def test_doctor_says_how_to_get_the_cache_back_from_root(stack: Stack) -> None:
    def cache() -> dict[str, str]:
        checks = stack.ask("GET", f"{stack.http}/doctor").json()["checks"]
        return next(check for check in checks if check["name"] == "models' cache")

    assert cache()["status"] == "ok", cache()
    mounts = {stack.volume: {"bind": "/v", "mode": "rw"}}
    folder = "/v/hub/models--of--root/blobs"
    stack.docker.containers.run(build_base(), ["mkdir", "-p", folder], volumes=mounts, remove=True)
    assert cache()["status"] == "warning"
    assert "hub/models--of--root (of 0:0)" in cache()["found"]
    (command,) = re.findall("`(.*)`", cache()["advice"])
    command = command.replace(IMAGE, stack.env["ORCHESTRATOR_IMAGE"])
    assert stack.volume in command
    subprocess.run(shlex.split(command), check=True)
    assert cache()["status"] == "ok", cache()


def test_models_outlive_the_orchestrator(loaded: Stack) -> None:
    """As `docker compose pull && docker compose up -d` does it."""
    orchestrator, model = loaded.container("orchestrator").id, loaded.model_container("salad").id
    recreated = threading.Thread(target=loaded.up, args=("--force-recreate", "--no-deps", "orchestrator"))
    recreated.start()
    with loaded.client() as http:
        while recreated.is_alive():
            assert http.get(f"{loaded.http}/healthz").status_code == 200, "Caddy holds requests meanwhile"
    assert loaded.container("orchestrator").id != orchestrator
    assert loaded.model_container("salad").id == model
    assert loaded.ask("GET", f"{loaded.http}/models/salad").json()["state"] == "ready"
    answer = loaded.ask("POST", f"{loaded.https}/v1/chat/completions", json={"model": "salad", **CHAT})
    assert answer.status_code == 200, answer.text
    assert loaded.model_container("salad").id == model
