"""Helpers that tests of every kind share."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def eventually(predicate: Callable[[], T], timeout_s: float = 10, every_s: float = 0.01) -> T:
    """Ask until the answer is true, and return it. Raises AssertionError with the last answer."""
    until_s = time.monotonic() + timeout_s
    while not (answer := predicate()):
        if time.monotonic() > until_s:
            name = getattr(predicate, "__qualname__", predicate)
            raise AssertionError(f"{name} was still {answer!r} after {timeout_s} s")
        time.sleep(every_s)
    return answer


def free_port() -> int:
    """A TCP port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


NOBODY = 65534


@contextmanager
def as_nobody() -> Iterator[None]:
    """This process without root's rights. What is imported later must be open to everybody."""
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter; pytest's own are closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="orchestrator-test-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
