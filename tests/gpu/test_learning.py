"""What the orchestrator has learned from one load, against the next one, on a real card, by hand:
`pytest -m gpu tests/gpu/test_learning.py -s`.

Needs `ORCHESTRATOR_TEST_LLAMA_SERVER`, a CUDA llama-server, and nothing else running on the card.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from bench.vram_accuracy import ALL, CASES, SERVER, Card, Case, percent, watching
from tests.estimate.shapes import SHAPES
from tests.server import RunningServer, running_server
from tests.support import eventually

pytestmark = pytest.mark.gpu

WORST_PERCENT = 0.5
LEARNED = [case for case in CASES if not case.n_cpu_moe]
PROMPT = [1000 + 7 * number % 90_000 for number in range(3000)]
COMMAND = [
    "-m", "{path}", "--host", "127.0.0.1", "--port", "{port}", "-c", "{context_size}",
    "-ngl", "{n_gpu_layers}", "-np", "{parallel}", "-kvu", "-fa", "on", "-b", "2048", "-ub", "512",
    "-ctk", "{cache_type_k}", "-ctv", "{cache_type_v}", "--cache-ram", "0", "--fit", "off", "-lv", "4",
]  # fmt: skip


@dataclass(frozen=True)
class House:
    """`predicted` are the parts of each model's footprint on its GPU, in MiB, before anything was loaded."""

    server: RunningServer
    card: Card
    predicted: Mapping[str, dict[str, int]]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One server for all cases: each is a model of its catalogue."""
    binary = os.environ.get(SERVER)
    if not binary or shutil.which("nvidia-smi") is None:
        pytest.skip(f"SKIPPED: there is no NVIDIA GPU here, or {SERVER} names no llama-server")
    folder = tmp_path_factory.mktemp("learning")
    entries = {model_id(case): entry(case, folder) for case in LEARNED}
    models = yaml.safe_dump({"models": entries})  # as text: nothing is filled in
    service = {
        "command": [binary, *COMMAND],
        "health": {"path": "/health", "start_timeout": "120s"},
        "memory": "gguf",
    }
    settings = {"engine": "process", "devices": "nvml", "host_memory_mib": 65_536}
    with running_server(folder, models, {"llama": service}, settings) as server:
        # Now, as what one model shows moves the footprints of others that share its file.
        predicted = {model: parts(server, model) for model in entries}
        yield House(server, Card(0), predicted)


def model_id(case: Case) -> str:
    return f"case-{LEARNED.index(case)}"


def entry(case: Case, folder: Path) -> dict[str, Any]:
    return {
        "service": "llama",
        "path": str(SHAPES[case.shape]().write(folder)),
        "context_size": case.context_size,
        "n_gpu_layers": "all" if case.n_gpu_layers == ALL else case.n_gpu_layers,
        "parallel": case.parallel,
        "cache_type_k": case.cache_type,
        "cache_type_v": case.cache_type,
    }


def footprint(house: House, model: str) -> tuple[float, str]:
    found = house.server.model(model)["footprint"]
    return float(found["gpu_mib"]), str(found["source"])


def parts(server: RunningServer, model: str) -> dict[str, int]:
    return dict(server.model(model)["footprint"]["breakdown"]["gpu0"])


def life(house: House, model: str) -> float:
    """Load, compute one long prompt, unload; by how much the card's use grew at most, in MiB."""
    before_mib = house.card.used_mib()
    with watching(house.card) as peak:
        house.server.load(model)
        body = {"model": model, "prompt": PROMPT, "n_predict": 8, "ignore_eos": True, "cache_prompt": False}
        with httpx.Client(trust_env=False, timeout=120) as http:
            answer = http.post(f"{house.server.url}/completion", json=body)
        assert answer.status_code == 200, answer.text
        wait_sample(house.server)
        eventually(lambda: own_load(house.server, model).get("buffers"))
    house.server.unload(model)
    return peak.mib - before_mib


def own_load(server: RunningServer, model: str) -> dict[str, Any]:
    """What was noted of the attempt that runs; empty if nothing was yet."""
    attempt = server.model(model)["instance"]["attempt"]
    rows = httpx.get(f"{server.url}/learned", trust_env=False).json()["learned"]
    loads = (load for row in rows for load in row["loads"] if load["attempt"] == attempt)
    return next(loads, {})


def wait_sample(server: RunningServer) -> None:
    """Until the server has measured what is used now."""
    asked_s = time.monotonic()
    eventually(lambda: time.monotonic() - server.state()["sample_age_s"] > asked_s + 0.1)


@pytest.mark.parametrize("case", LEARNED, ids=str)
def test_after_one_load_the_next_is_known(house: House, case: Case) -> None:
    model = model_id(case)
    predicted_mib, source = footprint(house, model)
    predicted_parts = house.predicted[model]
    first_mib = life(house, model)
    learned_mib, learned_from = footprint(house, model)
    learned_parts = parts(house.server, model)
    second_mib = life(house, model)
    error = percent(learned_mib, second_mib)
    print(
        f"| {case} | {predicted_mib:.0f} ({source}) | {first_mib:.0f} | {learned_mib:.0f} | "
        f"{second_mib:.0f} | {error:+.2f} % |"
    )
    print(f"    predicted {predicted_parts}, logged {learned_parts}")
    assert learned_from == "measured"
    for name in ("weights", "kv_cache"):
        assert abs(learned_parts.get(name, 0) - predicted_parts.get(name, 0)) <= 2, name
    assert abs(sum(learned_parts.values()) - learned_mib) <= len(learned_parts)
    assert abs(error) <= WORST_PERCENT
