"""The nouns: devices and their samples, models, queue entries, plans. All immutable, all plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import ceil
from typing import TypeAlias

from orchestrator.core.health import Incident, Telemetry

ModelId: TypeAlias = str
DeviceId: TypeAlias = str
AttemptId: TypeAlias = str
WaiterId: TypeAlias = str
OperationId: TypeAlias = str
ContainerId: TypeAlias = str

HOST: DeviceId = "host"
"""The machine's RAM, which is always one of the devices."""

MIB = 1024 * 1024


class DeviceKind(StrEnum):
    GPU = "gpu"
    HOST = "host"


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU, or the machine's RAM. `capacity_bytes` is what all holders together can ever have."""

    id: DeviceId
    index: int
    name: str
    kind: DeviceKind
    capacity_bytes: int
    headroom_bytes: int = 0
    driver: str = ""

    @property
    def usable_bytes(self) -> int:
        return max(0, self.capacity_bytes - self.headroom_bytes)

    @property
    def label(self) -> str:
        """For people, who know a GPU by its number, and may have two of one name."""
        return self.name if self.kind is DeviceKind.HOST else f"GPU {self.index} ({self.name})"


@dataclass(frozen=True, slots=True)
class ForeignProcess:
    """A process nobody registered that holds memory on a device.

    `container` is the id (64 hexadecimal digits) of the one it runs in; None outside of any.
    """

    pid: int
    name: str
    used_bytes: int
    container: ContainerId | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """One device's memory and its processes, read together.

    `unexplained_bytes` is used memory that no listed process accounts for: bytes that return late,
    or processes that cannot be seen (`attributed` is False where none can).
    """

    free_bytes: int
    used_bytes: int
    by_attempt: Mapping[AttemptId, int] = field(default_factory=dict)
    foreign: tuple[ForeignProcess, ...] = ()
    unexplained_bytes: int = 0
    attributed: bool = True


@dataclass(frozen=True, slots=True)
class Sample:
    """Every device at one moment. A device is in `readings` or, with the reason, in `errors`.

    `taken_at_s` is when the reading began (monotonic), so a sample is newer than an exit only if all
    of it was. Of those in `errors`, what ran on the `broken` ones is lost. `telemetry` is a few seconds old
    at most; `incidents` were reported since the sample before.
    """

    taken_at_s: float
    readings: Mapping[DeviceId, Reading] = field(default_factory=dict)
    errors: Mapping[DeviceId, str] = field(default_factory=dict)
    broken: frozenset[DeviceId] = frozenset()
    telemetry: Mapping[DeviceId, Telemetry] = field(default_factory=dict)
    incidents: tuple[Incident, ...] = ()


@dataclass(frozen=True, slots=True)
class Split:
    """What a model needs over a certain number of GPUs: each has a context and buffers of its own."""

    each_gpu_bytes: int
    host_bytes: int
    source: str
    breakdown: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a model needs before devices are chosen. Where there is no GPU, RAM carries all of it.

    `breakdown` has the bytes of each component by device (`gpu0` and so on, `host`), where they are known.
    `splits` are over 1, 2, … GPUs, where that is known. Else each carries an even part.
    """

    gpu_bytes: int
    host_bytes: int = 0
    source: str = "declared"
    breakdown: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    splits: tuple[Split, ...] = ()

    def over(self, gpus: int) -> Demand:
        """What it is over so many GPUs; the same where nothing else is known of that."""
        if not 0 < gpus <= len(self.splits):
            return self
        split = self.splits[gpus - 1]
        return replace(
            self,
            gpu_bytes=split.each_gpu_bytes * gpus,
            host_bytes=split.host_bytes,
            source=split.source,
            breakdown=split.breakdown,
        )

    def spread(self, devices: Sequence[DeviceId]) -> dict[DeviceId, int]:
        """The bytes each device carries when this is split evenly over these."""
        way = self.over(len(devices))
        share = ceil(way.gpu_bytes / len(devices))
        placement = {device: share for device in devices if share}
        if way.host_bytes:
            placement[HOST] = placement.get(HOST, 0) + way.host_bytes
        return placement


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides a model's memory beside the card: two models of the same recipe take the same.

    `content` stands for its files, `service` for image, command and environment; `gpus` is how many it is
    split over.
    """

    content: str
    service: str
    context_size: int
    n_gpu_layers: int
    parallel: int
    cache_type_k: str
    cache_type_v: str
    gpus: int

    def is_near(self, other: Recipe) -> bool:
        """Whether the two differ in context and cache types at most."""
        return (
            self.content == other.content
            and self.service == other.service
            and self.n_gpu_layers == other.n_gpu_layers
            and self.parallel == other.parallel
            and self.gpus == other.gpus
        )


