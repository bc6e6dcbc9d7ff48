"""Start mimics as host processes, for tests."""

import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import eventually

SOURCE = Path(__file__).with_name("mimic.py")
COMMAND = (sys.executable, "-S", "-E", str(SOURCE))


class MimicProcess:
    """A running mimic and what it printed so far."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._readers = [
            self._collect(process.stdout, self.lines),
            self._collect(process.stderr, self.errors),
        ]

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        """The port it listens on, as soon as it does."""
        first = eventually(
            lambda: next((line for line in self.lines if line.startswith("listening on ")), None)
        )
        return int(first.split()[-1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_ready(self) -> "MimicProcess":
        eventually(lambda: "ready" in self.lines)
        return self

    def wait_exit(self, timeout_s: float = 10) -> int:
        """The exit code; afterwards `lines` and `errors` are complete."""
        code = self.process.wait(timeout_s)
        for reader in self._readers:
            reader.join(timeout_s)
        return code

    def get(self, path: str) -> tuple[int, dict]:
        return self.ask("GET", path)

    def post(self, path: str, body: object) -> tuple[int, dict]:
        return self.ask("POST", path, body)

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, dict]:
        """Send JSON on a connection of its own; returns the status and the answer's JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read() or b"{}")
        finally:
            connection.close()

    def stats(self) -> dict[str, int]:
        return self.get("/stats")[1]

    @staticmethod
    def _collect(stream: Iterator[str] | None, lines: list[str]) -> threading.Thread:
        assert stream is not None
        thread = threading.Thread(target=lambda: lines.extend(_lines(stream)), daemon=True)
        thread.start()
        return thread


def _lines(stream: Iterator[str]) -> Iterator[str]:
    return (line.rstrip("\n") for line in stream)


@contextmanager
def mimic(env: dict[str, str] | None = None, **settings: object) -> Iterator[MimicProcess]:
    """Run a mimic on a free port; it is killed on exit if it still lives.

    `env` is added to ours (pass `SimulatedGpus.env`), and each keyword names a MIMIC_ variable in
    lower case, without the prefix: `mimic(gpus.env, mib=500, cuda_visible_devices="0")` as well as
    HOST, PORT and CUDA_VISIBLE_DEVICES, which are passed as they are.
    """
    as_they_are = {"host", "port", "cuda_visible_devices", "nvidia_visible_devices"}
    named = {
        key.upper() if key in as_they_are else f"MIMIC_{key.upper()}": str(value)
        for key, value in settings.items()
    }
    full_env = os.environ | {"PORT": "0"} | (env or {}) | named
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(COMMAND, env=full_env, text=True, **pipes) as process:
        running = MimicProcess(process)
        try:
            yield running
        finally:
            process.kill()
            running.wait_exit()
