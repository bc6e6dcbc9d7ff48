"""A database file per test, and a way to open it that also closes it."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from orchestrator.control.ports import Kept
from orchestrator.store.repository import SqliteStore, open_store

BOOT = "boot-1"
Opener = Callable[..., tuple[SqliteStore, Kept]]


class WallClock:
    """Seconds since 1970, one later at each look."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "orchestrator.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Opener]:
    wall = WallClock()
    with ExitStack() as stack:

        def call(boot: str = BOOT, at: Path = path, busy_timeout_s: float = 0.2) -> tuple[SqliteStore, Kept]:
            store, kept = open_store(at, boot, wall, busy_timeout_s=busy_timeout_s)
            stack.callback(store.close)
            return store, kept

        yield call


@pytest.fixture
def store(opened: Opener) -> SqliteStore:
    return opened()[0]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 2 MiB; an error where we may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
