"""Files deleted, replaced or taken under a server that runs; another program that has the database."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.control.ports import Changes
from orchestrator.core.errors import DatabaseInUse, StoreError
from orchestrator.store.files import Lock, beside
from orchestrator.store.repository import SqliteStore
from tests.store.conftest import Opener
from tests.store.peer import Peer, numbered

HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


def save(store: SqliteStore, number: int) -> None:
    asyncio.run(store.save(numbered(number)))


def stored(store: SqliteStore) -> float:
    return asyncio.run(store.instances())["m"].load_time_s


def test_another_program_holds_the_lock_for_longer_than_we_wait(path: Path) -> None:
    with Peer(path, busy_timeout_s=0.5) as peer:
        assert peer("save", 1)["error"] is None
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holder.stdout
        assert holder.stdout.readline() == b"locked\n"
        answer = peer("save", 2)
        assert "locked by another program" in answer["error"]
        assert str(path) in answer["error"]
        assert answer["took_s"] >= 0.5
        assert answer["late_s"] < 0.4  # the loop went on
        assert "locked" in peer("health")["value"]
        assert peer("stored")["value"] == 1  # reading is not locked
        holder.communicate()
        assert peer("save", 3)["error"] is None
        assert peer("health")["value"] is None


@pytest.mark.parametrize(
    "lost", [("-wal",), ("-shm",), ("-wal", "-shm"), ("", "-wal", "-shm", ".lock")], ids=" ".join
)
def test_what_is_deleted_is_written_anew(
    opened: Opener, store: SqliteStore, path: Path, lost: tuple[str, ...]
) -> None:
    save(store, 1)
    for suffix in lost:
        beside(path, suffix).unlink()
    for number in (2, 3):
        save(store, number)
        assert asyncio.run(store.health()) is None
        assert stored(store) == number
    survives_a_kill(path, 3)
    store.close()
    assert opened()[1].instances["m"].load_time_s == 3


def survives_a_kill(path: Path, number: int) -> None:
    """Whether another program sees it while we have it open: only the files that have names count."""
    look = (
        "import sqlite3, sys; print(sqlite3.connect(sys.argv[1]).execute("
        "'SELECT load_time_s FROM instance').fetchone()[0])"
    )
    seen = subprocess.run([sys.executable, "-c", look, path], capture_output=True, text=True, check=True)
    assert float(seen.stdout) == number


def test_a_log_that_is_lost_before_a_kill_leaves_an_older_state(path: Path, opened: Opener) -> None:
    with Peer(path) as peer:
        assert peer("save", 1)["error"] is None
    opened()[0].close()  # its log is now in the database
    with Peer(path) as peer:
        assert peer("save", 2)["error"] is None
    for suffix in ("-wal", "-shm"):
        beside(path, suffix).unlink()
    store, kept = opened()
    assert kept.instances["m"].load_time_s == 1
    save(store, 3)


def test_a_replaced_log_is_not_written_to(store: SqliteStore, path: Path) -> None:
    save(store, 1)
    log = beside(path, "-wal")
    log.rename(beside(path, ".elsewhere"))
    log.write_bytes(b"not a log")
    save(store, 2)
    survives_a_kill(path, 2)


def test_a_lost_file_on_a_disk_without_room_is_written_when_there_is(
    store: SqliteStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(store, 1)
    path.unlink()
    beside(path, ".rescued.part").mkdir()  # nothing can be written there
    with pytest.raises(StoreError, match=str(path)):
        save(store, 2)
    beside(path, ".rescued.part").rmdir()
    save(store, 3)
    survives_a_kill(path, 3)


def test_a_deleted_lock_is_taken_again_before_anybody_else_does(store: SqliteStore, path: Path) -> None:
    beside(path, ".lock").unlink()
    save(store, 1)
    with pytest.raises(DatabaseInUse, match=str(os.getpid())):
        Lock(path)


def test_a_server_whose_lock_was_taken_writes_no_more(store: SqliteStore, path: Path) -> None:
    save(store, 1)
    beside(path, ".lock").unlink()
    other = Lock(path)
    with pytest.raises(DatabaseInUse):
        save(store, 2)
    assert "belongs to a server" in str(asyncio.run(store.health()))
    other.close()
    save(store, 3)
    assert stored(store) == 3


async def test_reading_the_rows_does_not_wait_for_a_writer(store: SqliteStore, path: Path) -> None:
    await store.save(numbered(1))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    saving = asyncio.create_task(store.save(Changes(pins={"m": True})))
    assert (await store.instances())["m"].load_time_s == 1
    assert not saving.done()
    other.execute("ROLLBACK")
    other.close()
    await asyncio.gather(saving, return_exceptions=True)  # it may have waited for long enough


async def test_a_closed_store_says_so(store: SqliteStore) -> None:
    await store.save(numbered(1))
    store.close()
    for asked in (store.save(numbered(2)), store.back_up(), store.instances()):
        with pytest.raises(StoreError, match="closed"):
            await asked
