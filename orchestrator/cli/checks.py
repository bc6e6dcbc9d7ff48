"""What `doctor` can see without a server: files, port, engine, GPUs, RAM. Nothing is changed."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator import __version__
from orchestrator.catalogue.read import Catalogue, host_budget_bytes, read_catalogue
from orchestrator.catalogue.yaml_lines import shown
from orchestrator.choosing import docker_version, nvml_problem, unused_gpus
from orchestrator.cli.address import url_of
from orchestrator.core.entities import MIB
from orchestrator.core.errors import CatalogueError, OrchestratorError, StoreError
from orchestrator.core.units import age
from orchestrator.diagnosis import (
    BAD,
    OK,
    WARNING,
    Check,
    catalogue_found,
    check_cache,
    check_unused,
    diagnosis_view,
)
from orchestrator.drivers.host import available_bytes, total_bytes
from orchestrator.settings import Settings, load_settings
from orchestrator.store.backup import check
from orchestrator.store.choice import look_at_choice
from orchestrator.store.copies import copies_of
from orchestrator.store.explain import explained
from orchestrator.store.files import beside
from orchestrator.store.obstacles import obstacle

LITTLE_RAM_MIB = 1024
LITTLE_DISK_MIB = 512
LISTENING = "0A"  # the state's number in /proc/net/tcp


def diagnose_without_server(why: str, config: Path | None) -> dict[str, object]:
    """The same shape as the server's own diagnosis."""
    checks = [Check("server", WARNING, why), *all_checks(config)]
    return diagnosis_view(checks, __version__)


def all_checks(config: Path | None) -> Iterator[Check]:
    try:
        settings = load_settings(config)
    except CatalogueError as error:
        yield from wrong("settings", error, "Mend it; nothing starts before.")
        return
    origin = (
        shown(settings.config) if settings.config else "defaults and variables; there is no orchestrator.yaml"
    )
    yield Check("settings", OK, f"from {origin}")
    catalogue = yield from check_catalogue(settings)
    yield check_port(settings)
    yield check_state_folder(settings.state_dir)
    yield check_database(settings.database)
    yield check_cache(settings.hub_volume)
    yield check_docker(settings.engine)
    yield from check_nvml(settings)
    yield check_ram(settings, catalogue)


def wrong(name: str, error: OrchestratorError, advice: str) -> Iterator[Check]:
    """A check for each line of the error; the advice stands once, at the end."""
    lines = error.message.splitlines()
    for number, line in enumerate(lines, 1):
        yield Check(name, BAD, line, advice if number == len(lines) else "")


def check_catalogue(settings: Settings) -> Generator[Check, None, Catalogue | None]:
    try:
        catalogue = read_catalogue(settings)
    except CatalogueError as error:
        yield from wrong("catalogue", error, "Mend it; the server does not start before.")
        return None
    yield Check("catalogue", OK, catalogue_found(settings, catalogue))
    for problem in catalogue.problems:
        yield Check("catalogue", WARNING, problem, "Other models are not affected.")
    return catalogue


