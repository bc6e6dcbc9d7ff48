"""Opening, migrating and losing the file: real SQLite files and real faults."""

import asyncio
import ctypes
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from orchestrator.control.ports import Changes
from orchestrator.core.entities import Note
from orchestrator.core.errors import DatabaseInUse, SchemaTooNew, StoreError
from orchestrator.core.lifecycle import Instance, State
from orchestrator.store import schema
from orchestrator.store.copies import copies_of
from orchestrator.store.repository import SqliteStore
from orchestrator.store.tables import METADATA
from tests.store.conftest import Opener

READY = Instance("m", State.READY, attempt="a1", placement={"host": 5}, ready_at_s=3.0)
HEAD = str(ScriptDirectory(str(schema.migrations_dir())).get_current_head())
NEXT = f"{int(HEAD) + 1:04}"
NEXT_MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision = "{next}"
down_revision = "{head}"


def upgrade() -> None:
    with op.batch_alter_table("meta") as batch:
        batch.add_column(sa.Column("note", sa.String()))
    {more}
"""


def add_migration(folder: Path, more: str = "") -> None:
    """The next release's, which adds a column and does `more`."""
    text = NEXT_MIGRATION.format(next=NEXT, head=HEAD, more=more)
    (folder / "versions" / f"{NEXT}_next.py").write_text(text)


def tables(path: Path) -> set[str]:
    with sqlite3.connect(path) as connection:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")}


