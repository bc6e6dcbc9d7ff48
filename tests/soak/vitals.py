"""What a running server costs, read from outside: memory, descriptors, threads, tasks, database."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.server import RunningServer

MIB = 1024 * 1024


@dataclass(frozen=True)
class Vitals:
    """`rss_mib` is resident memory, `tasks` those of the event loop; None where the server tells of none."""

    rss_mib: float
    descriptors: int
    threads: int
    tasks: int | None
    database_mib: float


def read_vitals(server: RunningServer) -> Vitals:
    status = Path(f"/proc/{server.pid}/status").read_text()
    database = Path(server.settings["database"])
    size = sum(path.stat().st_size for path in database.parent.glob(f"{database.name}*") if path.is_file())
    return Vitals(
        rss_mib=field(status, "VmRSS") / 1024,
        descriptors=len(list(Path(f"/proc/{server.pid}/fd").iterdir())),
        threads=field(status, "Threads"),
        tasks=tasks_of(server.state()),
        database_mib=size / MIB,
    )


def field(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
    assert found is not None, f"no {name} in /proc/<pid>/status"
    return int(found[1])


def tasks_of(state: dict[str, Any]) -> int | None:
    tasks = state.get("loop", {}).get("tasks")
    return tasks if isinstance(tasks, int) else None
