"""What `doctor` says without a server, check by check."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.cli.checks import check_database, check_state_folder
from orchestrator.diagnosis import BAD, OK
from orchestrator.store.backup import back_up
from orchestrator.store.database import Database
from tests.store.of_root import ROOT_ONLY, database_of_root
from tests.support import as_nobody


@pytest.fixture
def of_root() -> Iterator[Path]:
    with database_of_root() as path:
        yield path


@ROOT_ONLY
def test_who_may_only_read_sees_a_sound_database_and_as_whom_to_run(of_root: Path) -> None:
    with as_nobody():
        database, state = check_database(of_root), check_state_folder(of_root.parent)
    assert (database.status, database.found) == (OK, f"{of_root}, sound")
    assert state.status == BAD
    assert "belongs to root, and this user (nobody) may not write" in state.found
    assert "Run this as root." in state.found


@ROOT_ONLY
def test_who_may_not_look_into_the_folder_is_told_so(of_root: Path) -> None:
    of_root.parent.chmod(0o700)
    with as_nobody():
        found = [check_database(of_root), check_state_folder(of_root.parent)]
    for check in found:
        assert check.status == BAD
        assert f"this user (nobody) may not enter {of_root.parent}. Run this as root." in check.found
        assert "damaged" not in check.found
        assert "restore" not in check.advice


def test_a_link_to_a_disk_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.db").symlink_to(tmp_path / "away" / "x.db")
    found = check_database(tmp_path / "x.db")
    assert found.status == BAD
    assert "which leads nowhere" in found.found


def test_a_lost_database_is_told_with_the_way_back(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    assert "is made at the first start" in check_database(path).found
    Database(path).close()
    copy = back_up(path, time.time()).path
    path.unlink()
    found = check_database(path)
    assert found.status == BAD
    assert f"orchestrator database restore {copy}" in found.found
