"""Run the real server as a process of its own, for tests that see it from outside.

with running_server(tmp_path, models={"alpha": {"memory": "64MiB"}}) as server:
    httpx.get(f"{server.url}/state")
    server.kill()       # SIGKILL; its models go on, as they do for a user
    server.restart()    # the same URL, the same database
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml

from orchestrator.client.http import Client
from tests.mimic.process import SOURCE
from tests.support import eventually

ORCHESTRATOR = Path(sys.executable).with_name("orchestrator")
OWNER_LABEL = "ai.orchestrator.owner"
MARK = "TEST_SERVER"  # in the environment of the server, and so of all that it starts as processes
SERVING = re.compile(r"serving on (http://\S+)")
START_S = 60.0  # a busy machine takes long over the imports alone
STOP_S = 30.0
NO_HUB = "http://127.0.0.1:9"  # where nobody listens: no test asks a hub that is not its own


def mimic_service(**more: Any) -> dict[str, Any]:
    """A service.yaml for mimics; give `image` to start them as containers."""
    command = [sys.executable, "-S", "-E", str(SOURCE)]
    health = {"path": "/health", "start_timeout": "60s"}
    return {"command": command, "health": health, "memory": "declared", "stop_grace": "2s"} | more


def mimic_model(memory: str = "64MiB", **more: Any) -> dict[str, Any]:
    """A model of the service `mimic`; `environment` holds its MIMIC_ variables."""
    return {"service": "mimic", "memory": memory} | more


def outside_environment() -> dict[str, str]:
    """Our environment without what would configure an orchestrator or its command."""
    return {key: value for key, value in os.environ.items() if not key.startswith("ORCHESTRATOR_")}


class RunningServer:
    """One server and the folder it lives in. `url` stays the same over restarts."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], env: Mapping[str, str]) -> None:
        self.folder = folder
        self.config = folder / "orchestrator.yaml"
        self.state_dir = folder / "state"
        self.log_file = folder / "server.log"
        self.url = ""
        self.key: str | None = None  # what `client` shows it
        self.process: subprocess.Popen[bytes] | None = None
        self.settings = {
            "host": "127.0.0.1",
            "port": 0,
            "database": str(self.state_dir / "orchestrator.db"),
            "services": str(folder / "services"),
            "models": str(folder / "models.yaml"),
            "engine": "process",
            "devices": "host",
            "host_memory_mib": 1024,
            "stop_containers_on_exit": True,
            **settings,
        }
        self._mark = uuid.uuid4().hex
        hub = {"HF_HOME": str(folder / "huggingface"), "HF_ENDPOINT": NO_HUB}
        self.env = outside_environment() | hub | {MARK: self._mark} | dict(env)

    # --- what it reads

    def write_models(self, models: Mapping[str, Any] | str) -> None:
        """models.yaml: as text, or as models by name (those without a service are mimics)."""
        if not isinstance(models, str):
            entries = {name: mimic_model() | dict(entry) for name, entry in models.items()}
            models = yaml.safe_dump({"models": entries}, sort_keys=False)
        (self.folder / "models.yaml").write_text(models)

    def write_service(self, name: str, service: Mapping[str, Any]) -> None:
        path = self.folder / "services" / name / "service.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dict(service), sort_keys=False))

    def write_settings(self, **changed: Any) -> None:
        """orchestrator.yaml, with these settings changed; a restart reads them."""
        self.settings |= changed
        self.config.write_text(yaml.safe_dump(self.settings, sort_keys=False))

    # --- running it

    def launch(self) -> "RunningServer":
        """Start the process without waiting; after the first time it is given the same port again."""
        command = [str(ORCHESTRATOR), "serve", "--config", str(self.config)]
        if self.url:
            command += ["--port", self.url.rpartition(":")[2]]
        self._log_offset = self.log_file.stat().st_size if self.log_file.exists() else 0
        with self.log_file.open("ab") as out:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        return self

    def start(self, timeout_s: float = START_S) -> "RunningServer":
        """Start the process, and wait until it says that it is ready."""
        self.launch()
        self.wait_listening(timeout_s)
        self.wait_ready(timeout_s)
        return self

    def wait_listening(self, timeout_s: float = START_S) -> None:
        """Wait until /healthz answers. Raises AssertionError with the log if the process ends instead."""
        self.url = eventually(self._announced_url, timeout_s)
        eventually(lambda: self._answers("/healthz"), timeout_s, every_s=0.02)

    def wait_ready(self, timeout_s: float = START_S) -> None:
        eventually(lambda: self._answers("/readyz"), timeout_s, every_s=0.02)

    def _announced_url(self) -> str:
        written = self.log_file.read_bytes()[self._log_offset :].decode(errors="replace")
        found = SERVING.search(written)
        if found is None:
            self._assert_alive()
        return found[1] if found else ""

    def _answers(self, path: str) -> bool:
        self._assert_alive()
        with contextlib.suppress(httpx.TransportError), httpx.Client(trust_env=False) as http:
            return http.get(self.url + path, timeout=5).status_code == 200
        return False

    def _assert_alive(self) -> None:
        assert self.process is not None, "the server was never started"
        code = self.process.poll()
        assert code is None, f"the server ended with {code}:\n{self.log()}"

    def stop(self) -> int:
        """SIGTERM, and the exit code. Raises AssertionError if it had to be killed."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not end within {STOP_S} s:\n{self.log()}") from None

    def kill(self) -> None:
        """SIGKILL to the server alone; what it started goes on."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def restart(self, timeout_s: float = START_S) -> "RunningServer":
        """Start it again at the same URL, first stopping it if it still runs."""
        if self.is_running:
            self.stop()
        return self.start(timeout_s)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    # --- seeing it from outside

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        """All that it wrote, over all restarts."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def client(self, timeout: float = 30.0) -> Client:
        return Client(self.url, timeout, self.key)

    def state(self) -> dict[str, Any]:
        with self.client() as client:
            return client.state()

    def model(self, model: str) -> dict[str, Any]:
        with self.client() as client:
            return client.model(model)

    def wait_state(self, model: str, *states: str, timeout_s: float = 20.0) -> dict[str, Any]:
        """Wait until the model is in one of these states, and return its view."""

        def found() -> dict[str, Any] | None:
            view = self.model(model)
            return view if view["state"] in states else None

        view = eventually(found, timeout_s, every_s=0.02)
        assert view is not None
        return view

    def load(self, model: str) -> dict[str, Any]:
        """Load and wait. Raises ApiError."""
        with self.client() as client:
            return client.load(model, wait=True)

    def unload(self, model: str) -> dict[str, Any]:
        with self.client() as client:
            return client.unload(model)

    def model_processes(self) -> dict[int, str]:
        """Command lines by PID of all that this server (or one before it) started as processes."""
        marked = marked_processes(self._mark)
        return {pid: line for pid, line in marked.items() if not self.is_running or pid != self.pid}

    def run(self, *arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
        """The installed command against this server, with what it printed; see `run_command`."""
        return run_command(*arguments, url=self.url, cwd=self.folder, **more)

    # --- leaving nothing behind

    def clean_up(self) -> None:
        """End whatever the server left running, as it does when it was killed."""
        for pid in marked_processes(self._mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: not marked_processes(self._mark), STOP_S, every_s=0.02)
        if self.settings["engine"] in ("docker", "auto"):
            remove_containers(self._owner())

    def _owner(self) -> str | None:
        import sqlite3

        path = Path(self.settings["database"])
        if not path.exists():
            return None
        with contextlib.closing(sqlite3.connect(path)) as database:
            row = database.execute("SELECT value FROM meta WHERE key = 'owner'").fetchone()
        return row[0] if row else None


@contextlib.contextmanager
def running_server(
    tmp_path: Path,
    models: Mapping[str, Any] | str | None = None,
    services: Mapping[str, Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    *,
    starts: bool = True,
) -> Iterator[RunningServer]:
    """A server in `tmp_path`, ready; at the end it is told to stop, and nothing of it is left.

    `models` is models.yaml as text, or its models by name: `{"alpha": {"memory": "200MiB"}}`; where an
    entry names no service it is a mimic of 64 MiB. `services` are service.yaml files by name (`mimic`
    unless given). `settings` win over those of RunningServer: `engine` (process), `devices` (host),
    `host_memory_mib` (1024), … `env` is added to the server's environment, which models that are
    processes inherit: pass `SimulatedGpus.env` together with `devices: nvml`. With `starts=False` the
    files are there and nothing runs.
    """
    server = RunningServer(tmp_path, settings or {}, env or {})
    server.write_models({"alpha": {}} if models is None else models)
    for name, service in ({"mimic": mimic_service()} if services is None else services).items():
        server.write_service(name, service)
    server.write_settings()
    try:
        if starts:
            server.start()
        yield server
        if server.is_running:
            server.stop()
    finally:
        if server.is_running:
            server.kill()
        server.clean_up()


def run_command(
    *arguments: str,
    url: str | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 60.0,
) -> "subprocess.CompletedProcess[str]":
    """The installed `orchestrator` command; `returncode`, `stdout` and `stderr` say how it went."""
    found = outside_environment() | ({"ORCHESTRATOR_URL": url} if url else {}) | dict(env or {})
    return subprocess.run(
        [str(ORCHESTRATOR), *arguments],
        cwd=cwd,
        env=found,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def marked_processes(mark: str) -> dict[int, str]:
    """Living processes with this mark in their environment: command lines by PID."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(folder.name)] = line
    return found


def remove_containers(owner: str | None) -> None:
    if owner is None:
        return
    import docker

    with contextlib.closing(docker.from_env()) as engine:
        for container in engine.containers.list(
            all=True, ignore_removed=True, filters={"label": f"{OWNER_LABEL}={owner}"}
        ):
            with contextlib.suppress(docker.errors.NotFound):
                container.remove(force=True)