def revision(path: Path) -> str:
    with sqlite3.connect(path) as connection:
        (found,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return str(found)


@pytest.fixture
def newer_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand for the next release: its migrations folder, with one more revision."""
    folder = tmp_path / "100% newer" / "migrations"
    shutil.copytree(schema.migrations_dir(), folder)
    add_migration(folder)
    monkeypatch.setattr(schema, "migrations_dir", lambda: folder)
    return folder


# ---- migrations ----


def test_migrations_build_what_the_classes_describe(opened: Opener, path: Path) -> None:
    opened()[0].close()
    with create_engine(f"sqlite:///{path}").connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_event_ids_are_autoincremented_in_the_file_too(opened: Opener, path: Path) -> None:
    opened()[0].close()
    with sqlite3.connect(path) as connection:
        (sql,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'event'").fetchone()
    assert "AUTOINCREMENT" in sql


def test_nothing_is_copied_where_nothing_is_migrated(opened: Opener, path: Path) -> None:
    opened()[0].close()
    opened()[0].close()
    assert copies_of(path) == []


def test_an_older_database_is_copied_then_migrated(
    opened: Opener, path: Path, request: pytest.FixtureRequest
) -> None:
    store, _ = opened()
    asyncio.run(store.save(Changes({"m": READY})))
    store.close()
    request.getfixturevalue("newer_program")
    store, kept = opened()
    store.close()
    (copy,) = (copy.path for copy in copies_of(path) if copy.before == NEXT)
    assert kept.instances == {"m": READY}
    assert (revision(path), revision(copy)) == (NEXT, HEAD)
    assert "instance" in tables(copy)


def test_a_failing_migration_changes_nothing(
    opened: Opener, path: Path, request: pytest.FixtureRequest
) -> None:
    opened()[0].close()
    newer = request.getfixturevalue("newer_program")
    add_migration(newer, "op.execute('SELECT nonsense')")
    with pytest.raises(StoreError, match="nonsense"):
        opened()
    assert revision(path) == HEAD
    with sqlite3.connect(path) as connection:
        assert "note" not in [row[1] for row in connection.execute("PRAGMA table_info(meta)")]


def test_a_newer_database_is_refused_and_the_way_out_named(opened: Opener, path: Path) -> None:
    opened()[0].close()
    with pytest.MonkeyPatch.context() as patch:
        folder = path.parent / "migrations"
        shutil.copytree(schema.migrations_dir(), folder)
        add_migration(folder)
        patch.setattr(schema, "migrations_dir", lambda: folder)
        opened()[0].close()
    with pytest.raises(SchemaTooNew, match=rf"{NEXT}.*restore \S+-before-{NEXT}\.db --database"):
        opened()
    assert revision(path) == NEXT


def test_there_is_one_line_of_revisions() -> None:
    assert len(ScriptDirectory(str(schema.migrations_dir())).get_heads()) == 1


# ---- files that cannot be opened ----


def test_a_file_that_is_no_database(opened: Opener, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"these are my holiday notes, not a database" * 100)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="not a SQLite database"):
        opened()
    assert path.read_bytes() == before


def test_a_database_of_another_program(opened: Opener, path: Path) -> None:
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")
    with pytest.raises(StoreError, match="another program"):
        opened()
    assert tables(path) == {"bookmarks"}


def test_a_damaged_database(opened: Opener, path: Path) -> None:
    store, _ = opened()
    asyncio.run(store.log(tuple(Note("k", "x" * 500) for _ in range(200))))
    store.close()
    with path.open("r+b") as file:
        file.seek(3 * 4096)
        file.write(os.urandom(20 * 4096))
    with pytest.raises(StoreError, match="damaged"):
        opened()


def test_a_folder_that_cannot_be(opened: Opener, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="is a file and no folder"):
        opened(at=tmp_path / "file" / "x.db")


@contextmanager
def bound_by_modes() -> Iterator[None]:
    """Have this thread obey the modes of files as everybody must, root too."""

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    class Half(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable")]

    libc = ctypes.CDLL(None, use_errno=True)
    header, halves = Header(0x20080522, 0), (Half * 2)()
    assert libc.capget(ctypes.byref(header), halves) == 0
    before = halves[0].effective
    halves[0].effective = before & ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(ctypes.byref(header), halves) == 0
    try:
        yield
    finally:
        halves[0].effective = before
        assert libc.capset(ctypes.byref(header), halves) == 0


def test_a_folder_that_is_read_only(opened: Opener, path: Path) -> None:
    path.parent.mkdir()
    path.parent.chmod(0o555)
    with bound_by_modes(), pytest.raises(StoreError, match="writable"):
        opened()


def test_the_path_may_hold_any_character(opened: Opener, tmp_path: Path) -> None:
    odd = tmp_path / "100% mine?#" / "a b&mode=ro.db"
    opened(at=odd)
    assert odd.is_file()


# ---- one server per database ----


def test_a_second_server_is_refused_by_name(opened: Opener) -> None:
    opened()
    with pytest.raises(DatabaseInUse, match=str(os.getpid())):
        opened()


def test_a_killed_server_leaves_the_database_free(opened: Opener, path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from orchestrator.store.repository import open_store;"
        "kept = open_store(Path(sys.argv[1]), 'b', time.time); print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        assert server.stdout.readline() == "open\n"
        with pytest.raises(DatabaseInUse, match=str(server.pid)):
            opened()
        server.kill()
    opened()


def test_a_refused_opening_leaves_the_database_free(opened: Opener, path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"x" * 5000)
    for _ in range(2):
        with pytest.raises(StoreError, match="not a SQLite database"):
            opened()


# ---- faults while it is open ----


async def saved(store: SqliteStore) -> None:
    await store.save(Changes({"m": READY}))


async def test_locked_by_another_program(store: SqliteStore, path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked by another program"):
        await saved(store)
    assert "locked" in str(await store.health())
    other.execute("ROLLBACK")
    other.close()
    await saved(store)
    assert await store.health() is None


async def test_a_short_lock_is_waited_for(opened: Opener, path: Path) -> None:
    store, _ = opened(busy_timeout_s=30)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    saving = asyncio.create_task(saved(store))
    await asyncio.sleep(0.05)
    assert not saving.done()
    other.execute("ROLLBACK")
    other.close()
    await saving


async def test_a_reader_does_not_stop_a_writer(store: SqliteStore, path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM event").fetchone()
    await saved(store)
    other.close()


def save(store: SqliteStore) -> None:
    asyncio.run(saved(store))


def limit_pages(store: SqliteStore, *, more: int) -> None:
    with store._database.writer.connect() as connection:
        (pages,) = connection.exec_driver_sql("PRAGMA page_count").one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + more}")


async def test_a_full_database_works_again_when_there_is_room(store: SqliteStore) -> None:
    limit_pages(store, more=0)
    with pytest.raises(StoreError, match="disk is full"):
        await store.log(tuple(Note("k", "x" * 4000) for _ in range(50)))
    assert await store.events(limit=9) == ()
    limit_pages(store, more=1000)
    await saved(store)
    assert await store.health() is None


def test_a_file_that_was_moved_away_and_back(opened: Opener, store: SqliteStore, path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    with pytest.raises(StoreError, match="Move it back"):
        save(store)
    assert "Move it back" in str(asyncio.run(store.health()))
    path.with_name("elsewhere").rename(path)
    save(store)
    store.close()
    assert opened()[1].instances == {"m": READY}


def test_a_file_that_was_replaced(store: SqliteStore, path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.touch()
    with pytest.raises(StoreError, match="Restart the server"):
        save(store)


@pytest.mark.parametrize("pattern", ["orchestrator.db", "orchestrator.db*"])
def test_a_deleted_file_is_written_anew(opened: Opener, store: SqliteStore, path: Path, pattern: str) -> None:
    save(store)
    for file in path.parent.glob(pattern):
        file.unlink()
    asyncio.run(store.save(Changes(pins={"m": True})))
    assert asyncio.run(store.health()) is None
    store.close()
    _, kept = opened()
    assert (kept.instances, kept.pins) == ({"m": READY}, {"m": True})


def test_a_deleted_folder_is_an_error_until_it_is_back(store: SqliteStore, path: Path) -> None:
    save(store)
    shutil.rmtree(path.parent)
    with pytest.raises(StoreError, match="folder must exist"):
        save(store)
    path.parent.mkdir()
    save(store)
    assert path.is_file()


# ---- where the migrations are ----


def test_migrations_of_an_installed_package_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "orchestrator"
    shipped, strangers = package / "_shipped" / "migrations", package.parent / "migrations"
    monkeypatch.setattr(schema, "_PACKAGE", package)
    with pytest.raises(StoreError, match="incomplete"):
        schema.migrations_dir()
    for folder in (strangers, shipped):
        folder.mkdir(parents=True)
        (folder / "env.py").touch()
    assert schema.migrations_dir() == shipped
