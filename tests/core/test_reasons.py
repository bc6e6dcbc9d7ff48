"""What somebody who waits is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core.entities import HOST, Usage
from orchestrator.core.lifecycle import Instance, State
from orchestrator.core.planner import make_plan
from orchestrator.core.snapshot import Snapshot
from tests.core.worlds import NOW_S, busy, entry, gpu, instance, model, ram, world

GPU0 = "GPU-0"


def reason(snapshot: Snapshot, usage: dict[str, Usage] | None = None, name: str = "d") -> str:
    return make_plan(snapshot, usage or {}).entries[name].reason


def ready(name: str, mib: int, ago_s: float = 500.0, **more: object) -> Instance:
    return instance(name, State.READY, {GPU0: mib}, ready_at_s=NOW_S - ago_s, **more)


def test_each_who_holds_the_room_is_told_with_what_keeps_it_there() -> None:
    here = [
        ready("b", 4000, ago_s=4.0),
        ready("p1", 1000),
        instance("slow", State.STARTING, {GPU0: 2000}),
        ready("dear", 3000),
        instance("elsewhere", State.READY, {HOST: 9000}),
    ]
    models = [
        model(i.model, 0, pinned=i.model == "p1", priority=60 if i.model == "dear" else 50) for i in here
    ]
    snapshot = world([gpu(0, 10000), ram(20000)], [*models, model("d", 9000)], here, [entry("d")])
    assert reason(snapshot, busy("b", "dear", in_flight=2)) == (
        "it needs 9000 MiB, and the room is held by "
        "b (busy with 2 requests, may be asked in 6 s), "
        "dear (busy with 2 requests, and its priority 60 is above 50), "
        "slow (starting), p1 (pinned)"
    )


def test_who_may_be_asked_and_is_not_enough_is_told_too() -> None:
    here = [ready("idle", 3000), ready("b", 2000), instance("slow", State.STARTING, {GPU0: 4000})]
    models = [model("idle", 3000), model("b", 2000), model("slow", 4000), model("d", 9500)]
    assert reason(world([gpu(0, 10000)], models, here, [entry("d")]), busy("b")) == (
        "it needs 9500 MiB, and the room is held by "
        "slow (starting), idle (idle, may be asked), b (busy with 1 request, may be asked)"
    )


def test_one_used_a_moment_ago_and_many_more() -> None:
    used = {f"m{n}-1": Usage(0, 5, NOW_S - 0.1) for n in range(8)}
    here = [ready(f"m{n}", 1000, ago_s=2.0) for n in range(8)]
    snapshot = world(
        [gpu(0, 8000)], [*(model(i.model, 1000) for i in here), model("d", 8000)], here, [entry("d")]
    )
    told = reason(snapshot, used)
    assert "m0 (in use a moment ago, may be asked in 1 s), m1 (" in told
    assert told.endswith(", 2 more")


def test_of_many_who_leave_the_smallest_are_a_number() -> None:
    here = [ready(f"m{n}", 1000 + n) for n in range(8)]
    models = [*(model(i.model, 1000) for i in here), model("d", 9900)]
    told = reason(world([gpu(0, 10000)], models, here, [entry("d")]))
    assert told.startswith("it waits for m7 to stop and m6 to stop and ")
    assert told.endswith("m2 to stop and 2 more")


@pytest.mark.parametrize(
    ("state", "usage", "expected"),
    [
        (State.READY, busy("c"), "it waits for c to finish 1 request"),
        (State.READY, {}, "it waits for c to stop"),
        (State.RECLAIMING, {}, "it waits for c to give its memory back"),
    ],
)
def test_who_has_a_claim_is_told_for_whom_it_waits(
    state: State, usage: dict[str, Usage], expected: str
) -> None:
    held = {"held_bytes": {GPU0: 8000 << 20}, "gone_at_s": NOW_S} if state is State.RECLAIMING else {}
    c = instance("c", state, {GPU0: 8000}, **held)
    devices, models = [gpu(0, 10000)], [model("c", 8000), model("d", 8000)]
    snapshot = world(devices, models, [c], [entry("d")], used_mib={("c", GPU0): 8000})
    plan = make_plan(snapshot, usage)
    if state is State.READY:
        assert plan.instances["d"].state is State.CLAIMED
    else:
        d = instance("d", State.CLAIMED, {GPU0: 8000})
        left = {"c-1": 8000 << 20}
        reading = replace(snapshot.sample.readings[GPU0], by_attempt=left)
        sample = replace(snapshot.sample, readings={GPU0: reading})
        snapshot = replace(snapshot, instances={"c": c, "d": d}, sample=sample)
        plan = make_plan(snapshot, usage)
    assert plan.entries["d"].reason == expected
