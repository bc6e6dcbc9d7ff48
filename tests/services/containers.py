"""Containers of services/llama-cpp as users start them, with the docker command; and what the README says."""

import json
import os
import re
import shlex
import subprocess
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.images.llama_cpp import SERVICE
from tests.support import eventually

README = (SERVICE / "README.md").read_text(encoding="utf-8")
SCRIPT = SERVICE / "download-model.sh"
CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID")
LIKE_THE_ORCHESTRATOR = (
    *("--init", "--read-only", "--tmpfs", "/tmp", "--security-opt", "no-new-privileges", "--cap-drop", "ALL"),
    *(word for capability in CAPABILITIES for word in ("--cap-add", capability)),
)
"""What its containers may not do; and a root file system that cannot be written."""


def run(*words: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    """A command with what it printed; it may fail."""
    return subprocess.run(words, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, **more)


def docker(*words: str) -> str:
    """What a docker command prints. Raises AssertionError if it fails."""
    done = run("docker", *words)
    assert done.returncode == 0, f"docker {shlex.join(words)}: {done.stderr}"
    return done.stdout


def readme_section(title: str) -> str:
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, title
    return re.sub(r"^(```sh\n)?# .*?$", "", found[1])


def curl_body(title: str) -> dict[str, Any]:
    """The JSON that the first curl of a section of the README sends."""
    found = re.search(r"-d '(\{.*?\n  \})'", readme_section(title), re.DOTALL)
    assert found, title
    return dict(json.loads(found[1]))


def commands(text: str) -> list[list[str]]:
    """The words of each command in the text's shell blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


@dataclass
class Container:
    """A running container; `port` is where the server inside it listens."""

    name: str
    port: int = 8000
    environment: Mapping[str, str] = field(default_factory=dict)

    def get(self, path: str) -> Any:
        text = self.get_text(path)
        return json.loads(text)

    def get_text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return str(answer.read().decode())

    def stream(self, path: str, **body: Any) -> Any:
        """A streamed answer: a context that reads as a file."""
        data = json.dumps({"stream": True, **body}).encode()
        asked = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(asked, timeout=30)

    @property
    def url(self) -> str:
        address = docker("inspect", "-f", "{{.NetworkSettings.IPAddress}}", self.name).strip()
        return f"http://{address}:{self.port}"

    def log(self) -> str:
        done = run("docker", "logs", self.name)
        return done.stdout + done.stderr

    def wait_ready(self) -> "Container":
        def is_ready() -> bool:
            assert self.is_running, self.log()
            try:
                return bool(self.get("/health"))
            except OSError:
                return False

        eventually(is_ready, 30, every_s=0.05)
        return self

    @property
    def is_running(self) -> bool:
        return docker("inspect", "-f", "{{.State.Running}}", self.name).strip() == "true"

    def wait_end(self) -> int:
        return int(docker("wait", self.name))

    def of_server(self, script: str) -> str:
        """What a shell script says in the folder of /proc that is the server's."""
        find = "cd $(dirname $(grep -ls ^/opt/llama-cpp/bin/llama-server /proc/[0-9]*/cmdline))"
        return docker("exec", self.name, "sh", "-c", f"{find} && {script}")

    def option(self, name: str) -> str:
        """What the server was told on its command line."""
        words = self.of_server("cat cmdline").split("\0")
        return words[words.index(name) + 1]


@contextmanager
def container(
    image: str, *words: str, port: int = 8000, options: tuple[str, ...] = (), **environment: str
) -> Iterator[Container]:
    """`docker run` of the image; `words` are the command. It is gone at the end."""
    name = f"llama-cpp-{uuid.uuid4().hex[:8]}"
    variables = [word for key, value in environment.items() for word in ("--env", f"{key}={value}")]
    docker("run", "--detach", "--name", name, *LIKE_THE_ORCHESTRATOR, *variables, *options, image, *words)
    try:
        yield Container(name, port, environment)
    finally:
        run("docker", "rm", "--force", name)


def in_volume(image: str, volume: str, script: str, user: str = "0") -> str:
    """What a shell script says that runs with the volume at /data/.huggingface, without our entrypoint."""
    mount = f"{volume}:/data/.huggingface"
    return docker("run", "--rm", "--user", user, "--entrypoint", "sh", "-v", mount, image, "-c", script)


def script_environment(image: str, volume: str, hub: str, **more: str) -> dict[str, str]:
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HF_", "LLAMA_", "PUID", "PGID"))
    }
    return {**kept, "LLAMA_CPP_IMAGE": image, "HF_CACHE_VOLUME": volume, "HF_ENDPOINT": hub, **more}
