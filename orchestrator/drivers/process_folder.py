"""What the process engine keeps of an attempt on disk: who it is, its log, its exit code."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson

from orchestrator.core.entities import AttemptId, ModelId
from orchestrator.drivers.log_tail import BoundedLog

_TRY_LATER = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True, slots=True)
class Meta:
    """Enough to find the attempt's first process again, and to be sure that it is the same one.

    `started_ticks` count from the boot named by `boot_id`; `created_at` is seconds since 1970.
    """

    attempt: AttemptId
    model: ModelId
    owner: str
    pid: int
    started_ticks: int
    boot_id: str
    port: int
    created_at: float


class Folder:
    """`<state_dir>/attempts/<attempt>`. Every method may raise OSError unless it says otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = BoundedLog(path / "log")
        self.exit = path / "exit"
        self._meta = path / "meta.json"

    def make(self) -> None:
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def write(self, meta: Meta) -> None:
        """All of it or nothing: a reader never sees half a file."""
        half = self._meta.with_suffix(".part")
        half.write_bytes(orjson.dumps(asdict(meta)))
        half.replace(self._meta)

    def read(self) -> Meta | None:
        """None where there is none, or none that we could have written.

        Raises OSError where we lack what it takes to look.
        """
        try:
            return Meta(**orjson.loads(self._meta.read_bytes()))
        except OSError as error:
            if error.errno in _TRY_LATER:
                raise
            return None
        except (TypeError, orjson.JSONDecodeError):
            return None

    def exists(self) -> bool:
        return self.path.is_dir()

    def exit_code(self) -> int | None:
        """What the wrapper wrote down; None where it could not. Never raises."""
        try:
            return int(self.exit.read_text())
        except (OSError, ValueError):
            return None

    def remove(self) -> None:
        """Never raises: what cannot be removed stays."""
        shutil.rmtree(self.path, ignore_errors=True)


def folders(root: Path) -> list[Folder]:
    with suppress(FileNotFoundError):
        return [Folder(Path(entry.path)) for entry in os.scandir(root) if entry.is_dir()]
    return []
