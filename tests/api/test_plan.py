"""POST /plan: what a load would do, and that asking does nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.talk import Watcher, http_client, problem
from tests.estimate.ggufs import llama
from tests.server import RunningServer, mimic_service, running_server

ROOM_MIB = 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("plan")
    long = {"service": "predicted", "memory": None, "path": str(llama(folder / "long.gguf"))}
    models: dict[str, Any] = {
        "alpha": {"memory": "600MiB", "aliases": ["al"]},
        "beta": {"memory": "600MiB"},
        "small": {"memory": "64MiB"},
        "huge": {"memory": "64GiB"},
        "long": long | {"context_size": 851968},
        "auto": long | {"context_size": "auto"},
        "wide": {"memory": "800MiB"},
        "lost": long | {"path": str(folder / "nowhere.gguf")},
    }
    told = {name.upper(): f"{{{name}}}" for name in ("context_size", "cache_type_k", "cache_type_v")}
    services = {"mimic": mimic_service(), "predicted": mimic_service(memory="gguf", environment=told)}
    with running_server(folder, models, services, {"host_memory_mib": ROOM_MIB}) as server:
        yield server


def plan(http: httpx.Client, name: str) -> dict[str, Any]:
    answer = http.post("/plan", json={"load": name})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refusal_of_a_load(http: httpx.Client, name: str) -> dict[str, Any]:
    """The error that a load is really answered, as a plan has it."""
    answer = http.post("/models/load", json={"model": name, "wait": True})
    error = problem(answer, answer.status_code)
    return {"status": answer.status_code} | {k: v for k, v in error.items() if k not in ("type", "param")}


def test_one_that_fits(http: httpx.Client) -> None:
    found = plan(http, "small")
    assert (found["model"], found["state"], found["outcome"]) == ("small", "stopped", "starts")
    (device,) = found["devices"]
    assert (device["id"], device["index"], device["takes_mib"]) == ("host", None, 64)
    assert device["available_mib"] - device["available_after_mib"] == 64
    assert device["capacity_mib"] == ROOM_MIB
    footprint = {"gpu_mib": 64, "host_mib": 0, "source": "declared", "breakdown": {}, "is_least": False}
    assert found["footprint"] == footprint
    assert (found["evictions"], found["waits_for"]) == ([], None)
    assert "refusal" not in found


def test_who_would_leave_and_that_asking_moves_nobody(server: RunningServer) -> None:
    with server.client() as client, http_client(server) as http, Watcher(server, "/events") as told:
        client.load("alpha", wait=True)
        told.wait(lambda events: any(e.name == "log" and e.json()["kind"] == "ready" for e in events))
        before, lines = client.state(), client.log()
        heard = len(told.events)
        for _ in range(20):
            found = plan(http, "beta")
        after = client.state()
        assert (found["outcome"], [e["model"] for e in found["evictions"]]) == ("waits", ["alpha"])
        (eviction,) = found["evictions"]
        assert eviction["frees_mib"] == {"host": 600}
        assert (eviction["in_flight"], eviction["priority"]) == (0, 50)
        assert eviction["why"].startswith("idle for ")
        assert found["waits_for"] == "'alpha' to leave, and the memory to be seen free"
        assert found["message"] == "'beta' would start once 'alpha' had left."
        assert [m["state"] for m in after["models"]] == [m["state"] for m in before["models"]]
        assert (after["queue"], after["instances"][0]["requests"]) == ([], 0)
        assert after["instances"][0]["idle_s"] >= before["instances"][0]["idle_s"]
        assert client.log() == lines
        assert len(told.events) == heard
        assert plan(http, "al")["outcome"] == "loaded"
        client.unload("alpha")


def test_a_refusal_is_that_of_a_load(http: httpx.Client) -> None:
    found = plan(http, "huge")
    assert (found["outcome"], found["would_fit"]) == ("refused", [])
    assert found["refusal"] == refusal_of_a_load(http, "huge")
    assert (found["refusal"]["code"], found["refusal"]["status"]) == ("cannot_ever_fit", 409)
    assert found["message"] == found["refusal"]["message"]


def test_what_would_fit_where_the_file_tells(http: httpx.Client) -> None:
    found = plan(http, "long")
    assert found["refusal"] == refusal_of_a_load(http, "long")
    assert found["footprint"]["source"] == "predicted"
    assert found["footprint"]["breakdown"]["host"]["kv_cache"] == 208
    context, cache = found["would_fit"]
    assert context["context_size"] == 262144
    assert cache["cache_type_k"] == cache["cache_type_v"] == "q8_0"
    for one in (context, cache):
        assert one["gpu_mib"] == 0
        assert 64 < one["needs_mib"] == one["host_mib"] < ROOM_MIB


def test_a_model_without_its_file_is_unusable(http: httpx.Client) -> None:
    found = plan(http, "lost")
    assert found["refusal"] == refusal_of_a_load(http, "lost")
    assert (found["refusal"]["code"], found["would_fit"]) == ("model_unusable", [])


def test_what_cannot_be_planned(http: httpx.Client) -> None:
    error = problem(http.post("/plan", json={"load": "nope"}), 404, "model_not_found")
    assert error["param"] == "load"
    error = problem(http.post("/plan", json={}), 400, "invalid_value")
    assert error["param"] == "load"
    error = problem(http.post("/plan", json={"load": "small", "lease": {"memory_mib": 100}}), 400)
    assert error["param"] == "lease"
    assert "no leases yet" in error["message"]
    assert problem(http.get("/plan"), 405)


def test_the_scope_is_that_of_leases(tmp_path: Path) -> None:
    with running_server(tmp_path, {"small": {}}) as server:
        with server.client() as client:
            server.key = client.create_key("boss", ["admin"])["key"]
        with server.client() as client:
            keys = {name: client.create_key(name, [name])["key"] for name in ("lease", "inference")}
        for name, status in {"lease": 200, "inference": 403}.items():
            with http_client(server, key=keys[name]) as http:
                assert http.post("/plan", json={"load": "small"}).status_code == status


# --- what is left to us


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def test_the_context_is_chosen_when_the_model_is_placed(server: RunningServer) -> None:
    """All that it was trained for where there is room, less beside others: told before, given, and shown."""
    with server.client() as client, http_client(server) as http:
        assert plan(http, "auto")["parameters"] == {"context_size": 262144}
        client.load("wide", wait=True)
        found = plan(http, "auto")
        assert (found["outcome"], found["evictions"]) == ("starts", [])
        assert found["parameters"] == {"context_size": 131072}
        assert found["footprint"]["breakdown"]["host"]["kv_cache"] == 32
        client.load("auto", wait=True)
        (line,) = (event["text"] for event in client.log(model="auto") if event["kind"] == "starting")
        assert line.endswith(f"({found['devices'][0]['takes_mib']} MiB) with context_size 131072")
        client.unload("wide")
        view = client.model("auto")
        assert (view["state"], view["instance"]["parameters"]) == ("ready", {"context_size": 131072})
        assert {environment_of(pid)["CONTEXT_SIZE"] for pid in server.model_processes()} == {"131072"}
        assert "· auto runs with context_size: 131072" in server.run("ps").stdout
        client.unload("auto")
        client.load("auto", wait=True)
        assert client.model("auto")["instance"]["parameters"] == {"context_size": 262144}
        client.unload("auto")
