"""How GPUs are: what they tell for display, and what they report of themselves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Telemetry:
    """A GPU's readings for people; nothing is decided by them. None where the card does not tell.

    `utilization_percent` is the part of the last moment in which anything ran (so it says nothing of how
    much), `memory_utilization_percent` the same of its memory's bus. ECC errors are counted since the driver
    was loaded. `throttled_by` says why the clocks are lower than they could be.
    """

    utilization_percent: int | None = None
    memory_utilization_percent: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    ecc_corrected: int | None = None
    ecc_uncorrected: int | None = None
    throttled_by: tuple[str, ...] = ()


class Blame(StrEnum):
    """Whose fault an incident usually is."""

    NOBODY = "nobody"  # it passes, or follows from something else
    PROGRAM = "program"  # the program that used the GPU; its CUDA context is lost
    GPU = "gpu"


@dataclass(frozen=True, slots=True)
class Incident:
    """An error that a GPU's driver has reported: `code` is NVIDIA's XID, `text` a sentence about it."""

    device: str
    code: int
    blame: Blame
    text: str


@dataclass(frozen=True, slots=True)
class Fault:
    """What a GPU has reported that was the fault of an attempt, and when (monotonic)."""

    at_s: float
    text: str


@dataclass(frozen=True, slots=True)
class Reported:
    """An incident and when it was heard of, in seconds since 1970."""

    at: float
    incident: Incident
