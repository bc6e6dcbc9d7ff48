"""Looking at the server: changes without a gap, operations, logs, state, health, its own description."""

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from orchestrator.api.gateway import LLAMA_PATHS, LOOKS
from tests.api.talk import Event, Watcher, events, http_client, problem
from tests.server import RunningServer, running_server
from tests.support import eventually


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    models: dict[str, Any] = {
        "alpha": {"environment": {"MIMIC_RAM_MIB": "40"}},
        "beta": {},
        "loading": {"environment": {"MIMIC_NEVER_HEALTHY": "1"}},
        "broken": {"environment": {"MIMIC_START": "exit:3:no such tensor"}},
        "slow": {"environment": {"MIMIC_LOAD_S": "2"}},
        "untouched": {},
    }
    with running_server(tmp_path_factory.mktemp("events"), models) as server:
        yield server


def tell(http: httpx.Client, call: str, **body: Any) -> dict[str, Any]:
    answer = http.post(f"/models/{call}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ids_of(found: list[Event]) -> list[int]:
    return [int(event.id or "-1") for event in found]


def states_of(found: list[Event], model: str) -> list[str]:
    views = [event.json() for event in found if event.name == "model"]
    return [view["state"] for view in views if view["id"] == model]


def has_state(model: str, state: str) -> Any:
    return lambda found: states_of(found, model)[-1:] == [state]


# --- /events


def test_a_snapshot_first_and_then_changes_with_growing_ids(
    server: RunningServer, http: httpx.Client
) -> None:
    with Watcher(server, "/events") as watch:
        first = watch.events[0]
        assert first.name == "snapshot"
        assert {"alpha", "beta"} <= {model["id"] for model in first.json()["models"]}
        load = tell(http, "load", model="beta", wait=True)["operation"]
        watch.wait(has_state("beta", "ready"))
        tell(http, "unload", model="beta")
        watch.wait(has_state("beta", "stopped"))
        found = list(watch.events)
    ids = ids_of(found)
    assert ids[1:] == sorted(set(ids[1:]))
    assert ids[1] > ids[0]
    assert {event.name for event in found[1:]} == {"model", "operation", "log"}
    operations = [event.json() for event in found if event.name == "operation"]
    told = [operation["state"] for operation in operations if operation["id"] == load["id"]]
    assert (told[0], told[-1]) == ("running", "succeeded")
    seen = states_of(found, "beta")
    assert [state for state in ("starting", "ready", "stopping", "stopped") if state in seen] == [
        "starting",
        "ready",
        "stopping",
        "stopped",
    ]


def test_a_client_that_comes_back_has_missed_nothing(server: RunningServer, http: httpx.Client) -> None:
    with Watcher(server, "/events") as whole:
        with Watcher(server, "/events") as watch:
            tell(http, "load", model="beta", wait=True)
            watch.wait(has_state("beta", "ready"))
            before = list(watch.events)
        tell(http, "unload", model="beta")  # while nobody of it watches
        with Watcher(server, "/events", last_id=before[-1].id) as again:
            tell(http, "load", model="beta", wait=True)
            again.wait(has_state("beta", "ready"))
            after = list(again.events)
        last = after[-1].id
        whole.wait(lambda found: last in [event.id for event in found])
        expected = list(whole.events)
    assert after[0].name != "snapshot"
    resumed = ids_of(before)[1:] + ids_of(after)
    assert resumed == [number for number in ids_of(expected)[1:] if number <= int(last or 0)]
    tell(http, "unload", model="beta")


def test_an_id_from_another_life_begins_with_a_snapshot(server: RunningServer) -> None:
    with Watcher(server, "/events", last_id="999999") as watch:
        assert watch.events[0].name == "snapshot"


def test_one_who_only_watches_loads_nothing(server: RunningServer, http: httpx.Client) -> None:
    def running() -> list[str]:
        return [instance["attempt"] for instance in http.get("/state").json()["instances"]]

    before = running()
    with Watcher(server, "/events"), Watcher(server, "/models/sse"):
        assert running() == before


# --- operations


def test_an_operation_on_its_way(http: httpx.Client) -> None:
    operation = tell(http, "load", model="loading")["operation"]
    path = f"/operations/{operation['id']}"
    view = eventually(lambda: (found := http.get(path).json()).get("phase") == "starting" and found)
    assert (view["kind"], view["model"], view["state"]) == ("load", "loading", "running")
    assert view["ended_at"] is None
    assert 0 <= view["progress"]["value"] < 1
    unload = tell(http, "unload", model="loading")["operation"]
    view = http.get(path).json()
    assert (view["state"], view["code"]) == ("failed", "model_unloaded")
    assert view["ended_at"] >= view["created_at"]
    assert http.get(f"/operations/{unload['id']}").json()["state"] == "succeeded"


def test_an_operation_that_failed_says_why(http: httpx.Client) -> None:
    operation = tell(http, "load", model="broken")["operation"]
    path = f"/operations/{operation['id']}"
    view = eventually(lambda: (found := http.get(path).json())["ended_at"] and found)
    assert view["state"] == "failed"
    assert "no such tensor" in view["message"]


def test_an_operation_that_never_was(http: httpx.Client) -> None:
    error = problem(http.get("/operations/op-none-1"), 404, "operation_not_found")
    assert "op-none-1" in error["message"]


# --- the event log


def test_the_log_tells_what_happened_and_why(http: httpx.Client) -> None:
    tell(http, "load", model="beta", wait=True)
    tell(http, "unload", model="beta")

    def kinds() -> list[str]:
        return [event["kind"] for event in http.get("/log?model=beta&limit=4").json()["events"]]

    eventually(lambda: kinds() == ["starting", "ready", "stopping", "freed"])
    found = http.get("/log?model=beta&limit=1000").json()["events"]
    assert {event["model"] for event in found} == {"beta"}
    assert [event["id"] for event in found] == sorted(event["id"] for event in found)
    assert all(event["attempt"] and event["at"] > 1_600_000_000 for event in found[-4:])
    assert "unloaded by request" in found[-2]["text"]
    assert len(http.get("/log?limit=2").json()["events"]) == 2


# --- logs of models


def test_the_log_of_a_model_has_a_tail(http: httpx.Client) -> None:
    tell(http, "load", model="beta", wait=True)
    whole = http.get("/logs/beta")
    assert whole.headers["content-type"].startswith("text/plain")
    lines = whole.text.splitlines()
    assert lines[-1] == "ready"
    assert http.get("/logs/beta?tail=1").text.splitlines() == ["ready"]
    assert http.get("/logs/beta?tail=0").text == ""
    attempt = http.get("/models/beta").json()["instance"]["attempt"]
    assert http.get(f"/logs/beta?attempt={attempt}").text == whole.text
    tell(http, "unload", model="beta")
    assert http.get("/logs/beta").text.splitlines()[-1] == "stopping"  # still there


def test_a_log_is_followed_until_the_model_ends(server: RunningServer, http: httpx.Client) -> None:
    tell(http, "load", model="beta", wait=True)
    lines: list[str] = []
    begun = threading.Event()

    def follow() -> None:
        with http_client(server) as other, other.stream("GET", "/logs/beta?follow=true&tail=1") as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    following = threading.Thread(target=follow)
    following.start()
    assert begun.wait(10)
    assert lines == ["ready"]
    http.get("/upstream/beta/echo").raise_for_status()
    eventually(lambda: "request GET /echo" in lines)
    tell(http, "unload", model="beta")
    following.join(10)
    assert not following.is_alive(), "the stream did not end with the model"
    assert lines[-1] == "stopping"


def test_a_log_of_a_failed_attempt(server: RunningServer, http: httpx.Client) -> None:
    answer = http.post("/models/load", json={"model": "broken", "wait": True})
    assert answer.status_code == 503
    for query in ("", "?tail=1", "?follow=true"):
        assert "no such tensor" in http.get(f"/logs/broken{query}").text


def test_no_log_yet(http: httpx.Client) -> None:
    error = problem(http.get("/logs/untouched"), 404, "no_log")
    assert "untouched" in error["message"]


# --- state


def test_the_state_is_of_one_moment_and_adds_up(server: RunningServer, http: httpx.Client) -> None:
    empty = http.get("/state").json()
    tell(http, "load", model="alpha", wait=True)

    def measured() -> dict[str, Any] | None:
        found: dict[str, Any] = http.get("/state").json()
        [host] = found["devices"]
        return found if host["used_mib"] >= 40 else None

    state = eventually(measured)
    assert state["version"] > empty["version"]
    assert 0 <= state["sample_age_s"] < 3
    [host] = state["devices"]
    [holder] = host["holders"]
    [instance] = state["instances"]
    model = next(found for found in state["models"] if found["id"] == "alpha")
    assert (host["id"], host["kind"], host["capacity_mib"]) == ("host", "host", 1024)
    assert (holder["holder"], holder["reserved_mib"]) == ("alpha", 64)
    assert holder["used_mib"] == instance["memory"]["host"]["used_mib"] >= 40
    assert host["reserved_mib"] == 64
    assert host["kept_back_mib"] == pytest.approx(64 - holder["used_mib"], abs=1)
    expected = host["free_mib"] - host["headroom_mib"] - host["kept_back_mib"]
    assert host["available_mib"] == pytest.approx(expected, abs=1)
    assert model["instance"]["attempt"] == instance["attempt"]
    assert (instance["model"], instance["state"], model["state"]) == ("alpha", "ready", "ready")
    assert model["status"] == {"value": "loaded"}
    assert state["leases"] == state["queue"] == []
    [device] = http.get("/devices").json()["devices"]
    assert device.keys() == host.keys()
    assert device["reserved_mib"] == 64
    tell(http, "unload", model="alpha")
    eventually(lambda: http.get("/devices").json()["devices"][0]["reserved_mib"] == 0)


def test_a_model_by_itself_is_what_the_state_says(http: httpx.Client) -> None:
    state = {model["id"]: model for model in http.get("/state").json()["models"]}
    one = http.get("/models/loading").json()
    assert one == state["loading"]
    assert one["footprint"]["source"] == "declared"


def test_who_waits_is_in_the_queue(http: httpx.Client, server: RunningServer) -> None:
    tell(http, "load", model="loading")
    [entry] = http.get("/state").json()["queue"]
    assert (entry["model"], entry["waiting"]) == ("loading", 1)
    assert entry["for_s"] >= 0
    tell(http, "unload", model="loading")
    assert http.get("/state").json()["queue"] == []


# --- health


def test_ready_says_what_it_checked(http: httpx.Client) -> None:
    answer = http.get("/readyz")
    assert answer.status_code == 200
    body = answer.json()
    assert body["ready"] is True
    assert body["checks"] == {"engine": "ok", "devices": "ok", "store": "ok"}
    assert any("process" in line for line in body["found"])
    assert http.get("/healthz").json() == http.get("/health").json() == {"status": "ok"}


def test_doctor_says_what_was_found(http: httpx.Client) -> None:
    body = http.get("/doctor").json()
    assert body["ok"] is True
    names = [check["name"] for check in body["checks"]]
    for name in ("choice", "engine process", "store", "catalogue"):
        assert name in names
    assert any(name.startswith("device ") for name in names)
    assert all(check["found"] for check in body["checks"])
    assert {check["status"] for check in body["checks"]} <= {"ok", "warning", "bad"}


def test_doctor_names_the_model_that_failed(http: httpx.Client) -> None:
    http.post("/models/load", json={"model": "broken", "wait": True})
    checks = {check["name"]: check for check in http.get("/doctor").json()["checks"]}
    assert checks["model broken"]["status"] == "warning"
    assert "logs broken" in checks["model broken"]["advice"]


def test_doctor_names_a_catalogue_that_could_not_be_read(server: RunningServer, http: httpx.Client) -> None:
    file = server.folder / "models.yaml"
    before = file.read_text()
    file.write_text("models:\n  alpha: {service: mimic, memory: lots}\n  beta: {servis: mimic}\n")
    try:
        error = problem(http.get("/models?reload=1"), 409, "catalogue_invalid")
        assert "memory" in error["message"]
        checks = {check["name"]: check for check in http.get("/doctor").json()["checks"]}
        assert checks["catalogue, last reload"]["status"] == "bad"
        assert len(http.get("/models").json()["data"]) == 6
        told = [line for line in server.log().splitlines() if "the catalogue stays as it was" in line]
        for line, wrong in zip(
            told[-3:], (".alpha.memory: got ", ".beta.service: ", ".beta.servis: "), strict=True
        ):
            assert f"models.yaml, line {2 if 'alpha' in wrong else 3}: models{wrong}" in line
            assert "\\n" not in line
    finally:
        file.write_text(before)
    http.get("/models?reload=1").raise_for_status()
    assert http.get("/doctor").json()["ok"] is True


@pytest.mark.parametrize("is_deleted", [False, True])
def test_a_catalogue_that_is_emptied_or_deleted_ends_no_model(
    server: RunningServer, http: httpx.Client, is_deleted: bool
) -> None:
    server.load("alpha")
    attempt = server.model("alpha")["instance"]["attempt"]
    file = server.folder / "models.yaml"
    before = file.read_text()
    if is_deleted:
        file.unlink()
    else:
        file.write_text("")
    try:
        error = problem(http.get("/models?reload=1"), 409, "catalogue_invalid")
        assert ("no such file" if is_deleted else "'models: {}'") in error["message"]
        assert len(http.get("/models").json()["data"]) == 6
        assert server.model("alpha")["instance"]["attempt"] == attempt
    finally:
        file.write_text(before)
    http.get("/models?reload=1").raise_for_status()
    assert server.model("alpha")["instance"]["attempt"] == attempt
    server.unload("alpha")


def test_a_reload_counts_in_the_very_answer(server: RunningServer, http: httpx.Client) -> None:
    file = server.folder / "models.yaml"
    before = file.read_text()
    file.write_text("models: {alone: {service: mimic, memory: 1MiB}}\n")
    try:
        listed = http.get("/models?reload=1").json()["data"]
        assert [model["id"] for model in listed] == ["alone"]
    finally:
        file.write_text(before)
    assert "alpha" in [model["id"] for model in http.get("/models?reload=1").json()["data"]]


# --- its own description


def operations_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_every_operation_is_described(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    operations = operations_of(document)
    assert {"POST /models/load", "POST /models/unload", "GET /events", "GET /state"} <= set(operations)
    assert {"POST /v1/chat/completions", "DELETE /upstream/{model}/{path}"} <= set(operations)
    assert {f"POST {path}" for path in LLAMA_PATHS - LOOKS} <= set(operations)
    assert not any("422" in operation["responses"] for operation in operations.values())
    for name, operation in operations.items():
        assert len(operation.get("summary", "")) > 5, name
        assert operation["tags"], name
    assert len({operation["operationId"] for operation in operations.values()}) == len(operations)
    assert document["info"]["description"]
    assert re.fullmatch(r"\d+\.\d+.*", document["info"]["version"])


def test_examples_are_valid(http: httpx.Client) -> None:
    """Each example in the document is what its own schema allows, as the server itself judges it."""
    from orchestrator.api.models import LoadRequest, UnloadRequest

    schemas = http.get("/openapi.json").json()["components"]["schemas"]
    for kind in (LoadRequest, UnloadRequest):
        properties = schemas[kind.__name__]["properties"]
        examples = {name: given["examples"][0] for name, given in properties.items() if given.get("examples")}
        assert "model" in examples
        assert kind.model_validate(examples).model == examples["model"]
        assert all(given.get("description") for given in properties.values())


def needs_more(operation: dict[str, Any]) -> bool:
    return any(parameter.get("required") for parameter in operation.get("parameters", []))


def test_what_is_documented_is_there(http: httpx.Client) -> None:
    """Every documented GET without parameters that it must have answers."""
    for name, operation in operations_of(http.get("/openapi.json").json()).items():
        method, path = name.split()
        if method == "GET" and not needs_more(operation):
            with http.stream("GET", path) as answer:
                assert answer.status_code == 200, name
                if answer.headers["content-type"].startswith("text/event-stream"):
                    assert next(events(answer))
    assert "/docs" in http.get("/docs").url.path
    assert http.get("/docs").status_code == 200


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_the_pages_of_the_api_need_no_internet(http: httpx.Client, page: str) -> None:
    text = http.get(page).text
    needed = re.findall(r'<(?:script|link)[^>]* (?:src|href)="([^"]+)"', text)
    assert any(path.endswith(".js") for path in needed)
    for path in needed:
        assert path.startswith("/"), "it would come from somebody else"
        assert http.get(path).status_code == 200
    assert http.get("/openapi.json").status_code == 200


# --- over restarts, and last: ids and attempts begin anew


@dataclass
class Lives:
    """What was known of these operations before the server was stopped, and is known now."""

    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    cut_off: dict[str, Any]
    cut_off_state: str


@pytest.fixture(scope="module")
def lives(server: RunningServer) -> Lives:
    with http_client(server) as http:
        load = tell(http, "load", model="alpha", wait=True)["operation"]
        unload = tell(http, "unload", model="alpha")["operation"]
        failed = tell(http, "load", model="broken")["operation"]
        keys = [operation["id"] for operation in (load, unload, failed)]
        eventually(lambda: http.get(f"/operations/{failed['id']}").json()["ended_at"])
        before = [http.get(f"/operations/{key}").json() for key in keys]
        cut_off = tell(http, "load", model="loading")["operation"]["id"]
        eventually(lambda: http.get(f"/operations/{cut_off}").json().get("phase") == "starting")
    server.restart()
    with http_client(server) as http:
        after = [http.get(f"/operations/{key}").json() for key in keys]
        again = http.get(f"/operations/{cut_off}").json()
        return Lives(before, after, again, server.wait_state("loading", "starting")["state"])


def test_operations_are_remembered_over_a_restart(lives: Lives) -> None:
    assert [view["state"] for view in lives.before] == ["succeeded", "succeeded", "failed"]
    assert lives.after == lives.before
    assert "no such tensor" in lives.after[2]["message"]


def test_a_load_cut_off_by_a_stop_goes_on(lives: Lives) -> None:
    """Its user still asks: it is loaded again, and the operation follows that."""
    assert lives.cut_off["state"] == "running"
    assert lives.cut_off["phase"] in ("stopped", "queued", "claimed", "starting")
    assert lives.cut_off_state == "starting"


def test_an_id_of_an_earlier_life_is_not_passed_over(lives: Lives, server: RunningServer) -> None:
    """Ids begin anew; a client of the time before must learn that it has missed something."""
    with http_client(server) as http:
        tell(http, "load", model="beta", wait=True)
        tell(http, "unload", model="beta")
    with Watcher(server, "/events", last_id="3") as again:
        assert again.events[0].name == "snapshot"


def test_an_operation_that_outlives_a_kill_ends(lives: Lives, server: RunningServer) -> None:
    """The start goes on, is adopted and becomes ready; so must the operation that asked for it."""
    with http_client(server) as http:
        key = tell(http, "load", model="slow")["operation"]["id"]
        eventually(lambda: http.get("/logs/slow").status_code == 200)  # its process is there
    server.kill()
    server.restart()
    server.wait_state("slow", "ready")
    with http_client(server) as http:
        view = http.get(f"/operations/{key}").json()
    assert view["state"] == "succeeded"
    assert view["ended_at"]
