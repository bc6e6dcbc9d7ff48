"""What an idle orchestrator costs: CPU and memory, against an idle bare FastAPI server."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.report import ratio, say, show
from bench.server import clean_environment, cpu_s, resident_mib, serving
from tests.nvml.simulated import MIMIC, SimulatedGpus

SETTLE_S = 4.0
WATCH_S = 20.0
MODEL = "mimic"
BARE = (
    "import fastapi, uvicorn; "
    "uvicorn.run(fastapi.FastAPI(), port=0, log_level='error', loop='uvloop', http='httptools')"
)
GPU = ("Simulated RTX 3090", 24576, 400)


@contextmanager
def bare() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", BARE], env=clean_environment())
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


@contextmanager
def orchestrator(devices: str, gpus: int, *, with_model: bool) -> Iterator[int]:
    """The PID of an orchestrator on RAM, or on so many simulated GPUs; with a loaded model or none."""
    with ExitStack() as stack:
        environment: Mapping[str, str] = {}
        if devices == "nvml":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="orchestrator-bench-")))
            environment = SimulatedGpus.create(folder, [GPU] * gpus).env
        services = {
            "mimic": {"command": ["python", "-S", "-E", str(MIMIC)], "environment": {"MIMIC_MIB": "64"}}
        }
        models = {MODEL: {"service": "mimic", "memory": "64MiB", "idle_after": "never"}}
        settings = {"engine": "process", "devices": devices, "host_memory_mib": 1024}
        server = stack.enter_context(serving(services, models, settings, environment))
        if with_model:
            server.load(MODEL)
        yield server.pid


def main() -> None:
    say(f"idle: six servers at once, watched for {WATCH_S:.0f} s")
    with ExitStack() as stack:
        pids = {
            "bare FastAPI on uvicorn": stack.enter_context(bare()),
            "RAM, no model": stack.enter_context(orchestrator("host", 0, with_model=False)),
            "RAM, one ready model": stack.enter_context(orchestrator("host", 0, with_model=True)),
            "1 GPU (simulated NVML), no model": stack.enter_context(
                orchestrator("nvml", 1, with_model=False)
            ),
            "1 GPU, one ready model": stack.enter_context(orchestrator("nvml", 1, with_model=True)),
            "8 GPUs, one ready model": stack.enter_context(orchestrator("nvml", 8, with_model=True)),
        }
        time.sleep(SETTLE_S)
        rows = watch(pids)
    show(
        "Idle (aim: under 1 % of a core and 150 MB)",
        ["orchestrator", "CPU of a core", "resident", "to bare"],
        rows,
        [
            f"CPU time over {WATCH_S:.0f} s, to 0.05 %. The simulated NVML reads files where the real one "
            "asks the driver."
        ],
    )


def watch(pids: Mapping[str, int]) -> list[list[str]]:
    before_s = {name: cpu_s(pid) for name, pid in pids.items()}
    begun_s = time.monotonic()
    time.sleep(WATCH_S)
    took_s = time.monotonic() - begun_s
    rows = []
    bare_mib = resident_mib(next(iter(pids.values())))
    for name, pid in pids.items():
        share = (cpu_s(pid) - before_s[name]) / took_s
        resident = resident_mib(pid)
        rows.append([name, f"{share * 100:.2f} %", f"{resident:.0f} MiB", ratio(resident, bare_mib)])
    return rows


if __name__ == "__main__":
    main()
