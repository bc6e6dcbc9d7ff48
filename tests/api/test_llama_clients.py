"""Calls of llama.cpp clients, replayed: Open WebUI's llama.cpp provider, llama.cpp's own web page."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.api.talk import Event, Watcher, problem
from tests.server import RunningServer, mimic_service, running_server
from tests.support import eventually

WORDS = {"unloaded", "loading", "loaded", "sleeping", "downloading"}
KEY = {"Authorization": "Bearer sk-none"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    services = {"mimic": mimic_service(), "stubborn": mimic_service(stop_grace="100ms")}
    models: dict[str, Any] = {
        "alpha": {"aliases": ["al"]},
        "beta": {},
        "gamma": {},
        "loading": {"environment": {"MIMIC_NEVER_HEALTHY": "1"}},
        "broken": {"environment": {"MIMIC_START": "exit:3:no such tensor"}},
        "clean-exit": {"environment": {"MIMIC_START": "exit:0:nothing to do"}},
        "stubborn": {"service": "stubborn", "environment": {"MIMIC_IGNORE_SIGTERM": "1"}},
        "giant": {"memory": "64GiB"},
    }
    with running_server(tmp_path_factory.mktemp("llama"), models, services) as server:
        yield server


def status(http: httpx.Client, model: str, path: str = "/models") -> dict[str, Any]:
    data = http.get(path, headers=KEY).json()["data"]
    found: dict[str, Any] = next(entry["status"] for entry in data if entry["id"] == model)
    return found


def is_status(http: httpx.Client, model: str, value: str) -> bool:
    return bool(status(http, model)["value"] == value)


def told_of(events: list[Event], model: str) -> list[dict[str, Any]]:
    found = [event.json() for event in events]
    assert all(set(one) == {"model", "event", "data"} for one in found)
    assert {one["event"] for one in found} <= {"model_status"}
    return [one["data"] for one in found if one["model"] == model]


def words_of(events: list[Event], model: str) -> list[str]:
    """The statuses in order, each once for as long as it lasts."""
    words: list[str] = [data["status"] for data in told_of(events, model)]
    assert set(words) <= WORDS
    return [word for at, word in enumerate(words) if at == 0 or words[at - 1] != word]


def tell(http: httpx.Client, call: str, **body: Any) -> httpx.Response:
    return http.post(f"/models/{call}", json=body, headers=KEY)


# --- lists


@pytest.mark.parametrize("path", ["/models", "/v1/models", "/models?reload=1"])
def test_the_list_has_the_routers_shape(http: httpx.Client, path: str) -> None:
    body = http.get(path, headers=KEY).json()
    assert body["object"] == "list"
    assert "giant" in [entry["id"] for entry in body["data"]]
    for entry in body["data"]:
        assert entry["object"] == "model"
        assert isinstance(entry["created"], int)
        assert entry["owned_by"]
        assert entry["status"]["value"] in WORDS


def test_one_model_as_openai_clients_ask(http: httpx.Client) -> None:
    for name in ("alpha", "al"):
        answer = http.get(f"/v1/models/{name}", headers=KEY)
        assert answer.status_code == 200, answer.text
        assert answer.json()["id"] == "alpha"


def test_the_routers_props(http: httpx.Client) -> None:
    props = http.get("/props", headers=KEY).json()
    assert props["role"] == "router"
    assert props["models_autoload"] is True


# --- load, chat, eject


def test_load_chat_and_eject(server: RunningServer, http: httpx.Client) -> None:
    """Open WebUI: the list, load in its panel, a chat, Eject; watched all the time."""
    with Watcher(server, "/models/sse") as watch:
        assert status(http, "alpha", "/v1/models")["value"] == "unloaded"
        answer = tell(http, "load", model="alpha")
        assert answer.status_code == 200
        assert answer.json()["success"] is True
        assert answer.json()["operation"]["kind"] == "load"
        watch.wait(lambda events: "loaded" in words_of(events, "alpha"))
        assert status(http, "alpha", "/v1/models")["value"] == "loaded"

        chat = {"model": "alpha", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
        with http.stream("POST", "/v1/chat/completions", json=chat, headers=KEY) as streamed:
            lines = [line for line in streamed.iter_lines() if line]
        assert lines[-1] == "data: [DONE]"

        answer = tell(http, "unload", model="alpha")
        assert answer.status_code == 200
        assert answer.json()["success"] is True
        assert "freed_mib" in answer.json()
        assert status(http, "alpha") == {"value": "unloaded", "exit_code": 0}
        watch.wait(lambda events: words_of(events, "alpha") == ["loading", "loaded", "unloaded"])
        last = told_of(watch.events, "alpha")[-1]
    assert last == {"status": "unloaded", "exit_code": 0}


def test_a_load_answers_before_it_has_ended(http: httpx.Client) -> None:
    answer = tell(http, "load", model="loading")
    assert answer.status_code == 200
    assert answer.json()["success"] is True
    assert answer.json()["operation"]["state"] == "running"
    assert answer.json()["operation"]["ended_at"] is None
    assert status(http, "loading")["value"] == "loading"
    assert tell(http, "unload", model="loading").json()["success"] is True
    assert status(http, "loading") == {"value": "unloaded", "exit_code": 0}


def test_a_load_that_is_waited_for(http: httpx.Client) -> None:
    answer = tell(http, "load", model="beta", wait=True)
    assert answer.json()["operation"]["state"] == "succeeded"
    assert is_status(http, "beta", "loaded")
    answer = tell(http, "unload", model="beta", wait=False)
    assert answer.json()["success"] is True
    eventually(lambda: is_status(http, "beta", "unloaded"))


def test_each_change_is_told_once(server: RunningServer, http: httpx.Client) -> None:
    with Watcher(server, "/models/sse") as watch:
        tell(http, "load", model="gamma", wait=True)
        watch.wait(lambda events: "loaded" in words_of(events, "gamma"))
        told = [data for data in told_of(watch.events, "gamma") if "progress" not in data]
        tell(http, "unload", model="gamma")
    assert [data["status"] for data in told] in (["loading", "loaded"], ["loaded"])


def test_progress_is_a_share(server: RunningServer, http: httpx.Client) -> None:
    with Watcher(server, "/models/sse") as watch:
        tell(http, "load", model="loading")
        eventually(lambda: "progress" in status(http, "loading"))
        assert 0 <= status(http, "loading")["progress"]["value"] < 1
        tell(http, "unload", model="loading")
        watch.wait(lambda events: words_of(events, "loading")[-1:] == ["unloaded"])
        shares = [
            data["progress"]["value"] for data in told_of(watch.events, "loading") if "progress" in data
        ]
    assert all(0 <= share <= 1 for share in shares)


def test_every_accepted_call_is_told(server: RunningServer, http: httpx.Client) -> None:
    """Also the calls that change nothing: a client waits for an event after each of its calls."""
    tell(http, "load", model="beta", wait=True)
    with Watcher(server, "/models/sse") as watch:
        for _ in range(3):
            before = len(told_of(watch.events, "beta"))
            assert tell(http, "load", model="beta").json()["success"] is True
            watch.wait(lambda events, before=before: len(told_of(events, "beta")) > before)
            assert told_of(watch.events, "beta")[-1]["status"] == "loaded"
        tell(http, "unload", model="beta")
        watch.wait(lambda events: words_of(events, "beta")[-1:] == ["unloaded"])
        for _ in range(3):
            before = len(told_of(watch.events, "beta"))
            answer = tell(http, "unload", model="beta").json()
            assert answer["success"] is True
            assert "not loaded" in answer["message"]
            watch.wait(lambda events, before=before: len(told_of(events, "beta")) > before)
            assert told_of(watch.events, "beta")[-1]["status"] == "unloaded"


def test_calls_by_alias_are_told_by_name(server: RunningServer, http: httpx.Client) -> None:
    with Watcher(server, "/models/sse") as watch:
        assert tell(http, "load", model="al", wait=True).json()["operation"]["model"] == "alpha"
        watch.wait(lambda events: "loaded" in words_of(events, "alpha"))
        assert words_of(watch.events, "al") == []
        tell(http, "unload", model="al")


# --- failures


@pytest.mark.parametrize(("model", "code"), [("broken", 3), ("clean-exit", None)])
def test_a_failed_load(server: RunningServer, http: httpx.Client, model: str, code: int | None) -> None:
    with Watcher(server, "/models/sse") as watch:
        assert tell(http, "load", model=model).status_code == 200
        watch.wait(lambda events: words_of(events, model)[-1:] == ["unloaded"])
        events = list(watch.events)
    assert words_of(events, model) == ["loading", "unloaded"]
    assert all("failed" not in data for data in told_of(events, model)[:-1])
    last = told_of(events, model)[-1]
    assert last["failed"] is True
    assert last["exit_code"] != 0
    assert code is None or last["exit_code"] == code
    assert status(http, model) == {"value": "unloaded", "failed": True, "exit_code": last["exit_code"]}


def test_a_failed_load_that_is_waited_for_says_why(http: httpx.Client) -> None:
    error = problem(tell(http, "load", model="broken", wait=True), 503)
    assert error["exit_code"] == 3
    assert error["oom"] is False
    assert "no such tensor" in "\n".join(error["log_tail"])
    assert "no such tensor" in error["message"]


def test_a_new_load_clears_the_failure_before_its_answer(server: RunningServer, http: httpx.Client) -> None:
    tell(http, "load", model="broken", wait=True)
    eventually(lambda: status(http, "broken").get("failed") is True)
    with Watcher(server, "/models/sse") as watch:
        assert tell(http, "load", model="broken").status_code == 200
        first = watch.wait(lambda events: told_of(events, "broken"))[0]
        watch.wait(lambda events: words_of(events, "broken")[-1:] == ["unloaded"])
    assert first["status"] == "loading"
    assert "failed" not in first


def test_an_unload_of_a_failed_one_clears_the_failure(http: httpx.Client) -> None:
    tell(http, "load", model="broken", wait=True)
    eventually(lambda: status(http, "broken").get("failed") is True)
    assert tell(http, "unload", model="broken").json()["success"] is True
    assert "failed" not in status(http, "broken")


def test_a_wanted_stop_is_no_failure_whatever_it_took(server: RunningServer, http: httpx.Client) -> None:
    """It had to be killed."""
    tell(http, "load", model="stubborn", wait=True)
    with Watcher(server, "/models/sse") as watch:
        assert tell(http, "unload", model="stubborn").json()["success"] is True
        watch.wait(lambda events: words_of(events, "stubborn")[-1:] == ["unloaded"])
        assert told_of(watch.events, "stubborn")[-1] == {"status": "unloaded", "exit_code": 0}
    assert status(http, "stubborn") == {"value": "unloaded", "exit_code": 0}


def test_a_death_while_loaded_is_a_failure(server: RunningServer, http: httpx.Client) -> None:
    tell(http, "load", model="beta", wait=True)
    with Watcher(server, "/models/sse") as watch:
        with pytest.raises(httpx.HTTPError):
            answer = http.post("/upstream/beta/die", json={"code": 5})
            answer.raise_for_status()
        watch.wait(lambda events: words_of(events, "beta")[-1:] == ["unloaded"])
        last = told_of(watch.events, "beta")[-1]
    assert (last["failed"], last["exit_code"]) == (True, 5)
    assert status(http, "beta") == {"value": "unloaded", "failed": True, "exit_code": 5}
    tell(http, "load", model="beta", wait=True).raise_for_status()
    assert status(http, "beta") == {"value": "loaded"}
    tell(http, "unload", model="beta")


def test_what_can_never_fit_is_409_and_not_to_be_tried_again(http: httpx.Client) -> None:
    answer = tell(http, "load", model="giant")
    error = problem(answer, 409, "cannot_ever_fit")
    assert answer.headers["x-should-retry"] == "false"
    assert error["needed_mib"] == 64 * 1024 > error["capacity_mib"] > 0
    assert status(http, "giant")["value"] == "unloaded"


def test_what_is_held_out_says_for_how_long(http: httpx.Client) -> None:
    assert tell(http, "unload", model="gamma", hold="10m").json()["success"] is True
    answer = http.post("/v1/completions", json={"model": "gamma", "prompt": "x"}, headers=KEY)
    error = problem(answer, 503, "model_held")
    assert 590 < error["held_for_s"] <= 600
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert tell(http, "load", model="gamma", wait=True).json()["success"] is True
    assert tell(http, "unload", model="gamma").json()["success"] is True


# --- llama.cpp's own page


def test_the_web_page_of_llama_cpp(http: httpx.Client) -> None:
    """Router props, the list, a model's props without loading it, load, its props, its slots, a chat."""
    assert http.get("/props?autoload=false", headers=KEY).json()["role"] == "router"
    refused = http.get("/props?model=alpha&autoload=false", headers=KEY)
    assert problem(refused, 400)["code"] == 400
    assert is_status(http, "alpha", "unloaded")
    tell(http, "load", model="alpha", wait=True).raise_for_status()
    assert http.get("/props?model=alpha&autoload=false", headers=KEY).json()["total_slots"] == 4
    assert len(http.get("/slots?model=alpha", headers=KEY).json()) == 4
    assert "llamacpp:" in http.get("/metrics?model=alpha", headers=KEY).text
    chat = {"model": "alpha", "messages": [{"role": "user", "content": "hi"}]}
    for path in ("/v1/chat/completions", "/v1/chat/completions?autoload=false"):
        answer = http.post(path, content=json.dumps(chat), headers={**KEY, "X-Api-Key": "sk"}).json()
        assert answer["choices"][0]["message"]["role"] == "assistant"
    tell(http, "unload", model="alpha")
