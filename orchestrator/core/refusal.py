"""Why a model cannot be placed, in numbers: what it needs, what could be had, who keeps the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.core.draft import Draft
from orchestrator.core.entities import HOST, MIB, Demand, DeviceId, Model, Variant
from orchestrator.core.foreign import foreign_holdings
from orchestrator.core.lifecycle import State
from orchestrator.core.placement import Placement, emptied_room, placements, usable_room
from orchestrator.core.verdicts import Holding, Lacking, Refused
from orchestrator.core.victims import may_ever_leave

WORTH_NAMING_BYTES = 64 * MIB
"""Of every process the driver keeps some MiB that it puts down to nobody."""


def refusal(draft: Draft, model: Model) -> Refused | None:
    """Numbers of why it cannot be, even with every unpinned holder gone; None if it could be.

    Of a model with variants those of the one that comes closest: the least need not be it, since layers that
    are not on the GPU are in RAM.
    """
    emptied, capacity = draft.remember(emptied_room), draft.remember(usable_room)
    misses: list[Miss] = []
    for variant in reversed(model.variants or (model.run_with({}),)):
        for placement in placements(draft, model.as_variant(variant), [emptied, capacity]):
            miss = missed(variant, placement, emptied, capacity)
            if miss is None:
                return None
            misses.append(miss)
    closest = min(misses, key=lambda miss: miss.distance, default=None)
    return refused(draft, model, closest) if closest else nowhere(draft, model)


@dataclass(frozen=True, slots=True)
class Miss:
    """A placement of a variant that cannot be had, and by how many bytes on each device.

    `forever` if it could not be had on empty devices either; then that is what the bytes are counted from.
    """

    variant: Variant
    placement: Placement
    short: Mapping[DeviceId, int]
    forever: bool

    @property
    def distance(self) -> tuple[bool, int]:
        return self.forever, sum(self.short.values())


def missed(
    variant: Variant,
    placement: Placement,
    emptied: Mapping[DeviceId, int],
    capacity: Mapping[DeviceId, int],
) -> Miss | None:
    forever = shortage(placement, capacity)
    short = forever or shortage(placement, emptied)
    return Miss(variant, placement, short, forever=bool(forever)) if short else None


def shortage(placement: Placement, room: Mapping[DeviceId, int]) -> dict[DeviceId, int]:
    return {device: need - room[device] for device, need in placement.items() if need > room[device]}


def refused(draft: Draft, model: Model, miss: Miss) -> Refused:
    """In the numbers of the device that lacks most."""
    device = max(miss.short, key=lambda short: miss.short[short])
    of_gpus = [need for used, need in miss.placement.items() if used != HOST]
    return Refused(
        model.id,
        device,
        needed_bytes=miss.placement[device],
        available_bytes=max(0, draft.remember(emptied_room)[device]),
        capacity_bytes=draft.remember(usable_room)[device],
        holders=kept_holdings(draft, device),
        forever=miss.forever,
        device_label=draft.device(device).label,
        gpus=max(1, len(of_gpus)),
        gpus_bytes=sum(of_gpus),
        tunable=model.tunable,
        source=miss.variant.demand.source,
        can_spread=can_spread(draft, model, miss.variant.demand),
        parameters=miss.variant.parameters,
    )


def can_spread(draft: Draft, model: Model, demand: Demand) -> bool:
    """Whether more GPUs than its entry allows could take it, when empty."""
    room = sorted((gpu.usable_bytes for gpu in draft.gpus), reverse=True)
    allowed = len(model.devices) or max(model.gpu_counts)
    counts = range(allowed + 1, len(room) + 1)
    return any(demand.gpu_bytes <= count * room[count - 1] for count in counts)


def nowhere(draft: Draft, model: Model) -> Refused:
    """There are not the GPUs that it asks for."""
    unknown = tuple(device for device in model.devices if device not in draft.snapshot.devices)
    count = min(model.gpu_counts)
    lacking = Lacking(count, unknown, draft.gpus)
    device = ", ".join(model.devices) or f"{count} GPUs"
    needed = model.demand.gpu_bytes + model.demand.host_bytes
    return Refused(model.id, device, needed, 0, 0, forever=True, gpus=count, lacking=lacking)


def kept_holdings(draft: Draft, device: DeviceId) -> tuple[Holding, ...]:
    """Who holds what cannot be freed: pinned and stuck models, and those who are not ours."""
    kept = [
        Holding(
            holder.model, draft.held(holder, device), "stuck" if holder.state is State.STUCK else "pinned"
        )
        for holder in draft.on_device(device)
        if not may_ever_leave(draft, holder)
    ]
    reading = draft.reading(device)
    if reading is not None:
        kept += foreign_holdings(reading.foreign, draft.snapshot.container_names)
        if reading.unexplained_bytes >= WORTH_NAMING_BYTES:
            kept.append(Holding("nobody we know", reading.unexplained_bytes, "memory of no process"))
    return tuple(sorted(kept, key=lambda holding: (-holding.held_bytes, holding.holder)))
