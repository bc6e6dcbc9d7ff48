"""Learning as a part of the snapshot: loads are noted, and models need what was learned of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from orchestrator.core.buffers import parts_on_fullest_gpu
from orchestrator.core.entities import (
    Demand,
    Device,
    DeviceId,
    DeviceKind,
    Model,
    Reading,
    Sample,
    Variant,
)
from orchestrator.core.learned import Learned, is_pushed_out, key_of, nearest, with_higher_floor, with_load
from orchestrator.core.lifecycle import Instance, State
from orchestrator.core.measuring import MOST_OVERHEAD_BYTES, overhead_bytes
from orchestrator.core.snapshot import Snapshot

KEPT = 500
MEASURED, MOVED, FLOOR = "measured", "measured, moved", "raised after running out of memory"
DECLARED = "declared"


# --- what models need


def with_lessons(state: Snapshot) -> Snapshot:
    """Every model needs what was learned of it, as far as anything was."""
    taught = {key: taught_model(state, model) for key, model in state.models.items()}
    if all(taught[key] is model for key, model in state.models.items()):
        return state
    return replace(state, models=taught)


def taught_model(state: Snapshot, model: Model) -> Model:
    if not model.variants:
        return taught_way(state, model)
    variants = tuple(taught_variant(state, model, variant) for variant in model.variants)
    if variants == model.variants:
        return model
    return replace(model.as_variant(variants[-1]), variants=variants)


def taught_variant(state: Snapshot, model: Model, variant: Variant) -> Variant:
    taught = taught_way(state, model.as_variant(variant))
    return replace(variant, demand=taught.demand, untaught=taught.untaught)


def taught_way(state: Snapshot, model: Model) -> Model:
    gpu = first_gpu(state, model)
    if model.recipe is None or gpu is None:
        return model
    base = model.untaught or model.demand
    demand = taught_demand(base, model, gpu, state.learned)
    if demand == model.demand:
        return model
    return replace(model, demand=demand, untaught=base)


def taught_demand(base: Demand, model: Model, gpu: Device, learned: Mapping[str, Learned]) -> Demand:
    """The measurement of exactly this; else one of something near, moved by what is predicted of the two.

    What an owner declared is only raised: it may be meant for more than was ever used. What was predicted to
    fit and has run still fits: of what it grew beyond that the headroom is the place.
    """
    recipe, card = model.recipe, card_of(gpu)
    assert recipe is not None
    predicted = base.gpu_bytes // recipe.gpus
    prompt = base.breakdown.get("gpu0", {}).get("first_prompt", 0)
    own = learned.get(key_of(recipe, card))
    size, source = own.measured_bytes(prompt) if own else None, MEASURED
    if size is not None:
        size = min(size, max(predicted, gpu.usable_bytes))
    if size is None and base.source != DECLARED:
        near = nearest(recipe, card, learned.values())
        known = near.measured_bytes(prompt) if near else None
        if near is not None and known is not None:
            size, source = known + predicted - near.predicted_bytes, MOVED
    if size is None or (base.source == DECLARED and size < predicted):
        size, source = predicted, base.source
    if own is not None and own.floor_bytes > size:
        size, source = own.floor_bytes, FLOOR
    if source == base.source:
        return base
    parts = parts_on_fullest_gpu(own.buffers(), size) if own and source == MEASURED else {}
    return as_demand(base, size, source, recipe.gpus, parts or {source: size})


def as_demand(base: Demand, size: int, source: str, gpus: int, of_each: Mapping[str, int]) -> Demand:
    parts = {f"gpu{number}": of_each for number in range(gpus)}
    rest = {device: part for device, part in base.breakdown.items() if device not in parts}
    whole, breakdown = size * gpus, {**parts, **rest}
    splits = base.splits
    if gpus <= len(splits):
        learned = replace(splits[gpus - 1], each_gpu_bytes=size, source=source, breakdown=breakdown)
        splits = (*splits[: gpus - 1], learned, *splits[gpus:])
    return replace(base, gpu_bytes=whole, source=source, breakdown=breakdown, splits=splits)


def first_gpu(state: Snapshot, model: Model) -> Device | None:
    """The GPU that the model's footprint is told for: the first that it may go to."""
    allowed = (gpu for gpu in state.gpus() if not model.devices or gpu.id in model.devices)
    return next(allowed, None)


def card_of(gpu: Device) -> str:
    return f"{gpu.name}, driver {gpu.driver}" if gpu.driver else gpu.name


# --- what loads show


