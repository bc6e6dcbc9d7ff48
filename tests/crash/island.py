"""A Docker engine of our own, in network and mount namespaces of its own, to stop, freeze and kill.

The main engine of the machine, its bridges and its rules are out of its sight. containerd runs beside it, as
installations have it, so that it outlives the engine. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.support import eventually

CLONE_NEWNET = 0x40000000
START_S = 60.0
STOP_S = 60.0
ANSWER_S = 5
PROGRAMS = ("unshare", "nsenter", "dockerd", "containerd", "docker", "ip")
CONTAINERD = """\
version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri"]
root = "{root}/containerd"
state = "{root}/containerd-state"
[grpc]
address = "{root}/containerd.sock"
"""


class Island:
    """The namespaces, and in them containerd and dockerd. `live_restore` keeps containers without dockerd."""

    def __init__(self, root: Path, live_restore: bool) -> None:
        self.root = root
        self.live_restore = live_restore
        self.socket = root / "docker.sock"
        self._holder: subprocess.Popen[bytes] | None = None
        self._containerd: subprocess.Popen[bytes] | None = None
        self._engine: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """As DOCKER_HOST has it."""
        return f"unix://{self.socket}"

    # --- the engine

    def start_engine(self) -> None:
        """Start dockerd, and wait until it answers."""
        self.launch_engine()
        eventually(self.answers, START_S, every_s=0.05)

    def launch_engine(self) -> None:
        where = ["--data-root", f"{self.root}/data", "--exec-root", f"{self.root}/exec"]
        where += ["--pidfile", f"{self.root}/docker.pid", "-H", self.url]
        where += ["--containerd", f"{self.root}/containerd.sock", f"--live-restore={self.live_restore}"]
        (self.root / "docker.pid").unlink(missing_ok=True)
        self._engine = self._spawn("dockerd", *where)

    def answers(self) -> bool:
        assert self._engine is not None
        code = self._engine.poll()
        assert code is None, f"dockerd ended with {code}:\n{(self.root / 'dockerd.log').read_text()[-4000:]}"
        try:
            return self.docker("info", timeout_s=ANSWER_S).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    def signal_engine(self, number: signal.Signals) -> None:
        assert self._engine is not None
        self._engine.send_signal(number)

    def stop_engine(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End dockerd with this signal, and wait until it has."""
        assert self._engine is not None
        self._engine.send_signal(number)
        self._engine.wait(STOP_S)

    def revive(self) -> None:
        """Whatever was done to the engine, it runs and answers."""
        assert self._engine is not None
        if self._engine.poll() is None:
            self.signal_engine(signal.SIGCONT)
        else:
            self.start_engine()

    def docker(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[bytes]:
        command = ["docker", "-H", self.url, *arguments]
        return subprocess.run(command, capture_output=True, timeout=timeout_s)

    def copy_image(self, tag: str) -> None:
        """From the machine's engine, through a pipe."""
        with subprocess.Popen(["docker", "save", tag], stdout=subprocess.PIPE) as saved:
            loaded = subprocess.run(
                ["docker", "-H", self.url, "load"], stdin=saved.stdout, capture_output=True
            )
        assert loaded.returncode == 0, loaded.stderr.decode()

    # --- the namespaces

    def open(self) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        assert not missing and os.geteuid() == 0, (
            f"a Docker engine of its own needs root and {', '.join(missing or PROGRAMS)}; "
            "leave these tests out by name with -m 'not docker'"
        )
        inside = "ip link set lo up && mount --make-rprivate / && echo ready && exec sleep infinity"
        command = ["unshare", "--net", "--mount", "sh", "-c", inside]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n", "no namespaces of our own"
        config = self.root / "containerd.toml"
        config.write_text(CONTAINERD.format(root=self.root))
        self._containerd = self._spawn("containerd", "-c", str(config))
        eventually((self.root / "containerd.sock").exists, START_S, every_s=0.05)

    def close(self) -> None:
        if self._engine is not None and self._engine.poll() is None:
            self.signal_engine(signal.SIGCONT)
            ids = self.docker("ps", "-aq").stdout.decode().split()
            if ids:
                self.docker("rm", "-f", *ids)
            self.stop_engine()
        if self._holder is None:
            return
        for pid in inside(self._holder.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # containerd, its shims and all that they still hold
        self._holder.wait()
        if self._containerd is not None:
            self._containerd.wait()

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and what it starts, is in the island's network meanwhile."""
        assert self._holder is not None
        namespace = Path(f"/proc/{self._holder.pid}/ns/net")
        with Path("/proc/thread-self/ns/net").open("rb") as home, namespace.open("rb") as there:
            enter(there.fileno())
            try:
                yield
            finally:
                enter(home.fileno())

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        assert self._holder is not None
        command = ["nsenter", f"--target={self._holder.pid}", "--net", "--mount", program, *arguments]
        with (self.root / f"{program}.log").open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )


def enter(namespace: int) -> None:
    """Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def inside(holder: int) -> set[int]:
    """Every process in the mount namespace of `holder`, itself included, and all that these started."""
    wanted = Path(f"/proc/{holder}/ns/mnt").readlink()
    found, children = set(), dict[int, list[int]]()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
            if (folder / "ns/mnt").readlink() == wanted:
                found.add(int(folder.name))
    new = list(found)
    while new:
        found.update(new)
        new = [child for pid in new for child in children.get(pid, ()) if child not in found]
    return found


@contextlib.contextmanager
def island(live_restore: bool) -> Iterator[Island]:
    """An engine that runs; this thread is in its network. At the end nothing of it is left."""
    with tempfile.TemporaryDirectory(prefix="island-", ignore_cleanup_errors=True) as folder:
        made = Island(Path(folder), live_restore)
        try:
            made.open()
            made.start_engine()
            with made.entered():
                yield made
        finally:
            made.close()
