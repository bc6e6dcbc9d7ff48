"""What the loop needs from the world, as Protocols. Drivers and the store implement these."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

from orchestrator.core.entities import (
    AttemptId,
    ContainerId,
    Device,
    DeviceId,
    Download,
    Launch,
    ModelId,
    Note,
    Operation,
    Progress,
    Sample,
)
from orchestrator.core.keys import Key, Session
from orchestrator.core.learned import Learned
from orchestrator.core.lifecycle import Instance


@dataclass(frozen=True, slots=True)
class StartOrder:
    """Everything an engine needs for one attempt. `gpus` are the placement's GPUs, in index order."""

    attempt: AttemptId
    model: ModelId
    launch: Launch
    gpus: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True)
class Exit:
    """How an attempt ended. `code` is None where nobody could see it."""

    code: int | None
    oom: bool = False
    log_tail: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Roots:
    """Where an attempt's processes are found: its first PID and, in a container, the container's id."""

    pid: int
    container_id: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """An attempt of ours as the engine knows it now: running with its address, or ended with its exit.

    One that was created and never started has an exit too, and `has_run` is False. `is_lent` is somebody
    else's, whose label lets us take it over; `gpus` are its own by UUID, None for all of them.
    """

    attempt: AttemptId
    model: ModelId
    host: str | None = None
    port: int | None = None
    exit: Exit | None = None
    has_run: bool = True
    is_lent: bool = False
    gpus: tuple[DeviceId, ...] | None = None

    @property
    def is_running(self) -> bool:
        return self.exit is None


class Engine(Protocol):
    """Starts and stops attempts. Every call is idempotent: look by attempt id, then act.

    Only this owner's containers and processes are ever listed or touched, and running ones that are lent.
    `container_name` looks at any container, and changes none.
    """

    name: str

    async def open(self, on_exit: Callable[[AttemptId, Exit], None]) -> None:
        """Connect and begin to watch; `on_exit` is called on the event loop for each exit seen.

        Exits are hints: one may be told twice, or after `stop` has already returned it.
        """

    async def start(self, order: StartOrder, report: Callable[[Progress], None]) -> Found:
        """Make sure this attempt runs, and return where; an image is pulled first if it is missing.

        Returns an ended `Found` if it exited at once. Raises ImageMissing, NameTaken, StartFailed,
        EngineUnavailable, or Cancelled if `stop` was called for the attempt meanwhile.
        """

    async def stop(self, attempt: AttemptId, grace_s: float) -> Exit:
        """Ask it to end, kill it after `grace_s`, and return once it is gone.

        What does not exist is gone: that returns an Exit with code None. A start of the same attempt
        that is under way is given up first. Raises EngineUnavailable; never returns while a process lives.
        """

    async def list(self) -> tuple[Found, ...]:
        """Every attempt of this owner, running or ended and still kept for its log."""

    async def discard(self, attempt: AttemptId) -> None:
        """Remove what an ended attempt left behind (container, log). Unknown attempts are no error."""

    def roots(self) -> Mapping[AttemptId, Roots]:
        """Running attempts and their processes; callable from any thread, never blocks."""

    async def serves(self, attempt: AttemptId) -> bool:
        """Whether what answers at the attempt's address is the attempt; True also where nobody can tell.

        Somebody else may have taken the port before the attempt listened there.
        """

    def logs(
        self,
        model: ModelId,
        attempt: AttemptId | None,
        *,
        tail: int,
        follow: bool,
        previous: bool = False,
    ) -> AsyncIterator[bytes]:
        """Log bytes of an attempt, or of the model's newest one kept; at first the last `tail` lines.

        `previous` asks for the one kept before the newest. Raises NoLog where nothing was kept.
        """

    async def container_name(self, container: ContainerId) -> str | None:
        """The name of any container, whosever it is; None if this engine does not know it, or it is gone.

        Raises EngineUnavailable.
        """

    async def health(self) -> str | None:
        """None if the engine answers, else why not."""

    async def close(self) -> None:
        """Stop watching. What runs goes on running."""


class Devices(Protocol):
    """GPUs or RAM. Blocking: only the monitor's thread calls it."""

    name: str

    def open(self) -> tuple[Device, ...]:
        """Find the devices. Raises DeviceError."""

    def sample(self, roots: Mapping[AttemptId, Roots], now_s: float) -> Sample:
        """Read memory and processes of every device together; a device that fails is in `errors`."""

    def close(self) -> None: ...


