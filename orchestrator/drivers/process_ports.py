"""TCP ports of this machine: a free one for a process, and who listens there then."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from orchestrator.core.errors import StartFailed

ADDRESS = "127.0.0.1"

_PROC = Path("/proc")
_TRIES = 100
_LISTENS = "0A"
# How the kernel writes the addresses that a connection to ADDRESS may reach: itself, any, and both in IPv6.
_REACHED = {
    "0100007F",
    "00000000",
    "00000000000000000000000000000000",
    "0000000000000000FFFF00000100007F",
}


def free_port(taken: Collection[int]) -> int:
    """A port that nobody has, and that is not among those `taken`. Raises StartFailed."""
    for _ in range(_TRIES):
        try:
            with socket.socket() as probe:
                probe.bind((ADDRESS, 0))
                port: int = probe.getsockname()[1]
        except OSError as error:
            raise StartFailed(f"No port could be had for the model: {error.strerror}.") from error
        if port not in taken:
            return port
    raise StartFailed("No free port was found for the model.")


def is_answered_by(port: int, pids: Iterable[int]) -> bool:
    """Whether one of these processes listens at ADDRESS on this port; True also where that cannot be told.

    A listener that was handed to a process outside (a container's published port, say) is a stranger's.
    """
    try:
        sockets = _listeners(port)
    except OSError:
        return True
    can_tell = True
    for pid in pids:
        try:
            if sockets & _sockets_of(pid):
                return True
        except FileNotFoundError:
            continue  # it has ended
        except OSError:
            can_tell = False
    return not can_tell


def _listeners(port: int) -> set[str]:
    """The inodes of the sockets that listen there. Raises OSError."""
    found = set()
    for table in ("tcp", "tcp6"):
        # Line by line: with many connections the whole table is large, and what each thread once took for it
        # is not given back.
        with suppress(FileNotFoundError), (_PROC / "net" / table).open() as lines:  # no IPv6
            next(lines, None)
            for line in lines:
                fields = line.split()
                address, _, number = fields[1].partition(":")
                if fields[3] == _LISTENS and int(number, 16) == port and address in _REACHED:
                    found.add(fields[9])
    return found


def _sockets_of(pid: int) -> set[str]:
    """The inodes of the sockets that a process holds. Raises OSError."""
    found = set()
    with os.scandir(f"{_PROC}/{pid}/fd") as links:
        for link in links:
            with suppress(FileNotFoundError):
                target = os.readlink(link.path)  # noqa: PTH115 - see process_tree.read_file
                if target.startswith("socket:["):
                    found.add(target.removeprefix("socket:[").removesuffix("]"))
    return found
