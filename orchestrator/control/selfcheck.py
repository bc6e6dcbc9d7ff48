"""Do the ledger, the store, the engine and the devices tell the same story? Pure comparison.

Nothing is corrected here: resync does that. What differs is told, because each difference is either an
accident from outside or a bug of ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from orchestrator.control.ports import Found
from orchestrator.core.entities import MIB, DeviceId, DeviceKind, ModelId, Reading
from orchestrator.core.foreign import foreign_holdings
from orchestrator.core.ledger import available_bytes, measured_use
from orchestrator.core.lifecycle import HAS_PROCESS, MAY_HAVE_PROCESS, Instance, State
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.wording import held_by, mib

SERVING = frozenset({State.READY, State.DRAINING})
TOLERANCE_BYTES = 64 * MIB
"""What a holder may use beyond its reservation before it is worth a word."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Two of `store`, `engine`, `devices` and the loop disagree; `key` is the same while they go on to."""

    key: str
    text: str
    model: ModelId | None = None


def compare(
    before: Snapshot, found: Iterable[Found], rows: Mapping[ModelId, Instance] | None, after: Snapshot
) -> tuple[Difference, ...]:
    """Compare what was read with what the loop knew before and after it was read.

    Only what stayed the same meanwhile is compared. `rows` is None where the store could not be read.
    """
    steady = [i for i in after.instances.values() if before.instances.get(i.model) is i]
    return (
        *with_engine(before, after, steady, found),
        *(with_store(steady, rows) if rows is not None else ()),
        *with_devices(after, steady),
    )


def with_engine(
    before: Snapshot, after: Snapshot, steady: Iterable[Instance], found: Iterable[Found]
) -> Iterable[Difference]:
    running = {item.attempt: item for item in found if item.is_running}
    for instance in steady:
        if instance.state in SERVING and instance.attempt not in running:
            text = f"'{instance.model}' is {instance.state}, but the engine does not run it"
            yield Difference(f"engine {instance.attempt}", text, instance.model)
    known = {i.attempt for s in (before, after) for i in s.instances.values() if i.state in MAY_HAVE_PROCESS}
    for attempt, item in running.items():
        if attempt not in known and not item.is_lent:
            text = f"the engine runs an attempt of '{item.model}' that nobody knows"
            yield Difference(f"engine {attempt}", text, item.model)


def with_store(steady: Iterable[Instance], rows: Mapping[ModelId, Instance]) -> Iterable[Difference]:
    for instance in steady:
        row = rows.get(instance.model) or Instance(instance.model)
        names_a_process = HAS_PROCESS & {row.state, instance.state}
        if row.state is not instance.state or (names_a_process and row.attempt != instance.attempt):
            text = f"'{instance.model}' is {instance.state}, but the store remembers it as {row.state}"
            yield Difference(f"store {instance.model} {row.state} {instance.state}", text, instance.model)


def with_devices(after: Snapshot, steady: Iterable[Instance]) -> Iterable[Difference]:
    serving = [i for i in steady if i.state in SERVING]
    for device_id in after.devices:
        reading = after.reading(device_id)
        if reading is None:
            continue
        yield from overbooked(after, device_id, reading)
        for instance in serving:
            yield from odd_use(after, instance, device_id, reading)


def overbooked(after: Snapshot, device_id: DeviceId, reading: Reading) -> Iterable[Difference]:
    """More is promised than the device has left, and no claim waits for somebody to leave."""
    device = after.devices[device_id]
    holders = [i for i in after.instances.values() if device_id in i.placement]
    if any(i.state is State.CLAIMED for i in holders):
        return
    missing = -available_bytes(device, reading, holders)
    if missing > TOLERANCE_BYTES + device.headroom_bytes:
        others = held_by(foreign_holdings(reading.foreign, after.container_names))
        text = (
            f"{device.label} lacks {mib(missing)} for what is promised there: "
            f"{mib(reading.free_bytes)} are free, others hold {others or 'nothing'}"
        )
        yield Difference(f"devices {device_id} overbooked", text)


def odd_use(
    after: Snapshot, instance: Instance, device_id: DeviceId, reading: Reading
) -> Iterable[Difference]:
    """It uses more than it reserved, or none of its part of a GPU."""
    reserved = instance.placement.get(device_id, 0)
    device = after.devices[device_id]
    was_seen_since = after.sample.taken_at_s > (instance.ready_at_s or instance.since_s)
    if not reserved or not reading.attributed or not was_seen_since:
        return
    used = measured_use(instance, device_id, reading)
    key = f"devices {device_id} {instance.attempt}"
    if used > reserved + TOLERANCE_BYTES:
        text = f"'{instance.model}' uses {mib(used)} on {device.label}, and reserved only {mib(reserved)}"
        yield Difference(f"{key} over", text, instance.model)
    elif used == 0 and device.kind is DeviceKind.GPU:
        text = f"'{instance.model}' serves, but uses nothing of its {mib(reserved)} on {device.label}"
        yield Difference(f"{key} none", text, instance.model)
