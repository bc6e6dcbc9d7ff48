"""Disks that are full, slow, read-only, broken or limited, under a process of its own that writes."""

import errno
import subprocess
from pathlib import Path

import pytest

from orchestrator.core.errors import StoreError
from tests.store.conftest import Opener
from tests.store.peer import FaultyDisk, Peer


@pytest.fixture
def disk(tmp_path: Path) -> FaultyDisk:
    return FaultyDisk(tmp_path)


def assert_works(peer: Peer, number: int) -> None:
    assert peer("save", number)["error"] is None
    assert peer("health")["value"] is None
    assert peer("stored")["value"] == number


def test_a_slow_disk_keeps_the_writer_waiting_and_nobody_else(disk: FaultyDisk, path: Path) -> None:
    with Peer(path, disk) as peer:
        assert_works(peer, 1)
        disk.be(delay_s=0.4)
        answer = peer("save while reading", 2)
        assert answer["error"] is None
        assert answer["took_s"] > 1.0  # several writes
        assert answer["value"] == "read first"
        assert answer["late_s"] < answer["took_s"] / 2
        disk.be()
        assert_works(peer, 3)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EIO, "the disk reports an error"),
        (errno.EDQUOT, "a quota"),
        (errno.EROFS, "mounted read-only"),
    ],
)
def test_a_disk_that_fails(disk: FaultyDisk, path: Path, error: int, words: str) -> None:
    with Peer(path, disk) as peer:
        assert_works(peer, 1)
        disk.be(error=error)
        for said in (peer("save", 2)["error"], peer("health")["value"]):
            assert words in said
            assert str(path) in said
        assert peer("stored")["value"] == 1
        disk.be()
        assert_works(peer, 3)


def test_a_limit_on_the_size_of_files(path: Path) -> None:
    with Peer(path) as peer:
        assert_works(peer, 1)
        peer("limit", 64 * 1024)
        said = peer("log", 50)["error"]
        assert "a limit on the size of files" in said
        assert str(path) in said
        peer("limit", -1)
        assert_works(peer, 2)


def test_a_full_file_system_at_every_size_of_what_is_left(small_disk: Path) -> None:
    """Fill it to the last page, then free it page by page until a write goes through again."""
    with Peer(small_disk / "x.db") as peer:
        assert_works(peer, 1)
        filler = fill_disk(small_disk)
        assert "the disk is full" in peer("log until it fails")["error"]
        refused = 0
        while (said := peer("save", 2)["error"]) is not None:
            assert "full" in said
            assert peer("stored")["value"] == 1
            refused += 1
            with filler.open("r+b") as file:
                file.truncate(filler.stat().st_size - 4096)
        assert refused
        filler.unlink()
        assert_works(peer, 3)
    with Peer(small_disk / "x.db") as peer:  # after it was killed
        assert peer("stored")["value"] == 3


def fill_disk(folder: Path) -> Path:
    """Fill it to the last page; the file that does."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    return filler


def test_a_file_system_that_is_read_only_at_the_start(opened: Opener, small_disk: Path) -> None:
    path = small_disk / "x.db"
    opened(at=path)[0].close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StoreError, match=rf"{path} .*mounted read-only"):
        opened(at=path)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    opened(at=path)[0].close()
