"""Real HAProxy with our own configuration, as a process of this machine."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support import eventually, free_port

CONFIG = Path(__file__).parents[2] / "deploy" / "socket-proxy" / "haproxy.cfg"
START_S = 10


class Proxy:
    """One that runs. `url` is as DOCKER_HOST has it."""

    def __init__(self, url: str, pid: int, log_file: Path) -> None:
        self.url = url
        self._pid = pid
        self._log_file = log_file

    def log(self) -> str:
        return self._log_file.read_text()

    def open_sockets(self) -> int:
        """Those of both sides, clients and the engine."""
        links = Path(f"/proc/{self._pid}/fd").iterdir()
        return sum(target_of(link).startswith("socket:") for link in links)


@contextlib.contextmanager
def socket_proxy(folder: Path, network: str) -> Iterator[Proxy]:
    """The socket proxy on a free port of the loopback address."""
    port, log_file = free_port(), folder / "haproxy.log"
    config = folder / "haproxy.cfg"
    config.write_text(CONFIG.read_text().replace("bind :2375", f"bind 127.0.0.1:{port}"))
    env = {**os.environ, "MODELS_NETWORK": network}
    with log_file.open("wb") as log:
        process = subprocess.Popen(["haproxy", "-db", "-f", str(config)], env=env, stdout=log, stderr=log)
    try:
        eventually(lambda: listens(port, process, log_file), START_S)
        yield Proxy(f"tcp://127.0.0.1:{port}", process.pid, log_file)
    finally:
        process.terminate()
        process.wait(START_S)


def listens(port: int, process: "subprocess.Popen[bytes]", log_file: Path) -> bool:
    assert process.poll() is None, log_file.read_text()
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def target_of(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""  # it was closed meanwhile