def learn(state: Snapshot, sample: Sample) -> Snapshot:
    """Note what ready instances use: only of attempts whose start was ours, so that it is known how."""
    for instance in state.instances.values():
        row = observed(state, instance, sample)  # with what it shows of others of its recipe already in it
        if row is not None:
            state = with_learned(state, {**state.learned, row.key: row})
    return state


def observed(state: Snapshot, instance: Instance, sample: Sample) -> Learned | None:
    """The row with what the instance uses, or None if that is no news.

    Of several attempts of one recipe each has its own load; what was predicted changes with a load only.
    """
    model, ready_at_s = state.started_as.get(instance.attempt or ""), instance.ready_at_s
    serves = instance.state in (State.READY, State.DRAINING)
    if model is None or not serves or ready_at_s is None or sample.taken_at_s < ready_at_s:
        return None
    used = most_used(state, instance, sample)
    known = row_of(state, model, instance)
    if used is None or known is None or is_pushed_out(known, state.wall_s - (state.now_s - ready_at_s)):
        return None
    attempt = instance.attempt or ""
    noted = with_load(known, attempt, used, state.wall_s, state.logged.get(attempt))
    return None if noted is known else noted


def most_used(state: Snapshot, instance: Instance, sample: Sample) -> int | None:
    """What it holds on the GPU where it holds most; None unless every one of its GPUs says so by its PIDs.

    What its start cost beside that is in it, up to a limit: somebody else's bytes may be among them.
    """
    attempt, found = instance.attempt or "", []
    for gpu in gpus_of(state, instance):
        reading: Reading | None = sample.readings.get(gpu.id)
        used = reading.by_attempt.get(attempt, 0) if reading and reading.attributed else 0
        if not used:
            return None
        found.append(used + min(overhead_bytes(state, attempt, gpu.id), MOST_OVERHEAD_BYTES))
    return max(found, default=None)


def row_of(state: Snapshot, model: Model, instance: Instance) -> Learned | None:
    """What is known of the model on the card where it runs, empty at first; None if it runs otherwise."""
    gpus, recipe = gpus_of(state, instance), model.recipe
    if recipe is None or len(gpus) != recipe.gpus or len({card_of(gpu) for gpu in gpus}) != 1:
        return None
    card = card_of(gpus[0])
    predicted = (model.untaught or model.demand).gpu_bytes // recipe.gpus
    known = state.learned.get(key_of(recipe, card)) or Learned(recipe, card, predicted)
    return known if known.predicted_bytes == predicted else replace(known, predicted_bytes=predicted)


def gpus_of(state: Snapshot, instance: Instance) -> list[Device]:
    placed: list[DeviceId] = list(instance.placement)
    found = [state.devices[device] for device in placed if device in state.devices]
    return sorted((d for d in found if d.kind is DeviceKind.GPU), key=lambda device: device.index)


def with_learned(state: Snapshot, learned: Mapping[str, Learned]) -> Snapshot:
    """The newest so many rows are kept."""
    if len(learned) > KEPT:
        newest = sorted(learned.items(), key=lambda item: item[1].at, reverse=True)[:KEPT]
        learned = dict(newest)
    return with_lessons(replace(state, learned=learned))


def without_lessons(state: Snapshot, keys: Collection[str]) -> Snapshot:
    """These rows are gone, and models need again what is predicted or declared."""
    kept = {key: row for key, row in state.learned.items() if key not in keys}
    return state if len(kept) == len(state.learned) else with_learned(state, kept)


# --- out of memory


def with_floor(state: Snapshot, instance: Instance) -> Snapshot:
    """It ran out of memory with what it had reserved: it is promised more the next time.

    If others have taken what it was promised, its end says nothing of what it needs.
    """
    model = state.started_as.get(instance.attempt or "")
    known = row_of(state, model, instance) if model is not None else None
    if known is None:
        return state
    gpus = gpus_of(state, instance)
    if any(
        others_bytes(state, instance, gpu) > gpu.capacity_bytes - instance.placement[gpu.id] for gpu in gpus
    ):
        return state
    reserved = max(instance.placement[gpu.id] for gpu in gpus)
    raised = with_higher_floor(known, reserved, min(gpu.usable_bytes for gpu in gpus))
    return with_learned(state, {**state.learned, raised.key: raised})


def others_bytes(state: Snapshot, instance: Instance, gpu: Device) -> int:
    """What the processes of everybody else hold, as far as it is known whose they are."""
    reading = state.reading(gpu.id)
    if reading is None:
        return 0
    ours = sum(used for attempt, used in reading.by_attempt.items() if attempt != instance.attempt)
    return ours + sum(process.used_bytes for process in reading.foreign)
