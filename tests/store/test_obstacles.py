"""Databases that this user may not write or read, and paths where none can be."""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from orchestrator.core.errors import StoreError
from orchestrator.store import copies
from orchestrator.store.backup import back_up, check, restore
from orchestrator.store.database import Database
from orchestrator.store.explain import Damaged
from orchestrator.store.obstacles import obstacle
from tests.store.of_root import ROOT_ONLY, database_of_root
from tests.store.peer import Peer
from tests.support import as_nobody, open_folder


@pytest.fixture
def of_root() -> Iterator[Path]:
    with database_of_root() as path:
        yield path


@ROOT_ONLY
def test_a_sound_database_of_another_user_is_read_and_not_called_damaged(of_root: Path) -> None:
    before = sorted(file.name for file in of_root.parent.iterdir())
    with as_nobody():
        report = check(of_root)
    assert report.problem is None
    assert sorted(file.name for file in of_root.parent.iterdir()) == before


@ROOT_ONLY
def test_a_database_that_a_server_of_another_user_has_open_is_read(of_root: Path) -> None:
    with Peer(of_root) as peer:
        assert peer("save", 2)["error"] is None
        of_root.with_name("orchestrator.db-shm").chmod(0o644)
        of_root.with_name("orchestrator.db-wal").chmod(0o644)
        with as_nobody():
            assert check(of_root).problem is None


@ROOT_ONLY
def test_damage_is_still_seen_by_who_may_not_write(of_root: Path) -> None:
    with of_root.open("r+b") as file:
        file.seek(4096)
        file.write(b"x" * (of_root.stat().st_size - 4096))
    with as_nobody():
        assert check(of_root).problem is not None


@ROOT_ONLY
@pytest.mark.parametrize(("closed", "mode"), [("orchestrator.db", 0o600), (".", 0o700)])
def test_who_may_not_read_is_told_as_whom_to_run(of_root: Path, closed: str, mode: int) -> None:
    (of_root.parent / closed).chmod(mode)
    with (
        as_nobody(),
        pytest.raises(StoreError, match=r"belongs to root, .* may not .*\. Run this as root") as no,
    ):
        check(of_root)
    assert not isinstance(no.value, Damaged)


@ROOT_ONLY
def test_a_log_that_may_not_be_read_with_it_is_no_damage(of_root: Path) -> None:
    with Peer(of_root) as peer:
        assert peer("save", 2)["error"] is None
        of_root.with_name("orchestrator.db-wal").chmod(0o600)
        with as_nobody(), pytest.raises(StoreError, match="Run this as root"):
            check(of_root)


@ROOT_ONLY
def test_who_may_not_write_is_told_as_whom_to_run(of_root: Path) -> None:
    back_up(of_root, 1.8e9)
    for attempt in (lambda: Database(of_root), lambda: back_up(of_root, 1.9e9), lambda: restore(of_root)):
        with as_nobody(), pytest.raises(StoreError, match=r"belongs to root, and this user .* as root"):
            attempt()


def test_a_lock_of_another_program_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.db"
    Database(path).close()
    monkeypatch.setattr(copies, "open_to_read", partial(copies.open_to_read, timeout_s=0.01))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode=DELETE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="is locked by another program"):
            check(path)


def test_a_folder_is_no_database(tmp_path: Path) -> None:
    for attempt in (Database, check):
        with pytest.raises(StoreError, match=rf"{tmp_path} is a folder\. Name a file in it"):
            attempt(tmp_path)
    assert not tmp_path.with_name(f"{tmp_path.name}.lock").exists()


def test_a_file_holds_no_database(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for attempt in (Database, check):
        with pytest.raises(StoreError, match=f"{tmp_path / 'file'} is a file and no folder"):
            attempt(tmp_path / "file" / "x.db")


def test_a_missing_database_is_told_with_its_copies(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    with pytest.raises(StoreError, match="There is no database"):
        check(path)
    Database(path).close()
    copy = back_up(path, 1.8e9).path
    path.unlink()
    for attempt in (lambda: check(path), lambda: back_up(path, 1.9e9)):
        with pytest.raises(Damaged, match=f"is missing, but there are copies of it.*restore {copy}"):
            attempt()


@pytest.mark.parametrize(("link", "target"), [("x.db", "away/x.db"), ("x.db", "x.db"), (".", "away")])
def test_a_link_that_leads_nowhere_is_told(tmp_path: Path, link: str, target: str) -> None:
    state = tmp_path / "state"
    if link == ".":
        state.symlink_to(tmp_path / target)
    else:
        state.mkdir()
        (state / link).symlink_to(target)
    with pytest.raises(StoreError, match=r"is a link to .*, which leads nowhere\. Mount what"):
        Database(state / "x.db")


def test_what_cannot_be_looked_at_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked after an error of a save: another one than StoreError would end the control loop."""

    def stale(_: Path) -> os.statvfs_result:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "statvfs", stale)
    monkeypatch.setattr(os, "access", lambda _place, mode, **_: mode != os.W_OK)
    assert obstacle(tmp_path / "x.db") is None


@ROOT_ONLY
def test_a_link_to_a_database_that_a_server_has_open_is_never_read_without_its_log(of_root: Path) -> None:
    with open_folder() as folder, Peer(of_root) as peer:
        assert peer("save", 2)["error"] is None
        of_root.with_name("orchestrator.db-wal").chmod(0o600)
        (folder / "link.db").symlink_to(of_root)
        with as_nobody(), pytest.raises(StoreError) as told:
            check(folder / "link.db")
        assert not isinstance(told.value, Damaged)
