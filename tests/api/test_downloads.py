"""Downloads over HTTP: asked for, joined, followed, cancelled, removed, and gone on with after a kill -9."""

import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from orchestrator.local.demo import make_demo
from tests.api.talk import Event, Watcher, http_client, problem
from tests.hub.server import Hub, hub_server
from tests.server import RunningServer, mimic_service, running_server
from tests.support import eventually

pytestmark = pytest.mark.llama

REPOSITORY = Path(__file__).parents[2]
LLAMA = yaml.safe_load((REPOSITORY / "services" / "llama-cpp" / "service.yaml").read_text())
REPO = "acme/tiny-GGUF"
NAME, FILE = f"{REPO}:Q4_K_M", "tiny-Q4_K_M.gguf"
HALF = 200_000


MODELS = {
    "alpha": {"service": "mimic", "memory": "64MiB"},
    "named": {
        "service": "llama-cpp",
        "memory": "64MiB",
        "source": {"repo": REPO, "file": "*q8_0.gguf"},
        "aliases": ["nm"],
    },
}


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Two real models of the repository, by file name."""
    folder = tmp_path_factory.mktemp("ggufs")
    for name, seed in ((FILE, 7), ("tiny-Q8_0.gguf", 8)):
        make_demo(folder / name, seed)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def running(
    ggufs: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Hub, RunningServer]]:
    services = {"mimic": mimic_service(), "llama-cpp": LLAMA}
    text = yaml.safe_dump({"models": MODELS})
    with hub_server() as hub:
        hub.add(REPO, ggufs)
        with running_server(tmp_path_factory.mktemp("house"), text, services, env=hub.env) as server:
            yield hub, server


@pytest.fixture
def hub(running: tuple[Hub, RunningServer]) -> Hub:
    return running[0]


@pytest.fixture
def server(running: tuple[Hub, RunningServer]) -> Iterator[RunningServer]:
    """Afterwards nothing is loaded, downloaded or in the cache."""
    hub, server = running
    yield server
    hub.forget()
    with http_client(server) as http:
        http.post("/models/unload", json={"model": "named"})
        for model in http.get("/models").json()["data"]:
            if model["can_remove"]:
                assert http.delete("/models", params={"model": model["id"]}).status_code == 200
        shutil.rmtree(server.folder / "huggingface", ignore_errors=True)
        assert http.get("/models?reload=1").status_code == 200


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with http_client(server) as http:
        yield http


def pull(http: httpx.Client, model: str = REPO) -> dict[str, Any]:
    answer = http.post("/models", json={"model": model})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    assert body["success"] is True
    return body["operation"]


def ended(http: httpx.Client, operation: dict[str, Any]) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        view = http.get(f"/operations/{operation['id']}").json()
        return view if view["state"] != "running" else None

    view = eventually(look, timeout_s=30, every_s=0.02)
    assert view is not None
    return view


def status(http: httpx.Client, model: str = NAME) -> dict[str, Any] | None:
    listed = {entry["id"]: entry for entry in http.get("/v1/models").json()["data"]}
    return listed[model]["status"] if model in listed else None


def blobs(server: RunningServer) -> list[Path]:
    return sorted((server.folder / "huggingface").rglob("blobs/*"))


def test_what_was_downloaded_is_a_model_like_any_other(
    http: httpx.Client, server: RunningServer, hub: Hub
) -> None:
    done = ended(http, pull(http))
    assert (done["kind"], done["model"], done["state"]) == ("download", NAME, "succeeded"), done
    assert status(http) == {"value": "unloaded"}
    view = http.get(f"/models/{NAME}").json()
    assert (view["service"], view["aliases"], view["problem"]) == ("llama-cpp", [REPO], None)
    body = {"model": REPO, "max_tokens": 4, "messages": [{"role": "user", "content": "hello"}]}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == NAME
    assert http.get("/models?reload=1").status_code == 200
    assert status(http) == {"value": "loaded"}, "a reload of the files leaves it alone"
    server.restart()
    assert status(http) == {"value": "unloaded", "exit_code": 0}
    assert http.post("/models/load", json={"model": NAME, "wait": True}).status_code == 200
    again = pull(http)
    assert (again["state"], again["message"]) == ("succeeded", f"'{NAME}' is here already and can be loaded.")
    assert len(hub.asked(FILE)) == 1


def test_while_it_comes_it_is_listed_joined_and_not_to_be_loaded(
    http: httpx.Client, hub: Hub, ggufs: dict[str, bytes]
) -> None:
    pause = hub.pause_after(HALF)
    operation = pull(http)
    pause.wait_hit()
    assert pull(http, f"{REPO}:q4_k_m")["id"] == operation["id"]
    assert pull(http)["id"] == operation["id"]
    found = status(http)
    assert found is not None
    assert found["value"] == "downloading"
    total = len(ggufs[FILE])
    assert found["progress"]["total_bytes"] == total
    body = {"model": NAME, "messages": []}
    refused = problem(http.post("/v1/chat/completions", json=body), 503, "model_downloading")
    assert refused["total_bytes"] == total
    problem(http.post("/models/load", json={"model": NAME, "wait": True}), 503, "model_downloading")
    pause.end()
    assert ended(http, operation)["state"] == "succeeded"
    assert http.post("/models/load", json={"model": NAME, "wait": True}).status_code == 200


def test_events_tell_it_as_llama_cpp_does(http: httpx.Client, server: RunningServer, hub: Hub) -> None:
    pause = hub.pause_after(HALF)
    with Watcher(server, "/models/sse") as watcher:
        operation = pull(http)
        pause.wait_hit()
        pause.end()
        ended(http, operation)
        assert http.delete("/models", params={"model": NAME}).status_code == 200
        watcher.wait(lambda events: "model_remove" in words(events))
        told = [event.json() for event in watcher.events]
    assert {event["model"] for event in told} == {NAME}
    statuses = [event["data"] for event in told if event["event"] == "model_status"]
    assert statuses[0]["status"] == "downloading"
    assert 0 <= statuses[0]["progress"]["value"] <= 1
    assert statuses[-1]["status"] == "unloaded"
    assert "loaded" not in [data["status"] for data in statuses]
    assert [word for word in words(watcher.events) if word not in ("model_status", "download_progress")] == [
        "download_finished",
        "model_remove",
    ]


def words(events: list[Event]) -> list[str]:
    return [event.json()["event"] for event in events]


def test_a_cancelled_download_leaves_nothing(http: httpx.Client, server: RunningServer, hub: Hub) -> None:
    pause = hub.pause_after(HALF)
    operation = pull(http)
    pause.wait_hit()
    answer = http.delete("/models", params={"model": REPO})
    assert answer.status_code == 200, answer.text
    assert answer.json()["operation"]["kind"] == "remove"
    cancelled = ended(http, operation)
    assert (cancelled["state"], cancelled["code"]) == ("failed", "download_cancelled")
    assert status(http) is None
    assert blobs(server) == []
    assert server.model_processes() == {}
    problem(http.delete("/models", params={"model": REPO}), 404, "model_not_found")


def test_removing_a_loaded_model_lets_its_requests_end(
    http: httpx.Client, server: RunningServer, hub: Hub
) -> None:
    """Its process stands still meanwhile: a small model would be done before anybody sees it drain."""
    ended(http, pull(http))
    http.post("/models/load", json={"model": NAME, "wait": True}).raise_for_status()
    body = {"model": NAME, "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    with ThreadPoolExecutor() as pool, Watcher(server, "/events") as watcher:
        with frozen(server.model_processes()):
            asked = pool.submit(post_to, server, "/v1/chat/completions", body)
            eventually(lambda: server.model(NAME)["instance"]["in_flight"] == 1)
            removed = pool.submit(delete_of, server, NAME)
            watcher.wait(lambda events: any('"draining"' in e.data for e in events if e.name == "model"))
            assert blobs(server), "its file is still in use"
        assert "data: [DONE]" in asked.result(30).text
        assert removed.result(30).status_code == 200, removed.result().text
    assert blobs(server) == []
    assert status(http) is None


@contextmanager
def frozen(processes: Iterable[int]) -> Iterator[None]:
    pids = list(processes)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def post_to(server: RunningServer, path: str, body: dict[str, Any]) -> httpx.Response:
    with http_client(server) as http:
        return http.post(path, json=body)


def delete_of(server: RunningServer, model: str) -> httpx.Response:
    with http_client(server) as http:
        return http.delete("/models", params={"model": model})


def test_a_source_of_models_yaml_is_downloaded_and_usable_without_a_restart(
    http: httpx.Client, hub: Hub
) -> None:
    before = http.get("/models/named").json()
    assert before["problem"].endswith("get it with: orchestrator pull named.")
    done = ended(http, pull(http, "nm"))
    assert (done["state"], done["model"]) == ("succeeded", "named"), done
    assert http.get("/models/named").json()["problem"] is None
    assert http.post("/models/load", json={"model": "named", "wait": True}).status_code == 200
    assert [model["id"] for model in http.get("/models").json()["data"]] == ["alpha", "named"]
    assert pull(http, "named")["state"] == "succeeded"
    refused = problem(http.delete("/models", params={"model": "named"}), 409, "not_downloadable")
    assert "a file of the catalogue names it" in refused["message"]


def test_a_model_of_models_yaml_needs_no_reload_after_its_files_came_under_another_name(
    http: httpx.Client, server: RunningServer
) -> None:
    ended(http, pull(http, f"{REPO}:Q8_0"))
    assert http.get("/models/named").json()["problem"] is None
    assert http.delete("/models", params={"model": f"{REPO}:Q8_0"}).status_code == 200


def test_files_that_models_yaml_uses_are_kept(http: httpx.Client, server: RunningServer, hub: Hub) -> None:
    ended(http, pull(http, "named"))
    ended(http, pull(http, f"{REPO}:Q8_0"))
    assert len(hub.asked("tiny-Q8_0.gguf")) == 1
    assert http.delete("/models", params={"model": f"{REPO}:Q8_0"}).status_code == 200
    assert http.post("/models/load", json={"model": "named", "wait": True}).status_code == 200


def test_what_would_be_a_model_without_a_possible_name_is_refused(
    http: httpx.Client, server: RunningServer, hub: Hub, ggufs: dict[str, bytes]
) -> None:
    stem = f"tiny-{'x' * 140}"
    hub.add("acme/odd", {f"{stem}.gguf": ggufs[FILE]})
    refused = problem(http.post("/models", json={"model": f"acme/odd:{stem}"}), 409, "not_downloadable")
    assert "name of its own in models.yaml" in refused["message"]
    server.stop()
    server.start()
    assert status(http, "acme/odd") is None
    assert ended(http, pull(http, "acme/odd"))["state"] == "succeeded", "it is the first, which needs no name"


def test_files_of_another_download_are_kept_while_that_one_is_damaged(
    http: httpx.Client, server: RunningServer, hub: Hub, ggufs: dict[str, bytes]
) -> None:
    hub.add("acme/eyes", {**ggufs, "mmproj-F16.gguf": ggufs[FILE] + bytes(32)})
    for quant in ("Q4_K_M", "Q8_0"):
        done = ended(http, pull(http, f"acme/eyes:{quant}"))
        assert done["state"] == "succeeded", done
    (damaged,) = server.folder.rglob("models--acme--eyes/**/tiny-Q8_0.gguf")
    damaged.resolve().write_bytes(b"no GGUF")
    assert http.get("/models?reload=1").status_code == 200
    assert http.get("/models/acme/eyes:Q8_0").json()["problem"]
    assert http.delete("/models", params={"model": "acme/eyes:Q4_K_M"}).status_code == 200
    assert damaged.with_name("mmproj-F16.gguf").exists()
    assert not damaged.with_name(FILE).exists()


@pytest.mark.parametrize(
    ("model", "status", "code"),
    [
        ("alpha", 409, "not_downloadable"),
        ("acme/absent", 404, "repository_not_found"),
        ("nonsense", 404, "repository_not_found"),
        (f"{REPO}:Q5_K_M", 404, "quant_not_found"),
        ("acme/gated", 409, "repository_gated"),
    ],
)
def test_refusals(http: httpx.Client, hub: Hub, model: str, status: int, code: str) -> None:
    hub.add("acme/gated", {FILE: b"x"}, gated=True)
    problem(http.post("/models", json={"model": model}), status, code)


def test_a_full_disk_is_refused_with_numbers(http: httpx.Client, hub: Hub) -> None:
    hub.add("acme/huge", {"huge-Q4_K_M.gguf": 2**42})
    refused = problem(http.post("/models", json={"model": "acme/huge"}), 507, "disk_full")
    assert "needs 4096 GiB in " in refused["message"]


def test_what_fails_on_its_way_says_why_and_can_be_asked_for_again(http: httpx.Client, hub: Hub) -> None:
    hub.corrupt(FILE)
    failed = ended(http, pull(http))
    assert (failed["state"], failed["code"]) == ("failed", "checksum_mismatch")
    assert status(http) is None
    assert ended(http, pull(http))["state"] == "succeeded"
    kinds = [event["kind"] for event in http.get("/log", params={"model": NAME}).json()["events"]]
    assert [kind for kind in kinds if kind.startswith("download")][-4:] == [
        "downloading",
        "download_failed",
        "downloading",
        "downloaded",
    ]


@pytest.mark.parametrize("count", [HALF, 100])
def test_a_download_outlives_kill_9(http: httpx.Client, server: RunningServer, hub: Hub, count: int) -> None:
    pause = hub.pause_after(count, times=2)
    operation = pull(http)
    pause.wait_hit()
    eventually(lambda: [path.stat().st_size for path in blobs(server)] == [count])
    server.kill()
    eventually(lambda: not server.model_processes(), every_s=0.02)
    pause.end()
    server.restart()
    assert ended(http, operation)["state"] == "succeeded", "under the same operation id"
    assert [asked.first_byte for asked in hub.asked(FILE)] == [0, count]
    assert http.post("/models/load", json={"model": NAME, "wait": True}).status_code == 200


def test_a_removal_outlives_kill_9(http: httpx.Client, server: RunningServer, hub: Hub) -> None:
    """Killed when it was promised and not done: here by hand, as the row has it then."""
    ended(http, pull(http))
    server.stop()
    with sqlite3.connect(server.settings["database"]) as database:
        database.execute("UPDATE download SET state = 'removing'")
    server.start()
    eventually(lambda: not blobs(server))
    assert status(http) is None
    assert json.loads(server.run("ps", "--json").stdout)["models"]