class Probe(Protocol):
    async def problem(self, host: str, port: int, path: str) -> str | None:
        """None once the service answers 2xx there, else in a few words what came instead."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Files of a repository: by `reference` as people write it (OWNER/NAME[:QUANT]), or as the `model` of
    the catalogue's files names them, by patterns."""

    reference: str
    model: ModelId | None = None
    file: str | None = None
    mmproj: str | None = None


class Hub(Protocol):
    """Where model files come from, and the cache that they are put in."""

    async def find(self, wanted: Wanted, promised_bytes: int) -> Download:
        """What to download, not begun yet and without an operation.

        `promised_bytes` of the disk are wanted by others already. Raises HubError: RepositoryNotFound,
        RepositoryGated, QuantNotFound, DiskFull, HubUnreachable.
        """

    async def fetch(self, download: Download, report: Callable[[int], None]) -> None:
        """Get all its files, going on where an earlier try has stopped; `report` is told the bytes here.

        A caller that is cancelled ends it. Raises HubError.
        """

    async def remove(self, download: Download, others: Collection[Path]) -> int:
        """Remove its files but what `others` are or lead to; the bytes that came free. Raises HubError."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What one turn decided and the store must remember before it is done; only what changed.

    A model in `instances` replaces its row. `pins`, `holds`, `downloads` and `learned` map to None where
    the row goes; `holds` are seconds since 1970.
    """

    instances: Mapping[ModelId, Instance] = field(default_factory=dict)
    operations: Mapping[str, Operation] = field(default_factory=dict)
    pins: Mapping[ModelId, bool | None] = field(default_factory=dict)
    holds: Mapping[ModelId, float | None] = field(default_factory=dict)
    downloads: Mapping[ModelId, Download | None] = field(default_factory=dict)
    learned: Mapping[str, Learned | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True, slots=True)
class Kept:
    """What the store knew when it was opened.

    `instances` were saved by an earlier process: their monotonic times mean nothing unless
    `same_boot`. `operations` are those that had not ended.
    """

    owner: str
    same_boot: bool
    operations: Mapping[str, Operation] = field(default_factory=dict)
    instances: Mapping[ModelId, Instance] = field(default_factory=dict)
    pins: Mapping[ModelId, bool] = field(default_factory=dict)
    holds: Mapping[ModelId, float] = field(default_factory=dict)
    downloads: Mapping[ModelId, Download] = field(default_factory=dict)
    learned: Mapping[str, Learned] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoggedEvent:
    """A row of the event log; `at` is seconds since 1970."""

    id: int
    at: float
    kind: str
    text: str
    model: ModelId | None
    attempt: AttemptId | None
    data: Mapping[str, object]


class Store(Protocol):
    """Memory that survives the process. Writes happen on one thread, in the order of the calls."""

    async def save(self, changes: Changes) -> None:
        """Remember all of it or nothing. Raises StoreError."""

    async def log(self, notes: tuple[Note, ...]) -> None:
        """Append to the event log, never in the transaction of `save`. Raises StoreError."""

    async def operation(self, operation_id: str) -> Operation | None: ...

    async def instances(self) -> Mapping[ModelId, Instance]:
        """The rows of all instances, as they are saved now. Raises StoreError."""

    async def events(self, *, limit: int, model: ModelId | None = None) -> tuple[LoggedEvent, ...]:
        """The newest events, oldest first."""

    async def prune(self, *, keep_events: int, keep_operations: int, keep_attempts: int) -> None: ...

    async def health(self) -> str | None:
        """None if the database can be written, else why not."""


class KeyStore(Protocol):
    """API keys and browser sessions. Each call is one transaction and raises StoreError."""

    async def add_key(self, key: Key) -> None: ...

    async def remove_key(self, key_id: str) -> None:
        """With the sessions that were opened with it."""

    async def note_use(self, used_at: Mapping[str, float]) -> None:
        """When keys were last used, by their id."""

    async def add_session(self, session: Session, now: float) -> None:
        """Sessions that expired before `now` go."""

    async def remove_session(self, digest: bytes) -> None: ...
