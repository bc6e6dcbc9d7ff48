"""On a machine with a real NVIDIA GPU, run by hand: `pytest -m gpu tests/gpu -s`.

Needs nvidia-smi. With `ORCHESTRATOR_TEST_LLAMA_SERVER` (a CUDA llama-server) and
`ORCHESTRATOR_TEST_GGUF` (a model file) real llama.cpp is loaded, evicted and unloaded; with
`ORCHESTRATOR_TEST_IMAGE` (a local image in which the host's /usr and /opt can be mounted) also as a
container that gets its GPU by plain devices; and with `ORCHESTRATOR_TEST_ENTRYPOINT` (the folder
services/llama-cpp/image, copied below /opt and with a CUDA llama-server in its bin) as the service llama-cpp.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from orchestrator.control.ports import Roots
from orchestrator.core.entities import MIB
from orchestrator.drivers.nvml import NvmlDevices
from tests.server import RunningServer, running_server
from tests.support import eventually

pytestmark = pytest.mark.gpu

LLAMA_SERVER = os.environ.get("ORCHESTRATOR_TEST_LLAMA_SERVER", "")
GGUF = os.environ.get("ORCHESTRATOR_TEST_GGUF", "")
IMAGE = os.environ.get("ORCHESTRATOR_TEST_IMAGE", "")
ENTRYPOINT = os.environ.get("ORCHESTRATOR_TEST_ENTRYPOINT", "")
REPOSITORY = Path(__file__).parents[2]
HOST_FOLDERS = {"/usr": "/usr", "/etc": "/etc", "/opt": "/opt"}

HOLD_A_GIB = """
import time, torch
block = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
print("held", flush=True)
time.sleep(600)
"""
GPU_NOISE_MIB = 64


def smi(query: str) -> list[str]:
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]


def used_mib() -> int:
    """What nvidia-smi shows as used on GPU 0, without the driver's own share."""
    return int(smi("gpu=memory.used")[0])


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if shutil.which("nvidia-smi") is None:
        pytest.skip("SKIPPED: there is no NVIDIA GPU on this machine, so nothing of the gpu tier has run")


@pytest.fixture
def baseline_mib() -> int:
    return used_mib()


# --- the driver


