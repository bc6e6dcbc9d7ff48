"""A process of its own that has a store open and does what it is told, one JSON line each.

    with Peer(path) as peer:
        answer = peer("save", 1)     # {"error": null | str, "took_s": …, "late_s": …}

`late_s` is how late its event loop ran meanwhile, at worst. `Peer(disk=…)` puts a faulty disk under it.
"""

import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from orchestrator.control.ports import Changes
from orchestrator.core.entities import Note
from orchestrator.core.errors import StoreError
from orchestrator.core.lifecycle import Instance, State
from orchestrator.store.repository import SqliteStore, open_store

SOURCE = Path(__file__).with_name("faulty_disk.c")
TICK_S = 0.01


class FaultyDisk:
    """The preloaded library and the file that commands it."""

    def __init__(self, folder: Path) -> None:
        self.library = folder / "faulty_disk.so"
        self.control = folder / "faults"
        flags = ("-O2", "-Wall", "-Werror", "-fPIC", "-shared")
        subprocess.run(["cc", *flags, "-o", str(self.library), str(SOURCE), "-ldl"], check=True)

    def be(self, *, delay_s: float = 0.0, error: int = 0) -> None:
        """From the next write on."""
        fresh = self.control.with_suffix(".new")
        fresh.write_text(f"{delay_s * 1000:.0f} {error}")
        fresh.replace(self.control)


class Peer:
    def __init__(self, path: Path, disk: FaultyDisk | None = None, busy_timeout_s: float = 0.2) -> None:
        env = dict(os.environ)
        if disk is not None:
            env |= {"LD_PRELOAD": str(disk.library), "FAULTY_DISK": str(disk.control)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(path), str(busy_timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def __enter__(self) -> "Peer":
        assert self.read() == "open"
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def __call__(self, command: str, *arguments: Any) -> dict[str, Any]:
        self.ask(command, *arguments)
        answer: dict[str, Any] = self.read()
        return answer

    def ask(self, command: str, *arguments: Any) -> None:
        assert self._process.stdin
        self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self._process.stdin.flush()

    def read(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the peer ended"
        return json.loads(line)


def limit_files(size_bytes: int) -> None:
    """No file may be written beyond this; -1 for no limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))


def numbered(number: int) -> Changes:
    return Changes({"m": Instance("m", State.READY, attempt=f"a{number}", load_time_s=float(number))})


async def save_while_reading(store: SqliteStore, number: int) -> str:
    """`read first` if a read ended while the save was still being written."""
    saving = asyncio.create_task(store.save(numbered(number)))
    await asyncio.sleep(TICK_S)
    await store.events(limit=1)
    first = "save first" if saving.done() else "read first"
    await saving
    return first


async def log_much(store: SqliteStore, count: int = 20) -> None:
    await store.log(tuple(Note("k", "x" * 4000) for _ in range(count)))


async def log_until_it_fails(store: SqliteStore) -> None:
    """On a full disk: what SQLite has got already still has some room. Raises StoreError."""
    for _ in range(1000):
        await log_much(store)


def actions(store: SqliteStore) -> dict[str, Callable[..., Awaitable[Any]]]:
    async def limit(size_bytes: int) -> None:
        limit_files(size_bytes)

    async def stored() -> float:
        return (await store.instances())["m"].load_time_s

    return {
        "save": lambda number: store.save(numbered(number)),
        "save while reading": lambda number: save_while_reading(store, number),
        "log": lambda count: log_much(store, count),
        "log until it fails": lambda: log_until_it_fails(store),
        "health": store.health,
        "stored": stored,
        "limit": limit,
    }


async def serve(store: SqliteStore) -> None:
    loop = asyncio.get_running_loop()
    late_s = 0.0

    async def tick() -> None:
        nonlocal late_s
        while True:
            until_s = loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            late_s = max(late_s, loop.time() - until_s)

    ticking = asyncio.create_task(tick())
    while line := await asyncio.to_thread(sys.stdin.readline):
        command, *arguments = json.loads(line)
        late_s, began_s = 0.0, time.monotonic()
        answer: dict[str, Any] = {"error": None, "value": None}
        try:
            answer["value"] = await actions(store)[command](*arguments)
        except StoreError as error:
            answer["error"] = error.message
        print(json.dumps(answer | {"took_s": time.monotonic() - began_s, "late_s": late_s}), flush=True)
    ticking.cancel()


def main() -> None:
    store, _ = open_store(Path(sys.argv[1]), "boot-1", time.time, busy_timeout_s=float(sys.argv[2]))
    print(json.dumps("open"), flush=True)
    asyncio.run(serve(store))


if __name__ == "__main__":
    main()
