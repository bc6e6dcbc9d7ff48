"""Snapshots for tests: by hand with `world`, or drawn at random with a device truth to check against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from orchestrator.core.entities import (
    HOST,
    MIB,
    Demand,
    Device,
    DeviceKind,
    Entry,
    Failure,
    ForeignProcess,
    Launch,
    Model,
    Reading,
    Sample,
    Usage,
    Variant,
)
from orchestrator.core.lifecycle import AT_REST, HAS_PROCESS, Instance, State
from orchestrator.core.snapshot import Snapshot

NOW_S = 1000.0


def gpu(index: int, capacity_mib: int, headroom_mib: int = 0) -> Device:
    return Device(
        f"GPU-{index}", index, f"GPU {index}", DeviceKind.GPU, capacity_mib * MIB, headroom_mib * MIB
    )


def ram(capacity_mib: int) -> Device:
    return Device(HOST, -1, "RAM", DeviceKind.HOST, capacity_mib * MIB)


def model(name: str, gpu_mib: int, host_mib: int = 0, **more: object) -> Model:
    made = Model(name, Demand(gpu_mib * MIB, host_mib * MIB), Launch("test", command=("true",)))
    return replace(made, **more)  # type: ignore[arg-type]


def instance(name: str, state: State, placement: Mapping[str, int] | None = None, **more: object) -> Instance:
    """`placement` in MiB by device; ready since long ago."""
    made = Instance(
        name,
        state,
        since_s=NOW_S - 500,
        attempt=f"{name}-1" if state not in AT_REST else None,
        placement={d: size * MIB for d, size in (placement or {}).items()},
        claimed_at_s=NOW_S - 500,
        started_at_s=NOW_S - 500,
        ready_at_s=NOW_S - 490 if state in (State.READY, State.DRAINING) else None,
        load_time_s=2.0,
        host="127.0.0.1",
        port=1,
    )
    return replace(made, **more)  # type: ignore[arg-type]


def entry(name: str, waited_s: float = 0.0, **more: object) -> Entry:
    return replace(Entry(name, NOW_S - waited_s, (f"r-{name}",)), **more)  # type: ignore[arg-type]


def world(
    devices: list[Device],
    models: list[Model],
    instances: list[Instance] | None = None,
    entries: list[Entry] | None = None,
    used_mib: Mapping[tuple[str, str], int] | None = None,
    foreign_mib: Mapping[str, int] | None = None,
    **more: object,
) -> Snapshot:
    """A snapshot whose sample shows `used_mib` by (model, device); by default what is reserved is used."""
    instances = instances or []
    uses = {
        (i.model, d): size // MIB
        for i in instances
        if i.state in HAS_PROCESS
        for d, size in i.placement.items()
    } | dict(used_mib or {})
    attempts = {i.model: i.attempt for i in instances}
    readings = {}
    for device in devices:
        here = {attempts[m] or "": mib * MIB for (m, d), mib in uses.items() if d == device.id}
        foreign = (foreign_mib or {}).get(device.id, 0) * MIB
        used = sum(here.values()) + foreign
        others = (ForeignProcess(99, "game", foreign),) if foreign else ()
        readings[device.id] = Reading(device.capacity_bytes - used, used, here, others)
    made = Snapshot(
        now_s=NOW_S,
        wall_s=1.7e9,
        seed="seed",
        devices={d.id: d for d in devices},
        models={m.id: m for m in models},
        sample=Sample(NOW_S - 0.1, readings),
        instances={i.model: i for i in instances},
        entries={e.model: e for e in entries or []},
    )
    return replace(made, **more)  # type: ignore[arg-type]


def busy(*names: str, in_flight: int = 1) -> dict[str, Usage]:
    return {f"{name}-1": Usage(in_flight, 5, None) for name in names}


@dataclass(frozen=True)
class Drawn:
    """A random snapshot, what the gates count, and the truth about the devices in bytes."""

    snapshot: Snapshot
    usage: dict[str, Usage]
    foreign: dict[str, int] = field(default_factory=dict)


STATES = [
    State.STOPPED,
    State.FAILED,
    State.READY,
    State.READY,
    State.READY,
    State.STARTING,
    State.DRAINING,
    State.STOPPING,
    State.STUCK,
    State.RECLAIMING,
]


@st.composite
def worlds(draw: st.DrawFn) -> Drawn:
    """Up to 3 GPUs or RAM alone, up to 7 models, about half of them somewhere in their life."""
    devices = draw_devices(draw)
    gpus = [d for d in devices if d.kind is DeviceKind.GPU]
    names = [f"m{i}" for i in range(draw(st.integers(1, 7)))]
    models = [draw_model(draw, name, len(gpus)) for name in names]
    free = {d.id: d.usable_bytes // MIB for d in devices}
    foreign = {d.id: draw(st.sampled_from([0, 0, 1, 3])) for d in devices}
    for device, size in foreign.items():
        free[device] -= size
    instances, used, usage = [], {}, {}
    for one in models:
        made = draw_instance(draw, one, gpus, free)
        if made is None:
            continue
        instances.append(made)
        for device, size in made.placement.items():
            share = draw(st.integers(0, size // MIB)) if made.state is State.STARTING else size // MIB
            used[(one.id, device)] = 0 if made.state is State.CLAIMED else share
        if made.state in (State.READY, State.DRAINING) and made.attempt:
            ended = draw(st.sampled_from([None, NOW_S - 0.1, NOW_S - 5]))
            usage[made.attempt] = Usage(draw(st.sampled_from([0, 0, 1, 2])), 3, ended)
    entries = [
        entry(m.id, waited_s=draw(st.sampled_from([0.0, 1.0, 25.0, 400.0])), tries_now=draw(st.booleans()))
        for m in models
        if draw(st.booleans()) and not any(i.model == m.id and i.state is State.READY for i in instances)
    ]
    snapshot = world(devices, models, instances, entries, used, foreign)
    return Drawn(snapshot, usage, {d: size * MIB for d, size in foreign.items()})


def draw_devices(draw: st.DrawFn) -> list[Device]:
    count = draw(st.integers(0, 3))
    gpus = [gpu(i, draw(st.sampled_from([12, 24])), draw(st.sampled_from([0, 1]))) for i in range(count)]
    return [*gpus, ram(draw(st.sampled_from([16, 40])))]


def draw_model(draw: st.DrawFn, name: str, gpus: int) -> Model:
    counts = draw(st.sampled_from([(1,), (1,), (2,), (1, 2, 3)])) if gpus else (1,)
    gpu_mib, host_mib = draw(st.integers(1, 26)), draw(st.sampled_from([0, 0, 2]))
    larger = draw(st.sampled_from([(), (), (1,), (9, 4)]))
    return model(
        name,
        gpu_mib,
        host_mib,
        variants=variants(gpu_mib, host_mib, (*larger, 0)) if larger else (),
        gpu_counts=counts,
        priority=draw(st.sampled_from([40, 50, 60])),
        pinned=draw(st.sampled_from([False, False, False, True])),
        idle_after_s=draw(st.sampled_from([None, 100.0, 10000.0])),
    )


def variants(gpu_mib: int, host_mib: int, larger_mib: Sequence[int]) -> tuple[Variant, ...]:
    """Ways to run a model that need so much more on the GPU than the least."""
    return tuple(
        Variant({"more": more}, Demand((gpu_mib + more) * MIB, host_mib * MIB), Launch("test"))
        for more in larger_mib
    )


def draw_instance(draw: st.DrawFn, one: Model, gpus: list[Device], free: dict[str, int]) -> Instance | None:
    """An instance somewhere in its life that physically fits beside those drawn before it."""
    state = draw(st.sampled_from(STATES))
    more: dict[str, object] = {"ready_at_s": NOW_S - draw(st.sampled_from([2.0, 30.0, 500.0]))}
    if state in AT_REST:
        failure = Failure("it broke") if state is State.FAILED else None
        retry_at_s = NOW_S + 5 if failure else None
        return instance(one.id, state, failure=failure, retry_at_s=retry_at_s, failures=1 if failure else 0)
    count = one.gpu_counts[0]
    where = [g.id for g in gpus[:count]] if gpus else [HOST]
    if gpus and len(where) < count:
        return None
    total = one.demand.gpu_bytes // MIB
    placement = {d: -(-total // len(where)) for d in where}
    if one.demand.host_bytes:
        placement[HOST] = placement.get(HOST, 0) + one.demand.host_bytes // MIB
    if any(free[d] < size for d, size in placement.items()):
        return None
    for device, size in placement.items():
        free[device] -= size
    if state is State.STARTING:
        more = {"started_at_s": NOW_S - 1, "ready_at_s": None}
    if state is State.RECLAIMING:
        more |= {"gone_at_s": NOW_S - 0.05, "held_bytes": {d: s * MIB for d, s in placement.items()}}
    if state is State.DRAINING:
        more |= {"since_s": NOW_S - 1, "unload_wanted": draw(st.booleans())}
    if state is State.STOPPING:
        more |= {"since_s": NOW_S - 1}
    return instance(one.id, state, placement, **more)
