"""Who listens on a port of this machine, told from tables that may be long."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest

from orchestrator.drivers import process_ports
from orchestrator.drivers.process_ports import is_answered_by

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
LISTENS, TIME_WAIT = "0A", "06"
PORT, OURS, STRANGER = 8123, 41, 42
CONNECTIONS = 20_000


def line(port: int, state: str, inode: int) -> str:
    socket = f"   0: 0100007F:{port:04X} 00000000:0000 {state}"
    return f"{socket} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 0 100 0 0 10 0\n"


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with many connections where `OURS` listens on the port, and `STRANGER` on another."""
    (tmp_path / "net").mkdir()
    rows = (line(PORT, TIME_WAIT, 0) for _ in range(CONNECTIONS))
    listeners = (line(PORT, LISTENS, 501), line(PORT + 1, LISTENS, 502))
    (tmp_path / "net" / "tcp").write_text("".join((HEAD, *rows, *listeners)))
    for pid, inode in ((OURS, 501), (STRANGER, 502)):
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "fd" / "3").symlink_to(f"socket:[{inode}]")
    monkeypatch.setattr(process_ports, "_PROC", tmp_path)
    return tmp_path


def test_only_who_listens_on_the_port_answers_there(proc: Path) -> None:
    assert is_answered_by(PORT, [OURS])
    assert is_answered_by(PORT, [STRANGER, OURS])
    assert not is_answered_by(PORT, [STRANGER])
    assert not is_answered_by(PORT, [])


def test_a_long_table_of_connections_is_never_held_whole(proc: Path) -> None:
    """Each of the engine's threads keeps what it once took at most: with the table that came to 50 MiB."""
    tracemalloc.start()
    try:
        assert is_answered_by(PORT, [OURS])
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (proc / "net" / "tcp").stat().st_size > 2 << 20
    assert most < 256 << 10
