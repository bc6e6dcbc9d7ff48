"""What can happen. Events carry the attempt they belong to; fold drops news of an older attempt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from orchestrator.core.buffers import Buffers
from orchestrator.core.entities import (
    AttemptId,
    ContainerId,
    Device,
    DeviceId,
    Download,
    Model,
    ModelId,
    OperationId,
    Progress,
    Sample,
    WaiterId,
)
from orchestrator.core.health import Incident


@dataclass(frozen=True, slots=True)
class LoadAsked:
    """A user wants the model loaded; the operation waits for it like a request does."""

    model: ModelId
    operation: OperationId
    pin: bool | None = None


@dataclass(frozen=True, slots=True)
class UnloadAsked:
    """A user wants the model gone, and kept out for `hold_s`."""

    model: ModelId
    operation: OperationId
    force: bool = False
    hold_s: float | None = None


@dataclass(frozen=True, slots=True)
class WaiterCame:
    """A request needs a ready instance before `deadline_s` (monotonic)."""

    model: ModelId
    waiter: WaiterId
    deadline_s: float


@dataclass(frozen=True, slots=True)
class WaiterLeft:
    """Its client hung up, or its deadline passed."""

    model: ModelId
    waiter: WaiterId


@dataclass(frozen=True, slots=True)
class Sampled:
    sample: Sample


@dataclass(frozen=True, slots=True)
class IncidentsHeard:
    """What GPUs have reported; apart from samples, of which only the newest counts."""

    incidents: tuple[Incident, ...]


@dataclass(frozen=True, slots=True)
class ContainerNamed:
    """The engine knows the container that foreign processes run in."""

    container: ContainerId
    name: str


@dataclass(frozen=True, slots=True)
class Started:
    """The engine runs the attempt, which will answer at this address."""

    model: ModelId
    attempt: AttemptId
    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Progressed:
    model: ModelId
    attempt: AttemptId
    progress: Progress


@dataclass(frozen=True, slots=True)
class BecameHealthy:
    model: ModelId
    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class BuffersLogged:
    """What the log of the attempt, which is ready, says of its buffers."""

    model: ModelId
    attempt: AttemptId
    buffers: Buffers


@dataclass(frozen=True, slots=True)
class Ended:
    """The attempt's process is gone, or never came to be; `message` says why where an engine knows."""

    model: ModelId
    attempt: AttemptId
    exit_code: int | None = None
    oom: bool = False
    log_tail: tuple[str, ...] = ()
    message: str = ""
    code: str = "service_failed"


@dataclass(frozen=True, slots=True)
class Strayed:
    """An attempt that nobody knows runs, and is being stopped."""

    model: ModelId
    attempt: AttemptId


@dataclass(frozen=True, slots=True)
class Adopted:
    """Somebody else's service of the model runs, and may be taken over; `gpus` are its own, None for all."""

    model: ModelId
    attempt: AttemptId
    gpus: tuple[DeviceId, ...] | None = None


@dataclass(frozen=True, slots=True)
class CatalogueRead:
    """The owner's files were read again; models that are gone leave. The RAM budget may have changed."""

    models: Mapping[ModelId, Model]
    devices: Mapping[DeviceId, Device]


@dataclass(frozen=True, slots=True)
class ForgettingAsked:
    """A user wants these rows of what was learned to go."""

    keys: frozenset[str]


@dataclass(frozen=True, slots=True)
class DownloadAsked:
    """A user wants these files in the cache; `download.operation` follows them."""

    download: Download

    @property
    def operation(self) -> OperationId:
        return self.download.operation


@dataclass(frozen=True, slots=True)
class NothingToDownload:
    """A user wants in the cache what is there."""

    model: ModelId
    operation: OperationId


@dataclass(frozen=True, slots=True)
class DownloadProgressed:
    model: ModelId
    done_bytes: int


@dataclass(frozen=True, slots=True)
class DownloadEnded:
    """All its files are in the cache, or `message` says why not."""

    model: ModelId
    message: str | None = None
    code: str | None = None


@dataclass(frozen=True, slots=True)
class RemovalAsked:
    """A user wants what was downloaded, or is being, to go."""

    model: ModelId
    operation: OperationId


@dataclass(frozen=True, slots=True)
class DownloadRemoved:
    """Its files are gone, or `message` says why not."""

    model: ModelId
    freed_bytes: int = 0
    message: str | None = None
    code: str | None = None


@dataclass(frozen=True, slots=True)
class Woken:
    """Time passed, or a gate became quiet: look again."""


DownloadEvent: TypeAlias = (
    DownloadAsked | NothingToDownload | DownloadProgressed | DownloadEnded | RemovalAsked | DownloadRemoved
)
Event: TypeAlias = (
    LoadAsked
    | UnloadAsked
    | WaiterCame
    | WaiterLeft
    | Sampled
    | IncidentsHeard
    | ContainerNamed
    | Started
    | Progressed
    | BecameHealthy
    | BuffersLogged
    | Ended
    | Strayed
    | Adopted
    | CatalogueRead
    | ForgettingAsked
    | DownloadEvent
    | Woken
)
