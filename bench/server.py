"""A real orchestrator in a process of its own, with a catalogue and a database in a temporary folder."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

HOST = "127.0.0.1"
START_LIMIT_S = 30.0
CALL_LIMIT_S = 120.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SERVING = re.compile(r"serving on http://[\d.]+:(\d+)")

Catalogue = Mapping[str, Mapping[str, Any]]


class Server:
    """A running orchestrator: asked over HTTP, measured through /proc."""

    def __init__(self, pid: int, port: int, folder: Path) -> None:
        self.pid = pid
        self.port = port
        self.folder = folder
        self.key = ""
        self._connection = http.client.HTTPConnection(HOST, port, timeout=CALL_LIMIT_S)

    def get(self, path: str) -> Any:
        return self._ask("GET", path)

    def post(self, path: str, body: Mapping[str, object]) -> Any:
        return self._ask("POST", path, json.dumps(body))

    def load(self, model: str) -> float:
        """Load, and return the seconds until the answer says that it is ready."""
        begun_s = time.perf_counter()
        self.post("/models/load", {"model": model, "wait": True})
        return time.perf_counter() - begun_s

    def unload(self, model: str) -> None:
        self.post("/models/unload", {"model": model})

    def address(self, model: str) -> tuple[str, int]:
        """Where the model's own process or container listens."""
        host, _, port = self.get(f"/models/{model}")["instance"]["address"].rpartition(":")
        return host, int(port)

    def cpu_s(self) -> float:
        return cpu_s(self.pid)

    def _ask(self, method: str, path: str, body: str | None = None) -> Any:
        headers = {"content-type": "application/json"}
        if self.key:
            headers["authorization"] = f"Bearer {self.key}"
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        data = answer.read()
        if answer.status not in (200, 201):
            raise RuntimeError(f"{method} {path}: {answer.status} {data.decode(errors='replace')[:500]}")
        return json.loads(data)


def cpu_s(pid: int) -> float:
    """CPU time of all the process's threads, user and kernel, in seconds (to 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def resident_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no VmRSS")


@contextmanager
def serving(
    services: Catalogue,
    models: Catalogue,
    settings: Mapping[str, object],
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run an orchestrator with this catalogue; `settings` as in orchestrator.yaml."""
    with tempfile.TemporaryDirectory(prefix="orchestrator-bench-") as name:
        folder = Path(name)
        write_files(folder, services, models, settings)
        log = folder / "server.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", "serve", "--config", "orchestrator.yaml"],
                cwd=folder,
                env=clean_environment() | dict(environment or {}),
                stdout=output,
                stderr=output,
            )
        try:
            yield Server(process.pid, wait_for_port(process, log), folder)
        finally:
            end(process)


def clean_environment() -> dict[str, str]:
    """Ours without settings of the product, which would win over the file."""
    return {key: value for key, value in os.environ.items() if not key.startswith("ORCHESTRATOR_")}


def write_files(folder: Path, services: Catalogue, models: Catalogue, settings: Mapping[str, object]) -> None:
    for name, service in services.items():
        path = folder / "services" / name / "service.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump(dict(service)))
    (folder / "models.yaml").write_text(yaml.safe_dump({"models": {k: dict(v) for k, v in models.items()}}))
    chosen = {
        "host": HOST,
        "port": 0,
        "database": "state/orchestrator.db",
        "services": "services",
        "models": "models.yaml",
        **settings,
    }
    (folder / "orchestrator.yaml").write_text(yaml.safe_dump(chosen))


def wait_for_port(process: subprocess.Popen[bytes], log: Path) -> int:
    """The port it says it serves on, once it answers there."""
    until_s = time.monotonic() + START_LIMIT_S
    while time.monotonic() < until_s and process.poll() is None:
        found = SERVING.search(log.read_text(errors="replace"))
        if found and answers(int(found[1])):
            return int(found[1])
        time.sleep(0.02)
    raise RuntimeError(f"the orchestrator did not start:\n{log.read_text(errors='replace')[-3000:]}")


def answers(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
