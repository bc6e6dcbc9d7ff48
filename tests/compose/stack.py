"""The whole installation as compose brings it up, with local images and with names of a test's own."""

import contextlib
import io
import os
import ssl
import subprocess
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import docker
import httpx
import yaml

from orchestrator.local.demo import make_demo
from tests.images.build import build_base, build_llama, build_mimic
from tests.images.stack import build_doors, build_orchestrator
from tests.support import eventually, free_port

ROOT = Path(__file__).parents[2]
FILES = ("compose.yaml", "compose.cpu.yaml")
LLAMA_FILES = ("orchestrator/__init__.py", "orchestrator/local/__init__.py", "orchestrator/local/llama.py")
MODEL_FILE = "hub/models--test--salad-GGUF/snapshots/main/salad.gguf"
OWNER = 1000
READY_S = 60
# Caddy tidies its storage as it starts, and may sweep up a certificate that it is just writing: then it makes
# that one a minute later.
CERTIFIED_S = 90
HOSTS = (None, "llama.lan", "orchestrator.lan", "box.lan")


def compose(*arguments: str, env: Mapping[str, str], files: tuple[str, ...] = FILES) -> str:
    """What docker-compose prints. Raises AssertionError with what it complains of."""
    named = [word for file in files for word in ("-f", str(ROOT / file))]
    command = ["docker-compose", *named, *arguments]
    done = subprocess.run(command, env={**os.environ, **env}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Stack:
    """One installation. `http` and `https` are Caddy's, by this machine's address."""

    def __init__(self, folder: Path) -> None:
        self.name = f"test{uuid.uuid4().hex[:12]}"
        self.folder = folder
        self.docker = docker.from_env(timeout=120)
        self.volume = f"{self.name}-hf-cache"
        ports = {"HTTP_PORT": str(free_port()), "HTTPS_PORT": str(free_port())}
        self.http = f"http://127.0.0.1:{ports['HTTP_PORT']}"
        self.https = f"https://127.0.0.1:{ports['HTTPS_PORT']}"
        self.env = ports | {
            "COMPOSE_PROJECT_NAME": self.name,
            "ORCHESTRATOR_IMAGE": build_orchestrator(),
            "CADDY_IMAGE": build_doors(),
            "SOCKET_PROXY_IMAGE": build_doors(),
            "CONFIG": str(folder / "config"),
            "SERVICES": str(folder / "services"),
            "CPU_SERVICE": str(folder / "services" / "llama-cpp"),
            "MODELS_NETWORK": f"{self.name}-models",
            "HF_CACHE_VOLUME": self.volume,
            "STATE_VOLUME": f"{self.name}-state",
            "CADDY_VOLUME": f"{self.name}-caddy",
            "LAN_ADDRESS": "127.0.0.1",
            "HTTPS_NAMES": " ".join(host for host in HOSTS if host),
        }

    # --- what it reads

    def write(self) -> None:
        """A model of real llama.cpp whose file lies in the shared cache, and a mimic."""
        llama = yaml.safe_load((ROOT / "services" / "llama-cpp" / "service.yaml").read_text())
        llama |= {"image": build_llama({name: ROOT / name for name in LLAMA_FILES}), "memory": "declared"}
        llama["volumes"] = {self.volume: "/data/.huggingface"}
        llama["environment"]["MODEL_PATH"] = f"/data/.huggingface/{MODEL_FILE}"
        self._write("services/llama-cpp/service.yaml", llama)
        self._write("services/mimic/service.yaml", {"image": build_mimic(), "stop_grace": "2s"})
        salad = {"service": "llama-cpp", "memory": "64MiB", "context_size": 2048, "container_name": self.name}
        models = {"salad": salad, "mimic": {"service": "mimic", "memory": "64MiB"}}
        self._write("config/models.yaml", {"models": models})
        self._write("config/orchestrator.yaml", {"host_memory_mib": 256, "allowed_hosts": ["box.lan"]})

    def _write(self, name: str, data: Any) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(data))

    def fill_cache(self) -> None:
        """Put the model's file where a download of the cache's owner would."""
        make_demo(self.folder / "salad.gguf", 7)
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name in reversed(Path(MODEL_FILE).parents[:-1]):
                tar.add(self.folder, str(name), recursive=False, filter=owned)
            tar.add(self.folder / "salad.gguf", MODEL_FILE, filter=owned)
        mounts = {self.volume: {"bind": "/volume", "mode": "rw"}}
        box = self.docker.containers.create(build_base(), volumes=mounts)
        box.put_archive("/volume", archive.getvalue())
        box.remove()

    # --- running it

    def compose(self, *arguments: str) -> str:
        return compose(*arguments, env=self.env)

    def up(self, *arguments: str) -> None:
        self.compose("up", "-d", "--no-build", *arguments)
        self.wait_ready()

    def wait_ready(self) -> None:
        eventually(self._is_ready, READY_S, every_s=0.1)

    def _is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.http}/readyz", timeout=30, trust_env=False).status_code == 200
        return False

    def wait_certified(self) -> None:
        """Wait until https answers by every name, and by the address."""
        for host in HOSTS:
            eventually(lambda host=host: self._is_certified(host), CERTIFIED_S, every_s=0.2)  # type: ignore[misc]

    def _is_certified(self, host: str | None) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.ask("GET", f"{self.https}/healthz", host).status_code == 200
        return False

    def container(self, service: str) -> Any:
        """Compose's container of a service of compose.yaml."""
        labels = [f"com.docker.compose.project={self.name}", f"com.docker.compose.service={service}"]
        (found,) = self.docker.containers.list(filters={"label": labels})
        return found

    def model_container(self, model: str) -> Any:
        filters = {"label": f"ai.orchestrator.model={model}", "network": self.env["MODELS_NETWORK"]}
        (found,) = self.docker.containers.list(filters=filters)
        return found

    def run_inside(self, script: str) -> str:
        """What a Python script prints in a container of its own, on the network of the house's services."""
        command = ["python3", "-c", script]
        output = self.docker.containers.run(build_base(), command, network=f"{self.name}_front", remove=True)
        return bytes(output).decode()

    # --- seeing it from the house

    def ask(self, method: str, url: str, host: str | None = None, **more: Any) -> httpx.Response:
        """As a machine would whose resolver leads this name here."""
        with self.client(host) as http:
            return http.request(method, url, **more)

    def client(self, host: str | None = None) -> httpx.Client:
        """A client that trusts the installation's own authority, and nobody else."""
        trust = ssl.create_default_context(cadata=self.authority())
        headers = {"Host": host} if host else {}
        http = httpx.Client(verify=trust, headers=headers, timeout=60, trust_env=False)
        if host:
            http.event_hooks["request"] = [lambda request: request.extensions.update(sni_hostname=host)]
        return http

    def authority(self) -> str:
        return httpx.get(f"{self.http}/ca.crt", trust_env=False).raise_for_status().text

    # --- leaving nothing behind

    def remove(self) -> None:
        network = self.env["MODELS_NETWORK"]
        for box in self.docker.containers.list(
            all=True, filters={"label": "ai.orchestrator.attempt", "network": network}
        ):
            box.remove(force=True)
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")
        self.docker.close()

    def left(self) -> list[str]:
        """Everything with its name that the engine has."""
        with contextlib.closing(docker.from_env()) as client:
            boxes = [box.name for box in client.containers.list(all=True, filters={"name": self.name})]
            networks = [network.name for network in client.networks.list(names=[self.name])]
            volumes = [volume.name for volume in client.volumes.list(filters={"name": self.name})]
            return boxes + networks + volumes


def owned(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = OWNER
    entry.mode = 0o755 if entry.isdir() else 0o644
    return entry


@contextlib.contextmanager
def running_stack(folder: Path) -> Iterator[Stack]:
    """Up and ready; at the end nothing of it is left. Raises AssertionError with the containers' logs."""
    stack = Stack(folder)
    stack.write()
    try:
        stack.up()
        stack.wait_certified()
        stack.fill_cache()
        yield stack
    except BaseException:
        print(stack.compose("logs", "--no-color", "--tail", "100"))
        raise
    finally:
        stack.remove()
    assert stack.left() == []