def check_port(settings: Settings) -> Check:
    """Whether the server could listen where the settings say; if not, who does, maybe itself."""
    host, port = settings.host, settings.port
    name = f"port {port}"
    if port == 0:
        return Check("port", OK, "the server takes a free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            return taken_port(settings, error)
    return Check(name, OK, f"free on {host}")


def taken_port(settings: Settings, error: OSError) -> Check:
    name, who = f"port {settings.port}", listener_of(settings.port)
    if who is not None and who.pid is not None and who.pid == holder_of(settings.database):
        advice = f"Ask it: --url {url_of(settings.host, settings.port)}"
        return Check(name, OK, f"the server of these settings listens there (PID {who.pid})", advice)
    advice = "Choose another: `orchestrator serve --port 8001`, or port: in orchestrator.yaml."
    found = f"taken by {who}" if who else f"cannot be listened on at {settings.host}: {error.strerror}"
    return Check(name, BAD, found, advice)


@dataclass(frozen=True, slots=True)
class Listener:
    """A program that listens, as far as /proc lets us see."""

    program: str = "another program"
    pid: int | None = None

    def __str__(self) -> str:
        return self.program if self.pid is None else f"{self.program} (PID {self.pid})"


def holder_of(database: Path) -> int | None:
    """The server that has opened it last: its PID stands in the lock."""
    try:
        return int(beside(database, ".lock").read_text())
    except (OSError, ValueError):
        return None


def listener_of(port: int) -> Listener | None:
    """Who listens there; None if nobody does."""
    inodes = set(listening_inodes(port))
    for folder in Path("/proc").glob("[0-9]*") if inodes else ():
        try:
            links = {str(link.readlink()) for link in (folder / "fd").iterdir()}
            if any(f"socket:[{inode}]" in links for inode in inodes):
                return Listener((folder / "comm").read_text().strip(), int(folder.name))
        except OSError:
            continue
    return Listener() if inodes else None


def listening_inodes(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        path = Path(table)
        for line in path.read_text().splitlines()[1:] if path.is_file() else ():
            fields = line.split()
            if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]


def check_state_folder(folder: Path) -> Check:
    advice = "Or choose another with database: in orchestrator.yaml."
    if (barrier := obstacle(folder / "orchestrator.db")) is not None:
        return Check("state", BAD, f"{shown(folder)} {barrier}", advice)
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(there, os.W_OK):
        return Check("state", BAD, f"{shown(folder)} is on a disk that is mounted read-only", advice)
    free_mib = shutil.disk_usage(there).free // MIB
    found = f"{shown(folder)}, {free_mib} MiB free on its disk"
    if free_mib < LITTLE_DISK_MIB:
        return Check("state", WARNING, found, "Free some disk space.")
    return Check("state", OK, found)


def check_database(path: Path) -> Check:
    """All of the file is read; a server that has it is not disturbed."""
    try:
        with explained(path):
            if not path.exists() and not copies_of(path):
                if path.is_symlink() and (barrier := obstacle(path)) is not None:
                    return Check("database", BAD, f"{shown(path)} {barrier}")
                return Check("database", OK, f"{shown(path)} is made at the first start")
        report = check(path)
    except StoreError as error:
        return Check("database", BAD, error.message)  # and what to do
    if report.problem is not None:
        advice = "Stop the server, then `orchestrator database restore`; the damaged file is kept."
        return Check("database", BAD, f"{shown(path)} is damaged: {report.problem}", advice)
    copy = f", last copy {age(time.time() - report.copies[0].made_at)} ago" if report.copies else ""
    return Check("database", OK, f"{shown(path)}, sound{copy}")


def check_docker(engine: str) -> Check:
    """Containers need it; processes do without."""
    version, problem = docker_version()
    if problem is None:
        return Check("docker", OK, f"Docker {version} answers")
    if engine == "process":
        return Check("docker", OK, "not needed: the settings say engine: process")
    if engine == "docker":
        advice = "Start it (`sudo systemctl start docker`), and let this user reach its socket."
        return Check("docker", BAD, problem, advice)
    advice = "Models run as processes of this machine unless it answers at the first start."
    return Check("docker", WARNING, problem, advice)


def check_nvml(settings: Settings) -> list[Check]:
    if settings.devices == "host":
        return [Check("GPUs", OK, "not needed: the settings say devices: host")]
    problem = nvml_problem()
    if problem is None:
        unused = check_unused(unused_gpus(settings.devices, chosen_devices(settings.database)))
        return unused or [Check("GPUs", OK, "NVML answers and lists them")]
    if settings.devices == "nvml":
        advice = "Install NVIDIA's driver (`nvidia-smi` must work), or set devices: host."
        return [Check("GPUs", BAD, problem, advice)]
    return [Check("GPUs", WARNING, problem, "Without a GPU models run on the CPU, in RAM.")]


def chosen_devices(database: Path) -> str:
    """What the first start chose; empty where there was none, or its choice cannot be read."""
    try:
        chosen = look_at_choice(database)
    except StoreError:  # which the check of the database tells
        return ""
    return chosen[1] if chosen is not None else ""


def check_ram(settings: Settings, catalogue: Catalogue | None) -> Check:
    free_mib, whole_mib = available_bytes() // MIB, total_bytes() // MIB
    found = f"{free_mib} MiB free of {whole_mib} MiB"
    if catalogue is not None:
        budget, why = host_budget_bytes(settings, catalogue, whole_mib * MIB)
        found += f"; models may have {budget // MIB} MiB ({why})"
    if free_mib < LITTLE_RAM_MIB:
        return Check("RAM", WARNING, found, "End what you do not need; models may not fit.")
    return Check("RAM", OK, found)
