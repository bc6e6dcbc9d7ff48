"""The whole installation as compose brings it up, with local images and with names of a test's own."""

import contextlib
import os
import random
import ssl
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import docker
import httpx
import yaml

from orchestrator.local.demo import make_demo
from tests.hub.server import Hub
from tests.images.build import build_mimic
from tests.images.llama_cpp import build_llama_cpp
from tests.images.stack import build_doors, build_orchestrator
from tests.support import eventually, free_port

ROOT = Path(__file__).parents[2]
FILES = ("compose.yaml", "compose.cpu.yaml")
REPO = "test/salad-GGUF"
MODEL_FILE = "Salad-Q4_K_M.gguf"
ADMIN_KEY = "/data/state/admin.key"
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
    """One installation. `http` and `https` are Caddy's, by this machine's address.

    Of the network beside it the containers' half is trusted, and this machine's address is not.
    """

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.name = f"test{uuid.uuid4().hex[:12]}"
        self.folder = folder
        self.docker = docker.from_env(timeout=120)
        self.volume = f"{self.name}-hf-cache"
        self.key = ""
        self.front = ip_network(f"10.{random.randrange(128, 256)}.{random.randrange(256)}.0/24")
        _, trusted = self.front.subnets()
        self.files = (*FILES, str(folder / "compose.front.yaml"))
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
            "HF_ENDPOINT": hub.url_for(self.address()),
            "TRUSTED_NETWORKS": f"{trusted}=inference+admin",
            "LAN_ADDRESS": "127.0.0.1",
            "HTTPS_NAMES": " ".join(host for host in HOSTS if host),
        }

    # --- what it reads

    def write(self) -> None:
        """A model of real llama.cpp whose file is to be downloaded, and a mimic."""
        llama = yaml.safe_load((ROOT / "deploy" / "cpu" / "llama-cpp" / "service.yaml").read_text())
        self._write("services/llama-cpp/service.yaml", llama | {"image": build_llama_cpp()})
        self._write("services/mimic/service.yaml", {"image": build_mimic(), "stop_grace": "2s"})
        source = {"repo": REPO, "file": "*q4_k_m.gguf"}
        salad = {"service": "llama-cpp", "source": source, "context_size": 2048, "container_name": self.name}
        models = {"salad": salad, "mimic": {"service": "mimic", "memory": "64MiB"}}
        self._write("config/models.yaml", {"models": models})
        self._write("config/orchestrator.yaml", {"host_memory_mib": 512, "allowed_hosts": ["box.lan"]})
        first, last = self.front.subnets()
        pool = {"subnet": str(self.front), "ip_range": str(last), "gateway": str(next(first.hosts()))}
        self._write("compose.front.yaml", {"networks": {"front": {"ipam": {"config": [pool]}}}})

    def _write(self, name: str, data: Any) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(data))

    # --- running it

    def compose(self, *arguments: str) -> str:
        return compose(*arguments, env=self.env, files=self.files)

    def orchestrator(self, *command: str) -> str:
        """What a command in the orchestrator's container prints."""
        return self.compose("exec", "-T", "orchestrator", *command)

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
        command: dict[str, Any] = {"entrypoint": ["python3", "-c", script], "network": f"{self.name}_front"}
        output = self.docker.containers.run(self.env["ORCHESTRATOR_IMAGE"], **command, remove=True)
        return bytes(output).decode()

    def address(self) -> str:
        """This machine's, as containers reach it."""
        (pool,) = self.docker.networks.get("bridge").attrs["IPAM"]["Config"]
        return str(next(ip_network(pool["Subnet"]).hosts()))

    # --- seeing it from the house

    def ask(self, method: str, url: str, host: str | None = None, **more: Any) -> httpx.Response:
        """As a machine would whose resolver leads this name here."""
        with self.client(host) as http:
            return http.request(method, url, **more)

    def client(self, host: str | None = None) -> httpx.Client:
        """A client with the admin key that trusts the installation's own authority, and nobody else."""
        trust = ssl.create_default_context(cadata=self.authority())
        headers = {"X-Api-Key": self.key} | ({"Host": host} if host else {})
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


@contextlib.contextmanager
def salad_hub(folder: Path) -> Iterator[Hub]:
    """A hub that containers reach, with one small model."""
    make_demo(folder / MODEL_FILE, 7)
    with contextlib.closing(Hub("0.0.0.0", 0)) as hub:
        hub.add(REPO, {MODEL_FILE: folder / MODEL_FILE})
        yield hub


@contextlib.contextmanager
def running_stack(folder: Path, hub: Hub) -> Iterator[Stack]:
    """Up and ready; at the end nothing of it is left. Raises AssertionError with the containers' logs."""
    stack = Stack(folder, hub)
    stack.write()
    try:
        stack.up()
        stack.wait_certified()
        stack.key = stack.orchestrator("cat", ADMIN_KEY).strip()
        stack.orchestrator("orchestrator", "pull", "salad")
        yield stack
    except BaseException:
        print(stack.compose("logs", "--no-color", "--tail", "100"))
        raise
    finally:
        stack.remove()
    assert stack.left() == []
