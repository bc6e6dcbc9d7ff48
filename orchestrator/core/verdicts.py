"""What becomes of a wait: ready, or why not. Decisions in numbers and names; wording.py makes sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from orchestrator.core.entities import AttemptId, Device, DeviceId, Failure, ModelId


@dataclass(frozen=True, slots=True)
class Holding:
    """Somebody's part of a device, for refusals that name who holds what."""

    holder: str
    held_bytes: int
    why_kept: str


@dataclass(frozen=True, slots=True)
class Lacking:
    """GPUs that an entry asks for and this machine does not have: `unknown` by UUID, or `count` of them.

    `present` are those that it has, in index order.
    """

    count: int
    unknown: tuple[DeviceId, ...] = ()
    present: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """A decision, not an error: the model cannot be placed. Numbers are of the device that came closest.

    `forever` means the devices could not take it even when empty, or are not there (`lacking`). `gpus` is
    over how many it would be split, `gpus_bytes` what it needs of them together. `tunable` is the model's,
    `source` its footprint's; `can_spread` says that more GPUs than it may have could take it. Of a model with
    variants it is the one that comes closest, which has these `parameters`.
    """

    model: ModelId
    device: DeviceId
    needed_bytes: int
    available_bytes: int
    capacity_bytes: int
    holders: tuple[Holding, ...] = ()
    forever: bool = False
    device_label: str = ""
    gpus: int = 1
    gpus_bytes: int = 0
    lacking: Lacking | None = None
    tunable: frozenset[str] = frozenset()
    source: str = ""
    can_spread: bool = False
    parameters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unmeasured:
    """A decision: admission stops because devices cannot be measured; `errors` says why, by device.

    `labels` are the devices' names for people.
    """

    model: ModelId
    errors: Mapping[DeviceId, str]
    labels: Mapping[DeviceId, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The wait ended because somebody unloaded the model (and holds it out until `held_until_s`)."""

    model: ModelId
    held_until_s: float | None = None


@dataclass(frozen=True, slots=True)
class Broken:
    """The attempt waited for failed, or the next one is due only after the waiter's deadline."""

    model: ModelId
    failure: Failure
    retry_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Unusable:
    """The catalogue entry cannot be loaded as it is written."""

    model: ModelId
    problem: str


@dataclass(frozen=True, slots=True)
class Downloading:
    """Its files are still on their way."""

    model: ModelId
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class QueueFull:
    model: ModelId
    limit: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The instance serves; the waiter may enter its gate."""

    model: ModelId
    attempt: AttemptId


Verdict: TypeAlias = Ready | Refused | Unmeasured | Unloaded | Broken | Unusable | Downloading | QueueFull