def test_a_real_card_is_measured_and_its_processes_are_attributed() -> None:
    devices = NvmlDevices(headroom_bytes=512 * MIB)
    card = devices.open()[0]
    total_mib, name, uuid = (part.strip() for part in smi("gpu=memory.total,name,uuid")[0].split(","))
    assert (card.id, card.name) == (uuid, name)
    assert int(total_mib) - 2048 < card.capacity_bytes // MIB <= int(total_mib)
    child = subprocess.Popen([sys.executable, "-c", HOLD_A_GIB], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        roots = {"attempt-1": Roots(child.pid)}
        began_s = time.perf_counter()
        reading = devices.sample(roots, time.monotonic()).readings[card.id]
        print(f"one sample of memory and processes: {(time.perf_counter() - began_s) * 1e3:.2f} ms")
        assert reading.attributed
        assert 1024 <= reading.by_attempt["attempt-1"] // MIB < 2048
        assert reading.unexplained_bytes // MIB < GPU_NOISE_MIB
        others = NvmlDevices(headroom_bytes=512 * MIB)  # this one remembers whose the process is
        others.open()
        foreign = others.sample({}, time.monotonic()).readings[card.id].foreign
        assert child.pid in {process.pid for process in foreign}
    finally:
        child.kill()
        child.wait()
    gone = eventually(lambda: devices.sample(roots, time.monotonic()).readings[card.id], 5)
    assert gone is not None
    eventually(lambda: "attempt-1" not in taken(devices, roots, card.id), 5)
    devices.close()


def taken(devices: NvmlDevices, roots: dict[str, Roots], card: str) -> dict[str, int]:
    uses = devices.sample(roots, time.monotonic()).readings[card].by_attempt
    return {attempt: used for attempt, used in uses.items() if used}


def test_a_real_card_tells_how_it_is() -> None:
    devices = NvmlDevices(headroom_bytes=0)
    card = devices.open()[0]
    began_s = time.perf_counter()
    sample = devices.sample({}, time.monotonic())
    print(f"the first sample, with telemetry: {(time.perf_counter() - began_s) * 1e3:.2f} ms")
    told = sample.telemetry[card.id]
    print(told)
    celsius, limit_w = (float(part) for part in smi("gpu=temperature.gpu,power.limit")[0].split(","))
    assert told.temperature_c is not None and abs(told.temperature_c - celsius) <= 5
    assert told.power_limit_w == pytest.approx(limit_w, abs=1)
    assert told.power_w is not None and 0 < told.power_w < 2 * limit_w
    assert told.utilization_percent is not None and 0 <= told.utilization_percent <= 100
    assert (sample.errors, sample.broken, sample.incidents) == ({}, frozenset(), ())
    devices.close()


# --- real llama.cpp


def own_service() -> dict[str, Any]:
    """services/llama-cpp as it is, but for its image: the host's folders with the same entry point."""
    service: dict[str, Any] = yaml.safe_load((REPOSITORY / "services/llama-cpp/service.yaml").read_text())
    command = ["python3", "-S", "-E", "-B", f"{ENTRYPOINT}/entrypoint.py"]
    return service | {"image": IMAGE, "container_command": command, "volumes": HOST_FOLDERS}


def llama_service(engine: str) -> dict[str, Any]:
    command = [
        LLAMA_SERVER, "-m", "{path}", "--host", "0.0.0.0", "--port", "{port}", "-c", "{context_size}",
        "-ngl", "{n_gpu_layers}", "--fit", "off", "-np", "1",
    ]  # fmt: skip
    service: dict[str, Any] = {
        "command": command,
        "health": {"path": "/health", "start_timeout": "120s"},
        "memory": "gguf",
        "stop_grace": "10s",
    }
    if engine == "docker":
        service |= {
            "image": IMAGE,
            "container_command": command,
            "volumes": HOST_FOLDERS,
        }
    return service


@pytest.fixture(params=["process", "docker", "own service"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RunningServer]:
    is_own = request.param == "own service"
    engine = "docker" if is_own else request.param
    if not LLAMA_SERVER or not GGUF or (engine == "docker" and not IMAGE) or (is_own and not ENTRYPOINT):
        pytest.skip("SKIPPED: no CUDA llama-server, model or image was named (see this file's docstring)")
    half = f"{int(smi('gpu=memory.total')[0]) * 6 // 10}MiB"
    models = {
        "first": {"service": "llama", "path": GGUF, "memory": half, "context_size": 4096, "n_gpu_layers": 99},
        "second": {
            "service": "llama",
            "path": GGUF,
            "memory": half,
            "context_size": 4096,
            "n_gpu_layers": 99,
        },
        "estimated": {
            "service": "llama",
            "path": GGUF,
            "context_size": 4096,
            "n_gpu_layers": 99,
            "parallel": 1,
        },
    }
    settings = {
        "engine": engine,
        "devices": "nvml",
        "gpu_access": "devices",
        "mount_roots": ["/usr", "/etc", "/opt"],
    }
    text = yaml.safe_dump({"models": models})  # as text: nothing is filled in
    service = own_service() if is_own else llama_service(engine)
    with running_server(tmp_path, text, {"llama": service}, settings) as running:
        yield running


def chat(server: RunningServer, model: str) -> str:
    body = {"model": model, "max_tokens": 8, "messages": [{"role": "user", "content": "hello"}]}
    with httpx.Client(trust_env=False, timeout=120) as http:
        answer = http.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"])


def test_llama_is_loaded_evicted_and_unloaded_on_a_real_card(
    server: RunningServer, baseline_mib: int
) -> None:
    began_s = time.perf_counter()
    assert chat(server, "first")
    print(f"{server.settings['engine']}: cold request {time.perf_counter() - began_s:.2f} s")
    loaded_mib = used_mib() - baseline_mib
    device = server.state()["devices"][0]
    holder = device["holders"][0]
    print(f"on the card {loaded_mib} MiB, attributed {holder['used_mib']} MiB, {device}")
    assert abs(holder["used_mib"] - loaded_mib) <= GPU_NOISE_MIB
    began_s = time.perf_counter()
    assert chat(server, "second")
    print(f"{server.settings['engine']}: swap {time.perf_counter() - began_s:.2f} s")
    assert used_mib() - baseline_mib < 1.2 * loaded_mib  # one of them, not both
    began_s = time.perf_counter()
    answer = server.unload("second")
    print(f"unload {time.perf_counter() - began_s:.2f} s, freed {answer['freed_mib']} MiB")
    assert used_mib() - baseline_mib <= GPU_NOISE_MIB  # at once: unload answers when it is free
    assert abs(answer["freed_mib"] - loaded_mib) <= 2 * GPU_NOISE_MIB


def test_the_prediction_is_what_the_card_shows(server: RunningServer, baseline_mib: int) -> None:
    server.load("estimated")
    with server.client() as client:
        estimate = client.model("estimated")["footprint"]["gpu_mib"]
    real = used_mib() - baseline_mib
    print(f"estimated {estimate} MiB, on the card {real} MiB ({estimate / real:.3f}x)")
    assert 0.99 * real <= estimate <= 1.05 * real  # the first prompt, which it counts, is still to come


def test_a_killed_server_adopts_what_runs_on_the_card(server: RunningServer) -> None:
    server.load("first")
    before = server.model("first")["instance"]["attempt"]
    server.kill()
    server.start()
    view = server.wait_state("first", "ready")
    assert view["instance"]["attempt"] == before
    assert chat(server, "first")


@pytest.mark.parametrize("server", ["own service"], indirect=True)
def test_the_containers_users_see_what_they_were_promised(server: RunningServer) -> None:
    """Its README: flash attention in the log, and llama-server among nvidia-smi's processes."""
    server.load("first")
    log = server.run("logs", "first").stdout
    said = [line for line in log.splitlines() if "flash_attn" in line or "buffer size" in line]
    print("\n".join(said))
    assert any("flash_attn" in line and "enabled" in line for line in said), log
    shown = smi("compute-apps=process_name,used_memory")
    print(shown)
    assert any("llama-server" in line for line in shown)