@dataclass(frozen=True, slots=True)
class Launch:
    """How an engine starts a model; placeholders are filled in, all but `{port}` and `{tensor_split}`.

    `volumes` maps a named volume or an absolute host path to a path inside the container; those in
    `read_only_volumes` cannot be written there.
    `mounts` are host paths the model's own files need, read-only, as (host path, container path).
    """

    service: str
    image: str | None = None
    command: tuple[str, ...] | None = None
    container_command: tuple[str, ...] | None = None
    port: int = 8000
    health_path: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict)
    container_environment: Mapping[str, str] = field(default_factory=dict)
    volumes: Mapping[str, str] = field(default_factory=dict)
    read_only_volumes: frozenset[str] = frozenset()
    mounts: tuple[tuple[str, str], ...] = ()
    container_name: str | None = None
    shm_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the ways to run a model whose parameters are chosen when it is placed; the rest as in Model."""

    parameters: Mapping[str, int]
    demand: Demand
    launch: Launch
    recipe: Recipe | None = None
    untaught: Demand | None = None


@dataclass(frozen=True, slots=True)
class Model:
    """A catalogue entry: what users load, as the planner and the engines need it.

    `variants` are the ways to run it where its entry says `auto`, the largest first; `demand` and `launch`
    are those of the last one, which is the least that it needs.
    `gpu_counts` are the numbers of GPUs it may be split over evenly, in order of preference.
    `devices` narrows where it may go (empty: anywhere). `problem` says why it cannot be loaded at all
    (a missing file, say); such a model is listed and refused. `recipe` is what its measured footprint is
    remembered by; once something was learned, `untaught` is the demand without it. `tunable` are the fields
    of its entry that would make it need less if they were less.
    """

    id: ModelId
    demand: Demand
    launch: Launch
    api: str = "openai"
    aliases: tuple[str, ...] = ()
    served_name: str | None = None
    gpu_counts: tuple[int, ...] = (1,)
    devices: tuple[DeviceId, ...] = ()
    priority: int = 50
    pinned: bool = False
    idle_after_s: float | None = 1800.0
    deadline_s: float = 300.0
    start_timeout_s: float = 600.0
    stop_grace_s: float = 10.0
    drain_limit_s: float = 600.0
    queue_limit: int = 64
    problem: str | None = None
    description: str = ""
    recipe: Recipe | None = None
    untaught: Demand | None = None
    variants: tuple[Variant, ...] = ()
    tunable: frozenset[str] = frozenset()

    def run_with(self, parameters: Mapping[str, int]) -> Variant:
        """The variant with these parameters; without such a one what is the least."""
        found = (variant for variant in self.variants if variant.parameters == parameters)
        return next(found, Variant({}, self.demand, self.launch, self.recipe, self.untaught))

    def as_variant(self, variant: Variant) -> Model:
        """The same, as it is when it is run so."""
        return replace(
            self,
            demand=variant.demand,
            launch=variant.launch,
            recipe=variant.recipe,
            untaught=variant.untaught,
            variants=(),
        )


NEVER_RAN = frozenset({"image_missing", "name_taken", "start_failed"})
"""Codes of failures of a start that an engine refused."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt ended unasked. `log_tail` holds its last log lines, oldest first."""

    message: str
    code: str = "service_failed"
    exit_code: int | None = None
    oom: bool = False
    log_tail: tuple[str, ...] = ()

    @property
    def has_log(self) -> bool:
        """Whether anything of it ran that could have printed something."""
        return bool(self.log_tail) or self.code not in NEVER_RAN


LOADING = "loading"
"""The stage of a start that the engine has performed; its detail is what the health path said last."""
NOBODY_LISTENS = "nobody listens there"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a start is: `value` from 0 to 1, or None where it cannot be known."""

    stage: str
    value: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """What an instance's gate has counted: requests in flight, all ever let in, when the last one ended."""

    in_flight: int = 0
    entered: int = 0
    last_ended_s: float | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A model somebody waits for. `waiters` are requests and load operations, in order of arrival.

    `place_since_s` is since when a place is kept free for it (patience.py).
    """

    model: ModelId
    since_s: float
    waiters: tuple[WaiterId, ...]
    tries_now: bool = False
    reason: str = "waiting for its turn"
    place_since_s: float | None = None


@dataclass(frozen=True, slots=True)
class Age:
    """How long ago a wait began that ended with "not now", and until when coming back goes on with it."""

    since_s: float
    kept_until_s: float
    place_since_s: float | None = None


class OperationKind(StrEnum):
    LOAD = "load"
    UNLOAD = "unload"
    DOWNLOAD = "download"
    REMOVE = "remove"


class OperationState(StrEnum):
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Operation:
    """A load, unload, download or removal as a user sees it. Both `…_at` are seconds since 1970."""

    id: OperationId
    kind: OperationKind
    model: ModelId
    created_at: float
    state: OperationState = OperationState.RUNNING
    message: str = ""
    code: str | None = None
    freed_bytes: int = 0
    ended_at: float | None = None


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. `blob` names its content: a SHA-256, or for small files git's SHA-1."""

    path: str
    size_bytes: int
    blob: str


class DownloadState(StrEnum):
    RUNNING = "running"
    COMPLETE = "complete"
    REMOVING = "removing"


@dataclass(frozen=True, slots=True)
class Download:
    """A model's files of one revision of a repository, on their way into the cache, there, or leaving.

    `path` and `mmproj` are those of `files` that the model is loaded from. `is_listed` says that the
    catalogue's files name the model; then this is forgotten once it is complete. `operation` is the newest
    one about it.
    """

    model: ModelId
    repo: str
    commit: str
    files: tuple[HubFile, ...]
    path: str
    operation: OperationId
    mmproj: str | None = None
    alias: str | None = None
    is_listed: bool = False
    state: DownloadState = DownloadState.RUNNING

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Note:
    """A line of the event log: what happened to whom, and why."""

    kind: str
    text: str
    model: ModelId | None = None
    attempt: AttemptId | None = None
    data: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Start:
    """Start this attempt on these devices (bytes by device), with the parameters that were chosen for it."""

    attempt: AttemptId
    model: ModelId
    placement: Mapping[DeviceId, int]
    parameters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop this attempt: ask, wait `grace_s`, then kill."""

    attempt: AttemptId
    model: ModelId
    grace_s: float
    reason: str


Action: TypeAlias = Start | Stop
