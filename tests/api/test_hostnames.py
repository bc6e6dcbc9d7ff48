"""A service's hostname is its OpenAI API: its models only, its health, its metrics."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from orchestrator.api.metrics import merged
from tests.api.talk import oddity_service, problem, raw_get
from tests.server import RunningServer, mimic_service, running_server
from tests.support import eventually

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
MODELS: dict[str, Any] = {
    "alpha": {"aliases": ["al"], "environment": {"MIMIC_NAME": "alpha"}},
    "beta": {"environment": {"MIMIC_NAME": "beta"}},
    "lonely": {"service": "single", "environment": {"MIMIC_NAME": "lonely"}},
    "odd": {"service": "odd"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("hostnames")
    services = {
        "mimic": mimic_service(hostname="mimic.lan"),
        "single": mimic_service(hostname="Single.lan"),
        "odd": oddity_service(folder / "marks"),
    }
    with running_server(folder, MODELS, services) as server:
        yield server


@pytest.fixture(autouse=True)
def empty_house(server: RunningServer) -> Iterator[None]:
    yield
    for model in MODELS:
        server.unload(model)


@pytest.fixture(scope="module")
def at(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of mimic.lan."""
    headers = {"Host": "mimic.lan:8443"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=30, trust_env=False) as http:
        yield http


def is_loaded(server: RunningServer, model: str) -> bool:
    return bool(server.model(model)["state"] == "ready")


# --- health, lists


def test_health_is_llama_cpps_own(server: RunningServer, at: httpx.Client) -> None:
    answer = at.get("/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ok"}
    assert not is_loaded(server, "alpha")


@pytest.mark.parametrize("path", ["/v1/models", "/models"])
def test_only_the_services_models_are_listed(server: RunningServer, at: httpx.Client, path: str) -> None:
    assert [entry["id"] for entry in at.get(path).json()["data"]] == ["alpha", "beta"]
    everywhere = raw_get(server, path).json()["data"]
    assert [entry["id"] for entry in everywhere] == ["alpha", "beta", "lonely", "odd"]


def test_one_of_its_models(at: httpx.Client) -> None:
    assert at.get("/v1/models/al").json()["id"] == "alpha"
    assert "alpha, beta" in problem(at.get("/v1/models/lonely"), 400, "other_service")["message"]


# --- calls


def test_a_call_is_routed_by_its_model(server: RunningServer, at: httpx.Client) -> None:
    answer = at.post("/v1/chat/completions", json={"model": "al", **CHAT})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"]
    assert is_loaded(server, "alpha")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/completion"])
def test_another_services_model_is_refused(server: RunningServer, at: httpx.Client, path: str) -> None:
    error = problem(at.post(path, json={"model": "lonely", **CHAT}), 400)
    assert error["param"] == "model"
    assert "'lonely' is a model of 'single'" in error["message"]
    assert "mimic.lan is 'mimic' alone, which has alpha, beta" in error["message"]
    assert not is_loaded(server, "lonely")


def test_a_call_without_a_model_means_the_only_one(server: RunningServer) -> None:
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", json=CHAT, headers={"Host": "single.lan"}, timeout=30
    )
    assert answer.status_code == 200, answer.text
    assert is_loaded(server, "lonely")


def test_a_call_without_a_model_means_the_one_that_is_ready(server: RunningServer, at: httpx.Client) -> None:
    error = problem(at.post("/v1/chat/completions", json=CHAT), 400, "invalid_value")
    assert "mimic.lan has alpha, beta" in error["message"]
    server.load("beta")
    with at.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as streamed:
        text = streamed.read().decode()
    assert "beta" in text and text.endswith("data: [DONE]\n\n")
    form = at.post("/v1/audio/transcriptions", files={"file": b"sound"})
    assert form.status_code != 400, form.text
    assert at.get("/slots").status_code in (200, 404), "llama.cpp's own calls go by their model"
    server.load("alpha")
    problem(at.post("/v1/chat/completions", json=CHAT), 400, "invalid_value")


