"""How long one turn's plan takes: 200 models on 16 GPUs, against planning the same world when idle."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median

from bench.report import milliseconds, ratio, show
from orchestrator.core.entities import MIB, Device, Entry, Model, Usage
from orchestrator.core.lifecycle import Instance, State
from orchestrator.core.planner import make_plan
from orchestrator.core.snapshot import Snapshot
from tests.core.worlds import NOW_S, entry, gpu, instance, model, ram, world

MODELS, GPUS, GPU_MIB = 200, 16, 24576
ARRIVAL_MIB = 8000
HOST_MIB = 300
BUSY_SHARE = 0.1
WORLDS = 25
REPEATS = 5


@dataclass(frozen=True)
class Case:
    """One snapshot to plan, and what the gates count."""

    snapshot: Snapshot
    usage: Mapping[str, Usage]


def devices() -> list[Device]:
    return [gpu(index, GPU_MIB) for index in range(GPUS)]


def models(dice: random.Random) -> list[Model]:
    """200 of them, 0.5 to 3.3 GiB, of three priorities."""
    return [
        model(f"m{i}", dice.randint(500, 3400), idle_after_s=None, priority=dice.choice((40, 50, 60)))
        for i in range(MODELS)
    ]


def packed(all_models: list[Model], dice: random.Random, gpus: int = GPUS) -> list[Instance]:
    """Ready instances, each on the roomiest GPU, for as long as there is room."""
    free = {f"GPU-{i}": GPU_MIB for i in range(gpus)}
    ready = []
    for one in all_models:
        size = one.demand.gpu_bytes // MIB
        device = max(free, key=lambda d: free[d])
        if free[device] >= size:
            free[device] -= size
            ready.append(ready_on(one, device, size, dice))
    return ready


def ready_on(one: Model, device: str, size_mib: int, dice: random.Random) -> Instance:
    return instance(one.id, State.READY, {device: size_mib}, load_time_s=dice.uniform(1, 60))


def used(ready: list[Instance], dice: random.Random) -> dict[str, Usage]:
    """One in ten is busy, the others have been used some times."""
    usage = {}
    for one in ready:
        in_flight = dice.randint(1, 3) if dice.random() < BUSY_SHARE else 0
        usage[one.attempt or ""] = Usage(in_flight, dice.randint(1, 500), NOW_S - dice.uniform(1, 400))
    return usage


def nearly_full(seed: int, arrivals: list[Model], extra: list[Entry] | None = None) -> Case:
    """All GPUs are taken, and `arrivals` wait; so do `extra` entries."""
    dice = random.Random(seed)
    known = models(dice)[: MODELS - len(arrivals)]
    ready = packed(known, dice)
    entries = [entry(one.id) for one in arrivals] + (extra or [])
    return Case(world(devices(), [*known, *arrivals], ready, entries), used(ready, dice))


def idle(seed: int) -> Case:
    return nearly_full(seed, [])


def one_arrival(seed: int) -> Case:
    return nearly_full(seed, [model("new", ARRIVAL_MIB)])


def one_that_splits(seed: int) -> Case:
    return nearly_full(seed, [model("new", 5 * ARRIVAL_MIB, gpu_counts=(1, 2, 4, 8))])


def twenty_queued(seed: int) -> Case:
    dice = random.Random(-seed)
    return nearly_full(seed, [model(f"new{i}", dice.randint(2000, ARRIVAL_MIB)) for i in range(20)])


def twenty_hopeless(seed: int) -> Case:
    """Everything is busy and has just become ready: only gaps can be had, and all must be asked."""
    case = twenty_queued(seed)
    usage = {attempt: Usage(1, 5, None) for attempt in case.usage}
    young = {m: replace(i, ready_at_s=NOW_S - 1) for m, i in case.snapshot.instances.items()}
    return Case(replace(case.snapshot, instances=young), usage)


def all_queued_on_empty(seed: int) -> Case:
    known = models(random.Random(seed))
    return Case(world(devices(), known, [], [entry(one.id) for one in known]), {})


def all_queued_with_ram(seed: int) -> Case:
    """Every model takes a part of the RAM as well: there each is everybody's neighbour."""
    known = [
        replace(one, demand=replace(one.demand, host_bytes=HOST_MIB * MIB))
        for one in models(random.Random(seed))
    ]
    all_devices = [*devices(), ram(HOST_MIB * MODELS)]
    return Case(world(all_devices, known, [], [entry(one.id) for one in known]), {})


CASES: dict[str, Callable[[int], Case]] = {
    "nothing to do, GPUs nearly full": idle,
    "one arrival of 8 GB, needs victims": one_arrival,
    "one arrival of 40 GB, split over up to 8": one_that_splits,
    "20 queued, need victims": twenty_queued,
    "20 queued, all others busy: most wait": twenty_hopeless,
    "200 queued, GPUs empty": all_queued_on_empty,
    "the same, each needs RAM too": all_queued_with_ram,
}


def times_s(case: Case) -> list[float]:
    make_plan(case.snapshot, case.usage)
    taken = []
    for _ in range(REPEATS):
        begun_s = time.perf_counter()
        make_plan(case.snapshot, case.usage)
        taken.append(time.perf_counter() - begun_s)
    return taken


def measured(name: str, make: Callable[[int], Case], bare_s: float | None) -> tuple[list[str], float]:
    """The row, and its median in seconds."""
    cases = [make(seed) for seed in range(WORLDS)]
    by_world = [times_s(case) for case in cases]
    middle_s = median(taken for times in by_world for taken in times)
    worst_s = max(min(times) for times in by_world)
    plans = [make_plan(case.snapshot, case.usage) for case in cases]
    loaded = median(len(case.snapshot.instances) for case in cases)
    row = [
        name,
        f"{loaded:.0f}",
        f"{median(len(plan.actions) for plan in plans):.0f}",
        milliseconds(middle_s),
        milliseconds(worst_s),
        milliseconds(max(taken for times in by_world for taken in times)),
        ratio(middle_s, bare_s if bare_s is not None else middle_s),
    ]
    return row, middle_s


def main() -> None:
    rows: list[list[str]] = []
    bare_s: float | None = None
    for name, make in CASES.items():
        row, middle_s = measured(name, make, bare_s)
        bare_s = bare_s if bare_s is not None else middle_s
        rows.append(row)
    show(
        f"Planner: one plan for {MODELS} models on {GPUS} GPUs (aim: under 5 ms)",
        ["world", "loaded", "actions", "median", "worst world", "max", "to idle"],
        rows,
        [
            f"{WORLDS} random worlds, each planned {REPEATS} times. `worst world`: the slowest world by its "
            "fastest plan, which is free of noise; `max`: the slowest plan of all, noise included.",
        ],
    )


if __name__ == "__main__":
    main()
