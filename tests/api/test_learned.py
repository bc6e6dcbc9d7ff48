"""GET and DELETE /learned: what the simulated card showed, listed and forgotten while the server runs."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.talk import problem
from tests.estimate.shapes import qwen3_8b
from tests.nvml.simulated import SimulatedGpus
from tests.server import ORCHESTRATOR, RunningServer, mimic_service, running_server
from tests.support import eventually

TAKES_MIB = 4900
ODD_MIB = 900


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> SimulatedGpus:
    return SimulatedGpus.create(tmp_path_factory.mktemp("gpus"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, gpus: SimulatedGpus) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("learned")
    file = str(qwen3_8b(36, 4096).write(folder))
    shared = {"service": "predicted", "memory": None, "path": file, "context_size": 4096}
    models: dict[str, Any] = {
        "one": shared | {"environment": {"MIMIC_MIB": str(TAKES_MIB)}, "aliases": ["first"]},
        "odd": shared | {"environment": {"MIMIC_MIB": str(ODD_MIB)}},
        "auto": shared | {"environment": {"MIMIC_MIB": str(TAKES_MIB), "X": "1"}, "context_size": "auto"},
        "never": shared | {"environment": {"MIMIC_MIB": "1"}},
    }
    services = {"predicted": mimic_service(memory="gguf", environment={"CONTEXT_SIZE": "{context_size}"})}
    with running_server(folder, models, services, {"devices": "nvml"}, gpus.env) as server:
        yield server


def rows(http: httpx.Client) -> list[dict[str, Any]]:
    answer = http.get("/learned")
    assert answer.status_code == 200, answer.text
    return list(answer.json()["learned"])


def rows_of(http: httpx.Client, model: str) -> list[dict[str, Any]]:
    return [row for row in rows(http) if model in row["models"]]


def load_and_unload(server: RunningServer, http: httpx.Client, model: str) -> int:
    """Load it until it was learned of. Returns what the card showed of it meanwhile, in MiB."""
    before = len(rows_of(http, model))
    with server.client() as client:
        client.load(model, wait=True)
        eventually(lambda: len(rows_of(http, model)) > before)
        used_mib = SimulatedGpus(Path(server.env["SIMULATED_NVML_DIR"])).used_mib(0)
        client.unload(model)
    return used_mib


def source(server: RunningServer, model: str) -> str:
    return str(server.model(model)["footprint"]["source"])


def test_a_row_says_what_the_card_showed_and_the_command_prints_the_same(
    server: RunningServer, http: httpx.Client
) -> None:
    assert rows(http) == []
    used_mib = load_and_unload(server, http, "one")
    (row,) = rows(http)
    assert used_mib == TAKES_MIB
    assert [load["peak_bytes"] for load in row["loads"]] == [used_mib << 20]
    assert (row["models"], row["believed_loads"], row["recipe"]["context_size"]) == (["one"], 1, 4096)
    load_and_unload(server, http, "odd")
    assert [r["believed_loads"] for r in rows_of(http, "odd")] == [0], "so far off counts once seen twice"
    command = [str(ORCHESTRATOR), "learned", "list", "--json", "--config", str(server.config)]
    printed = subprocess.run(command, env=server.env, cwd=server.folder, capture_output=True, check=True)
    assert json.loads(printed.stdout)["learned"] == rows(http)


def test_a_model_with_auto_is_named_at_the_row_of_its_variant(
    server: RunningServer, http: httpx.Client
) -> None:
    load_and_unload(server, http, "auto")
    (row,) = rows_of(http, "auto")
    assert row["recipe"]["context_size"] > 4096
    assert http.delete("/learned", params={"model": "auto"}).json()["forgotten"] == [row["key"]]


def test_what_is_forgotten_is_predicted_again_also_after_a_restart(
    server: RunningServer, http: httpx.Client
) -> None:
    if not rows_of(http, "one"):
        load_and_unload(server, http, "one")
    if not rows_of(http, "odd"):
        load_and_unload(server, http, "odd")
    assert source(server, "one") == "measured"
    (one,), (odd,) = rows_of(http, "one"), rows_of(http, "odd")
    assert http.delete("/learned", params={"model": "first"}).json() == {
        "success": True,
        "forgotten": [one["key"]],
    }
    assert source(server, "one") == "predicted"
    assert http.delete(f"/learned/{odd['key']}").json()["forgotten"] == [odd["key"]]
    assert rows(http) == []
    server.restart()
    assert rows(http) == []
    assert source(server, "one") == "predicted"


def test_a_loaded_models_memory_is_noted_anew(server: RunningServer, http: httpx.Client) -> None:
    with server.client() as client:
        client.load("one", wait=True)
        eventually(lambda: rows_of(http, "one"))
        http.delete("/learned", params={"model": "one"}).raise_for_status()
        (row,) = eventually(lambda: rows_of(http, "one"))
        client.unload("one")
    assert [load["ready_bytes"] for load in row["loads"]] == [TAKES_MIB << 20]


def test_the_command_asks_the_server_that_has_the_database_to_forget(
    server: RunningServer, http: httpx.Client
) -> None:
    if not rows_of(http, "one"):
        load_and_unload(server, http, "one")
    done = server.run("learned", "forget", "one", "--config", str(server.config))
    assert (done.returncode, done.stdout) == (0, "1 row is forgotten.\n"), done.stderr
    assert rows_of(http, "one") == []
    again = server.run("learned", "forget", "one", "--config", str(server.config))
    assert again.returncode == 1
    assert "Nothing was learned of 'one'" in again.stderr


def test_what_is_not_there_cannot_be_forgotten(http: httpx.Client) -> None:
    problem(http.delete("/learned", params={"model": "never"}), 404, "learned_not_found")
    problem(http.delete("/learned", params={"model": "nobody"}), 404, "model_not_found")
    problem(http.delete("/learned/0123456789"), 404, "learned_not_found")
    problem(http.delete("/learned"), 400, "invalid_value")
