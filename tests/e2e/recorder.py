"""Writes down who held simulated GPU memory when, as the device shows it and nobody else."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.nvml.simulated import SimulatedGpus

EVERY_S = 0.003
FOREIGN = "(foreign)"


@dataclass
class Run:
    """One process from its first byte on a GPU to its last; times are monotonic seconds."""

    pid: int
    model: str
    first_s: float
    last_s: float
    grown_s: float
    peak_mib: dict[int, int] = field(default_factory=dict)

    def saw(self, held_mib: dict[int, int], now_s: float) -> None:
        self.last_s = now_s
        for index, mib in held_mib.items():
            if mib > self.peak_mib.get(index, 0):
                self.peak_mib[index] = mib
                self.grown_s = now_s


class Recorder:
    """Samples the device in a thread of its own. A process that lived a few milliseconds was seen."""

    def __init__(self, gpus: SimulatedGpus) -> None:
        self._gpus = gpus
        self._runs: dict[int, Run] = {}
        self._done = threading.Event()
        self.samples = 0

    def runs(self, *models: str) -> list[Run]:
        """All runs of these models (or of all), in the order in which they took memory."""
        found = [run for run in list(self._runs.values()) if not models or run.model in models]
        return sorted(found, key=lambda run: run.first_s)

    def one_run(self, model: str) -> Run:
        """The model's only run. Raises AssertionError if it was started more or less often than once."""
        runs = self.runs(model)
        assert len(runs) == 1, f"'{model}' took memory {len(runs)} times: {runs}"
        return runs[0]

    def holding(self, model: str) -> dict[int, int]:
        """MiB by GPU that the model's processes hold at this moment."""
        held: dict[int, int] = {}
        for index in self._gpus.indices:
            for pid, mib in self._gpus.processes(index).items():
                if self._name(pid) == model:
                    held[index] = held.get(index, 0) + mib
        return held

    def pids(self, model: str) -> list[int]:
        """The model's processes that hold memory at this moment."""
        pids = {pid for index in self._gpus.indices for pid in self._gpus.processes(index)}
        return sorted(pid for pid in pids if self._name(pid) == model)

    @contextmanager
    def running(self) -> Iterator["Recorder"]:
        thread = threading.Thread(target=self._watch, name="recorder")
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()

    def _watch(self) -> None:
        while not self._done.wait(EVERY_S):
            held: dict[int, dict[int, int]] = {}
            for index in self._gpus.indices:
                with suppress(FileNotFoundError):  # the GPU is being taken out
                    for pid, mib in self._gpus.processes(index).items():
                        held.setdefault(pid, {})[index] = mib
            now_s = time.monotonic()
            for pid, held_mib in held.items():
                if pid not in self._runs:
                    self._runs[pid] = Run(pid, self._name(pid), now_s, now_s, now_s)
                self._runs[pid].saw(held_mib, now_s)
            self.samples += 1

    def _name(self, pid: int) -> str:
        """The model of a process that claims memory; tests run as root, so any process can be read."""
        known = self._runs.get(pid)
        return known.model if known else model_of(pid)


def model_of(pid: int) -> str:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return f"(PID {pid}, gone)"
    named = [line.partition("=")[2] for line in variables if line.startswith("MIMIC_NAME=")]
    return named[0] if named else FOREIGN
