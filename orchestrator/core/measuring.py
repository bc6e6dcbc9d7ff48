"""What living attempts use, as samples show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from orchestrator.core.entities import MIB, AttemptId, DeviceId, Reading, Sample
from orchestrator.core.lifecycle import Instance, State
from orchestrator.core.snapshot import Measured, Snapshot

MOST_OVERHEAD_BYTES = 32 * MIB
"""More than any start is known to cost beside what its processes are said to have."""


def measure(state: Snapshot, instance: Instance, sample: Sample, previous: Sample) -> Snapshot:
    """Remember what a living attempt uses: for its end, and where PIDs are hidden for the ledger."""
    attempt = instance.attempt or ""
    measured = dict(state.measured.get(attempt, {}))
    assumed: dict[DeviceId, int] = {}
    still_grows = grows(instance, previous)
    for device in instance.placement:
        reading = sample.readings.get(device)
        if reading is None:
            continue
        known = measured.get(device) or unseen(previous.readings.get(device, reading))
        if reading.attributed:
            measured[device] = by_its_processes(known, instance, reading, still_grows)
            continue
        counts = still_grows
        if still_grows and another_grows(state, instance, device, previous):
            known, counts = unseen(reading), False
        assumed[device] = growth(known, reading) if counts else instance.assumed_bytes.get(device, 0)
        measured[device] = replace(known, used_bytes=assumed[device])
    state = replace(state, measured={**state.measured, attempt: measured})
    if not assumed or assumed == instance.assumed_bytes:
        return state
    grown = replace(instance, assumed_bytes=assumed)
    return replace(state, instances={**state.instances, instance.model: grown})


def grows(instance: Instance, previous: Sample) -> bool:
    """A start may begin and be ready between two samples: the first sample after that still counts to it."""
    return instance.state is State.STARTING or previous.taken_at_s < (instance.ready_at_s or 0.0)


def another_grows(state: Snapshot, instance: Instance, device: DeviceId, previous: Sample) -> bool:
    """Whether one that began earlier does, as where somebody else's was taken over meanwhile.

    Where PIDs cannot be read growth counts once, or what one took would be no more kept back for the other.
    """
    return any(
        (other.claimed_at_s, other.model) < (instance.claimed_at_s, instance.model)
        and device in other.placement
        and other.state in (State.STARTING, State.READY, State.DRAINING)
        and grows(other, previous)
        for other in state.instances.values()
    )


def unseen(reading: Reading) -> Measured:
    """Before the attempt has anything."""
    before = reading.unexplained_bytes
    return Measured(unexplained_bytes=before, unexplained_before=before)


def growth(known: Measured, reading: Reading) -> int:
    """What nobody can explain, beyond what was so before the attempt started."""
    return max(0, reading.unexplained_bytes - known.unexplained_before)


def by_its_processes(known: Measured, instance: Instance, reading: Reading, still_grows: bool) -> Measured:
    used = reading.by_attempt.get(instance.attempt or "", 0)
    if still_grows:
        known = replace(known, overhead_bytes=growth(known, reading))
    is_giving_back = instance.state is State.STOPPING and used <= known.used_bytes
    if is_giving_back or (used == 0 and known.used_bytes):
        return known  # it dies, or has just died: keep what it held and what was unexplained before
    return replace(known, used_bytes=used, unexplained_bytes=reading.unexplained_bytes)


def last_measured(state: Snapshot, instance: Instance) -> Mapping[DeviceId, Measured]:
    """What it held when it was last seen alive.

    One that served and left between two samples held what was reserved, as far as anybody knows.
    """
    held = dict(state.measured.get(instance.attempt or "", {}))
    if instance.ready_at_s is not None:
        for device, reserved in instance.placement.items():
            reading = state.sample.readings.get(device)
            if reading is not None and not (device in held and held[device].used_bytes):
                held[device] = replace(unseen(reading), used_bytes=reserved)
    return held


def overhead_bytes(state: Snapshot, attempt: AttemptId, device: DeviceId) -> int:
    """What the attempt costs the device beside what its processes are said to have."""
    known = state.measured.get(attempt, {}).get(device)
    return known.overhead_bytes if known else 0