def test_elsewhere_a_model_must_be_named(server: RunningServer) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT, timeout=30)
    problem(answer, 400, "invalid_value")


# --- metrics


def test_metrics_load_nothing(server: RunningServer, at: httpx.Client) -> None:
    answer = at.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text == "# No model of this service is loaded.\n"
    assert not is_loaded(server, "alpha")


def test_metrics_of_one_are_its_own_and_are_no_use_of_it(server: RunningServer, at: httpx.Client) -> None:
    server.load("alpha")
    at.post("/v1/chat/completions", json={"model": "alpha", **CHAT})
    own = httpx.get(f"http://{server.model('alpha')['instance']['address']}/metrics").text
    eventually(lambda: server.model("alpha")["instance"]["idle_s"] > 0.1)
    idle_s = server.model("alpha")["instance"]["idle_s"]
    told = at.get("/metrics").text
    assert "llamacpp:" in told
    assert [line.split(" ")[:3] for line in told.splitlines() if line.startswith("#")] == [
        line.split(" ")[:3] for line in own.splitlines() if line.startswith("#")
    ]
    assert 'model="' not in told
    assert server.model("alpha")["instance"]["idle_s"] >= idle_s > 0, "it would count anew"
    assert at.head("/metrics").text == ""


def test_metrics_of_several_have_a_label(server: RunningServer, at: httpx.Client) -> None:
    server.load("alpha")
    server.load("beta")
    told = at.get("/metrics").text
    assert 'model="alpha"' in told and 'model="beta"' in told
    kinds = [line for line in told.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds)) > 0
    assert "llamacpp:" in at.get("/metrics?model=alpha").text
    assert 'model="' not in at.get("/metrics?model=alpha").text


A = b"""# HELP x:time_seconds Time.
# TYPE x:time_seconds histogram
x:time_seconds_bucket{le="1"} 1
x:time_seconds_sum 0.5
# TYPE y gauge
y 1 1700000000
"""
B = b"""# HELP x:time_seconds Time.
# TYPE x:time_seconds histogram
x:time_seconds_bucket{le="1",} 3
z{model_path="a b"} NaN
"""
BOTH = """\
# 'mute' is loaded and gave no metrics.
# HELP x:time_seconds Time.
# TYPE x:time_seconds histogram
x:time_seconds_bucket{model="a",le="1"} 1
x:time_seconds_sum{model="a"} 0.5
x:time_seconds_bucket{model="b",le="1"} 3
# TYPE y gauge
y{model="a"} 1 1700000000
z{model="b",model_path="a b"} NaN
"""


def test_metrics_of_several_keep_each_metric_together() -> None:
    assert merged({"a": A, "b": B, "mute": None}).decode() == BOTH
    assert merged({"a": A}) == A


# --- names


def test_a_hostname_is_one_of_ours_until_a_reload_takes_it_away(server: RunningServer) -> None:
    assert raw_get(server, "/models", "Host: single.lan").status == 200
    assert raw_get(server, "/models", "Host: renamed.lan").status == 421
    server.write_service("single", mimic_service(hostname="renamed.lan"))
    assert raw_get(server, "/models?reload=1").status == 200
    assert raw_get(server, "/models", "Host: single.lan").status == 421
    listed = raw_get(server, "/v1/models", "Host: renamed.lan").json()["data"]
    assert [entry["id"] for entry in listed] == ["lonely"]
    server.write_service("single", mimic_service(hostname="single.lan"))
    assert raw_get(server, "/models?reload=1").status == 200


def test_two_services_cannot_share_a_hostname(server: RunningServer) -> None:
    server.write_service("single", mimic_service(hostname="MIMIC.lan"))
    answer = raw_get(server, "/models?reload=1")
    assert answer.status == 409
    message = answer.json()["error"]["message"]
    assert (
        "service.yaml, line" in message
        and "hostname: 'mimic.lan' is already the hostname of 'mimic'" in message
    )
    server.write_service("single", mimic_service(hostname="single.lan"))
    assert raw_get(server, "/models?reload=1").status == 200
