"""`orchestrator database` on real files, with and without somebody who has them."""

import asyncio
import os
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from orchestrator.cli.main import app
from orchestrator.store.copies import copies_of
from orchestrator.store.database import Database
from orchestrator.store.repository import open_store
from tests.store.peer import Peer, numbered
from tests.support import as_nobody, open_folder


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["database", *arguments, "--database", str(path)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database that says 1, closed."""
    path = tmp_path / "state" / "x.db"
    store, _ = open_store(path, "boot", time.time)
    asyncio.run(store.save(numbered(1)))
    store.close()
    return path


def number_in(path: Path) -> float:
    store, kept = open_store(path, "boot", time.time)
    store.close()
    return kept.instances["m"].load_time_s


def test_back_up_while_a_server_runs_damage_and_restore(path: Path) -> None:
    with Peer(path) as peer:
        assert peer("save", 2)["error"] is None
        assert run(path, "backup").exit_code == 0
        refused = run(path, "restore")
        assert refused.exit_code == 1
        assert "belongs to a server" in refused.stderr
    path.write_bytes(b"x" * 9000)
    checked = run(path, "check")
    assert checked.exit_code == 1
    assert "file is not a database" in checked.stderr + checked.stdout
    assert str(copies_of(path)[0].path) in checked.stderr + checked.stdout
    restored = run(path, "restore")
    assert restored.exit_code == 0, restored.stderr
    assert number_in(path) == 2
    assert run(path, "check").exit_code == 0


def test_the_command_in_the_message_is_the_one_that_works(path: Path) -> None:
    run(path, "backup")
    path.write_bytes(b"x" * 9000)
    with pytest.raises(Exception, match="damaged") as refused:
        open_store(path, "boot", time.time)
    command = str(refused.value).partition("with: orchestrator ")[2].partition(" (what")[0]
    assert CliRunner().invoke(app, command.split()).exit_code == 0
    assert number_in(path) == 1


def test_there_is_nothing_to_restore(path: Path) -> None:
    result = run(path, "restore")
    assert result.exit_code == 1
    assert "no good copy" in result.stderr
    assert number_in(path) == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_check_by_a_user_who_may_only_read() -> None:
    with open_folder() as folder:
        path = folder / "x.db"
        Database(path).close()
        path.chmod(0o644)
        with as_nobody():
            sound = run(path, "check")
        path.chmod(0o600)
        with as_nobody():
            closed = run(path, "check")
    assert (sound.exit_code, sound.stderr) == (0, "")
    assert closed.exit_code == 1
    assert "Run this as root." in closed.stderr
    assert "damaged" not in closed.stderr
