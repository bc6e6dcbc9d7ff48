"""What measuring costs: one sample of the GPUs, and an hour of them, against listing processes every time."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pynvml

from bench.report import milliseconds, percentile, ratio, say, show
from orchestrator.drivers.monitor import CALM_S
from orchestrator.drivers.nvml import NvmlDevices
from tests.nvml.build import preload
from tests.nvml.simulated import SimulatedGpus

GPU = ("Simulated RTX 3090", 24576, 400)
SAMPLES = 400
PROCESSES = 4
"""Foreign processes on each GPU."""


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.monitor", description=__doc__)
    parser.add_argument(
        "--real", action="store_true", help="the machine's own GPUs instead of simulated ones"
    )
    if parser.parse_args(arguments).real:
        real_cards()
        return
    for gpus in (1, 8):
        with tempfile.TemporaryDirectory(prefix="orchestrator-bench-") as folder, ExitStack() as stack:
            simulated = SimulatedGpus.create(Path(folder), [GPU] * gpus)
            preload(simulated.library)
            os.environ["SIMULATED_NVML_DIR"] = folder
            for index in range(gpus):
                for _ in range(PROCESSES):
                    stack.enter_context(simulated.hold_foreign(index, 500))
            report(
                f"Monitor, {gpus} simulated GPUs with {PROCESSES} processes each",
                ["The simulated NVML reads files where the real one asks the driver."],
            )


def real_cards() -> None:
    pynvml.nvmlInit()
    names = [
        pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i))
        for i in range(pynvml.nvmlDeviceGetCount())
    ]
    pynvml.nvmlShutdown()
    begun_s = time.perf_counter()
    subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv"], check=True, capture_output=True)
    asked_s = time.perf_counter() - begun_s
    report(f"Monitor on {', '.join(names)}", [f"One call of nvidia-smi took {milliseconds(asked_s)}."])


def report(title: str, notes: list[str]) -> None:
    rows = []
    baseline_s = 0.0
    for name, list_every_s in {"processes in every sample": 0.0, "as the server does": 5.0}.items():
        took_s, cpu_s = measure(list_every_s)
        hour_s = cpu_s * 3600 / CALM_S
        baseline_s = baseline_s or hour_s
        rows.append(
            [
                name,
                milliseconds(percentile(took_s, 50), 3),
                milliseconds(percentile(took_s, 99), 3),
                f"{hour_s:.2f} s",
                f"{hour_s / 36:.3f} %",
                ratio(hour_s, baseline_s),
            ]
        )
    columns = ["sample", "p50", "p99", "CPU an hour", "of a core", "ratio"]
    show(title, columns, rows, [*notes, f"An hour is {3600 / CALM_S:.0f} samples; nothing moves meanwhile."])


def measure(list_every_s: float) -> tuple[list[float], float]:
    """How long each sample took, and the CPU seconds of one in the mean, at the pace of an idle server."""
    with opened(list_every_s) as devices:
        took_s = []
        cpu_began_s = time.process_time()
        for number in range(SAMPLES):
            begun_s = time.perf_counter()
            devices.sample({}, number * CALM_S)
            took_s.append(time.perf_counter() - begun_s)
        return took_s, (time.process_time() - cpu_began_s) / SAMPLES


@contextmanager
def opened(list_every_s: float) -> Iterator[NvmlDevices]:
    devices = NvmlDevices(0, list_every_s=list_every_s)
    devices.open()
    try:
        yield devices
    finally:
        devices.close()


if __name__ == "__main__":
    say("monitor: samples one after the other, without pauses")
    main(sys.argv[1:])
