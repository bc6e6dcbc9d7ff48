"""The planner by example: one situation, one decision."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core.claims import SETTLES_S
from orchestrator.core.entities import (
    HOST,
    LOADING,
    MIB,
    Failure,
    ForeignProcess,
    Model,
    Progress,
    Reading,
    Sample,
    Start,
    Stop,
    Usage,
)
from orchestrator.core.events import (
    Adopted,
    BecameHealthy,
    CatalogueRead,
    LoadAsked,
    Progressed,
    Sampled,
    Started,
    UnloadAsked,
)
from orchestrator.core.fold import fold
from orchestrator.core.ledger import available_bytes, freed_bytes, held_bytes
from orchestrator.core.lifecycle import State
from orchestrator.core.planner import make_plan
from orchestrator.core.snapshot import FINISHED_OPERATIONS_KEPT, Measured, Plan, Snapshot, apply
from orchestrator.core.verdicts import Broken, Refused, Unmeasured, Unusable
from tests.core.worlds import NOW_S, busy, entry, gpu, instance, model, ram, world

GPU0, GPU1 = "GPU-0", "GPU-1"


def started(plan: Plan) -> dict[str, dict[str, int]]:
    return {
        a.model: {d: size // MIB for d, size in a.placement.items()}
        for a in plan.actions
        if isinstance(a, Start)
    }


def stopped(plan: Plan) -> set[str]:
    return {a.model for a in plan.actions if isinstance(a, Stop)}


def state_of(plan: Plan, name: str) -> State:
    return plan.instances[name].state


def later(snapshot: Snapshot, plan: Plan, seconds: float) -> Snapshot:
    """The snapshot after the plan, that much later, with a fresh sample of the same numbers."""
    after = apply(snapshot, plan)
    now_s = snapshot.now_s + seconds
    return replace(after, now_s=now_s, sample=replace(after.sample, taken_at_s=now_s), verdicts={}, notes=())


# --- room


def test_a_model_that_fits_starts_at_once() -> None:
    plan = make_plan(world([gpu(0, 24000)], [model("a", 6000)], entries=[entry("a")]), {})
    assert started(plan) == {"a": {GPU0: 6000}}
    assert state_of(plan, "a") is State.STARTING


def test_without_a_gpu_ram_carries_all_of_it() -> None:
    plan = make_plan(world([ram(100)], [model("a", 60, host_mib=8)], entries=[entry("a")]), {})
    assert started(plan) == {"a": {HOST: 68}}


def test_the_formula_of_the_handbook() -> None:
    """A reserved 6600 uses 6332, another holder reserved 12288 uses 4096, a desktop holds 900."""
    device = gpu(0, 24176, headroom_mib=512)
    a = instance("a", State.READY, {GPU0: 6600})
    lease = instance("lease", State.READY, {GPU0: 12288})
    models = [model("a", 6600), model("lease", 12288, pinned=True), model("b", 3500)]
    uses = {("a", GPU0): 6332, ("lease", GPU0): 4096}
    snapshot = world([device], models, [a, lease], [entry("b")], uses, {GPU0: 900})
    reading = snapshot.sample.readings[GPU0]
    assert reading.free_bytes == 12848 * MIB
    assert available_bytes(device, reading, [a, lease]) == 3876 * MIB
    plan = make_plan(snapshot, busy("a"))
    assert started(plan) == {"b": {GPU0: 3500}}
    b = plan.instances["b"]
    assert available_bytes(device, reading, [a, lease, b]) == 376 * MIB
    half = replace(
        reading, free_bytes=11148 * MIB, by_attempt={**reading.by_attempt, b.attempt or "": 1700 * MIB}
    )
    assert available_bytes(device, half, [a, lease, b]) == 376 * MIB


def test_what_a_starting_model_has_not_taken_yet_is_kept_back() -> None:
    starting = instance("a", State.STARTING, {GPU0: 8000}, started_at_s=NOW_S)
    models = [model("a", 8000), model("b", 3000)]
    snapshot = world([gpu(0, 10000)], models, [starting], [entry("b")], {("a", GPU0): 500})
    plan = make_plan(snapshot, {})
    assert started(plan) == {}
    assert "b" in plan.entries


def test_headroom_is_left_free() -> None:
    snapshot = world([gpu(0, 10000, headroom_mib=512)], [model("a", 9600)], entries=[entry("a")])
    verdict = make_plan(snapshot, {}).verdicts["r-a"]
    assert isinstance(verdict, Refused)
    assert verdict.forever
    assert verdict.capacity_bytes == 9488 * MIB


def test_foreign_use_counts() -> None:
    snapshot = world([gpu(0, 10000)], [model("a", 9000)], entries=[entry("a")], foreign_mib={GPU0: 2000})
    verdict = make_plan(snapshot, {}).verdicts["r-a"]
    assert isinstance(verdict, Refused)
    assert not verdict.forever
    assert verdict.available_bytes == 8000 * MIB
    assert [h.holder for h in verdict.holders] == ["game (PID 99)"]


# --- eviction


def test_an_idle_model_makes_room() -> None:
    a = instance("a", State.READY, {GPU0: 6000})
    snapshot = world([gpu(0, 10000)], [model("a", 6000), model("b", 6000)], [a], [entry("b")])
    plan = make_plan(snapshot, {})
    assert stopped(plan) == {"a"}
    assert state_of(plan, "b") is State.CLAIMED  # its bytes are not there before a has gone


def test_a_busy_one_is_spared_while_an_idle_one_goes() -> None:
    running = [instance("a", State.READY, {GPU0: 4000}), instance("b", State.READY, {GPU0: 4000})]
    models = [model("a", 4000), model("b", 4000), model("c", 4000)]
    plan = make_plan(world([gpu(0, 10000)], models, running, [entry("c")]), busy("a"))
    assert stopped(plan) == {"b"}


def test_only_what_is_needed_is_evicted() -> None:
    running = [instance(n, State.READY, {GPU0: size}) for n, size in (("a", 2000), ("b", 5000), ("c", 2000))]
    models = [model("a", 2000), model("b", 5000), model("c", 2000), model("d", 5500)]
    plan = make_plan(world([gpu(0, 10000)], models, running, [entry("d")]), {})
    assert stopped(plan) == {"b"}


def test_a_busy_one_is_drained_once_it_has_stayed() -> None:
    a = instance("a", State.READY, {GPU0: 6000}, ready_at_s=NOW_S - 3)
    models = [model("a", 6000), model("b", 6000)]
    snapshot = world([gpu(0, 10000)], models, [a], [entry("b")])
    plan = make_plan(snapshot, busy("a"))
    assert "b" in plan.entries
    assert not plan.actions
    assert plan.wake_at_s == pytest.approx(NOW_S + 7)  # ready for 3 s of the 10 s that it stays
    plan = make_plan(later(snapshot, plan, 7.5), busy("a"))
    assert state_of(plan, "a") is State.DRAINING
    assert state_of(plan, "b") is State.CLAIMED
    assert plan.closing == {"a-1"}


def test_a_busy_one_of_higher_priority_is_drained_only_after_waiting() -> None:
    a = instance("a", State.READY, {GPU0: 6000})
    models = [model("a", 6000, priority=53), model("b", 6000)]
    fresh = world([gpu(0, 10000)], models, [a], [entry("b", waited_s=5)])
    assert not make_plan(fresh, busy("a")).closing
    old = world([gpu(0, 10000)], models, [a], [entry("b", waited_s=31)])
    assert make_plan(old, busy("a")).closing == {"a-1"}


def test_a_conversation_is_not_cut_between_two_calls() -> None:
    a = instance("a", State.READY, {GPU0: 6000}, ready_at_s=NOW_S - 3)
    snapshot = world([gpu(0, 10000)], [model("a", 6000), model("b", 6000)], [a], [entry("b")])
    plan = make_plan(snapshot, {"a-1": Usage(0, 5, last_ended_s=NOW_S - 0.1)})
    assert not plan.actions
    assert plan.wake_at_s == pytest.approx(NOW_S + 0.15)


def test_short_requests_with_gaps_do_not_starve_a_waiter() -> None:
    """At each turn the last of them has just ended: it is never in flight, and never idle."""
    a = instance("a", State.READY, {GPU0: 6000}, ready_at_s=NOW_S - 3)
    models = [model("a", 6000, priority=53), model("b", 6000)]
    snapshot = world([gpu(0, 10000)], models, [a], [entry("b")])
    for turn in range(300):
        plan = make_plan(snapshot, {"a-1": Usage(0, turn, last_ended_s=snapshot.now_s - 0.1)})
        if plan.actions:
            break
        snapshot = later(snapshot, plan, 0.2)
    assert stopped(plan) == {"a"}
    assert snapshot.now_s - NOW_S == pytest.approx(30, abs=0.5)  # until b has risen to 53


def test_a_pinned_one_stays_and_the_refusal_names_it() -> None:
    a = instance("a", State.READY, {GPU0: 6000})
    snapshot = world([gpu(0, 10000)], [model("a", 6000, pinned=True), model("b", 6000)], [a], [entry("b")])
    plan = make_plan(snapshot, {})
    verdict = plan.verdicts["r-b"]
    assert isinstance(verdict, Refused)
    assert (verdict.needed_bytes, verdict.available_bytes) == (6000 * MIB, 4000 * MIB)
    assert [(h.holder, h.why_kept) for h in verdict.holders] == [("a", "pinned")]
    assert not plan.actions


def test_what_can_never_fit_evicts_nothing() -> None:
    a = instance("a", State.READY, {GPU0: 6000})
    snapshot = world([gpu(0, 10000)], [model("a", 6000), model("b", 10001)], [a], [entry("b")])
    plan = make_plan(snapshot, {})
    verdict = plan.verdicts["r-b"]
    assert isinstance(verdict, Refused)
    assert verdict.forever
    assert not plan.actions
    assert "b" not in plan.entries


def test_the_lower_priority_goes_first_then_the_cheaper_to_bring_back() -> None:
    running = [
        instance("a", State.READY, {GPU0: 4000}, load_time_s=60.0),
        instance("b", State.READY, {GPU0: 4000}, load_time_s=1.0),
    ]
    models = [model("a", 4000), model("b", 4000), model("c", 4000)]
    used = {"a-1": Usage(0, 10), "b-1": Usage(0, 10)}
    assert stopped(make_plan(world([gpu(0, 8000)], models, running, [entry("c")]), used)) == {"b"}
    models[0] = model("a", 4000, priority=40)
    assert stopped(make_plan(world([gpu(0, 8000)], models, running, [entry("c")]), used)) == {"a"}


# --- several devices


def test_two_gpus_load_at_the_same_time() -> None:
    models = [model("a", 8000), model("b", 8000)]
    plan = make_plan(world([gpu(0, 10000), gpu(1, 10000)], models, entries=[entry("a"), entry("b")]), {})
    assert {tuple(p) for p in started(plan).values()} == {(GPU0,), (GPU1,)}


def test_a_model_over_two_gpus_claims_both_or_neither() -> None:
    devices = [gpu(0, 10000), gpu(1, 10000)]
    big = model("big", 16000, gpu_counts=(2,))
    plan = make_plan(world(devices, [big], entries=[entry("big")]), {})
    assert started(plan) == {"big": {GPU0: 8000, GPU1: 8000}}
    a = instance("a", State.READY, {GPU1: 5000})
    plan = make_plan(world(devices, [big, model("a", 5000)], [a], [entry("big")]), {})
    assert stopped(plan) == {"a"}
    assert state_of(plan, "big") is State.CLAIMED


def test_one_gpu_is_preferred_where_it_is_enough() -> None:
    devices = [gpu(0, 10000), gpu(1, 10000)]
    either = model("m", 9000, gpu_counts=(1, 2))
    assert len(started(make_plan(world(devices, [either], entries=[entry("m")]), {}))["m"]) == 1
    foreign = {GPU0: 4000, GPU1: 4000}
    plan = make_plan(world(devices, [either], entries=[entry("m")], foreign_mib=foreign), {})
    assert started(plan)["m"] == {GPU0: 4500, GPU1: 4500}


def test_a_free_gpu_is_better_than_an_eviction() -> None:
    a = instance("a", State.READY, {GPU0: 8000})
    models = [model("a", 8000), model("b", 8000)]
    plan = make_plan(world([gpu(0, 10000), gpu(1, 10000)], models, [a], [entry("b")]), {})
    assert started(plan) == {"b": {GPU1: 8000}}
    assert not stopped(plan)


def test_ram_beside_the_gpu_counts_too() -> None:
    partial = model("p", 4000, host_mib=3000)
    plan = make_plan(world([gpu(0, 10000), ram(2000)], [partial], entries=[entry("p")]), {})
    verdict = plan.verdicts["r-p"]
    assert isinstance(verdict, Refused)
    assert verdict.device == HOST


def test_a_victim_that_spans_a_gpu_that_cannot_be_read_makes_room() -> None:
    both = instance("both", State.READY, {GPU0: 8000, GPU1: 8000})
    models = [model("both", 16000, gpu_counts=(2,)), model("b", 8000, devices=(GPU1,))]
    snapshot = world([gpu(0, 10000), gpu(1, 10000)], models, [both], [entry("b")])
    readable = {GPU1: snapshot.sample.readings[GPU1]}
    plan = make_plan(replace(snapshot, sample=Sample(NOW_S, readable, {GPU0: "the GPU is lost"})), {})
    assert stopped(plan) == {"both"}
    assert state_of(plan, "b") is State.CLAIMED


@pytest.mark.parametrize(
    "state", [State.STARTING, State.READY, State.DRAINING, State.STOPPING, State.STUCK, State.RECLAIMING]
)
def test_what_sits_on_a_device_that_is_gone_is_in_nobodys_way(state: State) -> None:
    held = {"GPU-gone": 6000 * MIB}
    lost = instance("lost", state, {"GPU-gone": 6000}, since_s=NOW_S - 1, gone_at_s=NOW_S, held_bytes=held)
    a = instance("a", State.READY, {GPU0: 6000})
    models = [model(name, 6000) for name in ("lost", "a", "b")]
    snapshot = world([gpu(0, 10000)], models, [lost, a], [entry("b"), entry("lost")])
    plan = make_plan(snapshot, busy("lost"))
    assert stopped(plan) == {"a"}
    assert state_of(plan, "b") is State.CLAIMED


# --- queue


def test_higher_priority_first_then_age() -> None:
    models = [model("a", 8000), model("b", 8000), model("c", 8000, priority=60)]
    entries = [entry("a", waited_s=2), entry("b", waited_s=3), entry("c", waited_s=1)]
    snapshot = world([gpu(0, 10000)], models, entries=entries)
    assert set(started(make_plan(snapshot, {}))) == {"c"}
    models[2] = model("c", 8000)
    assert set(started(make_plan(world([gpu(0, 10000)], models, entries=entries), {}))) == {"b"}


def test_nobody_passes_a_claim() -> None:
    """b was promised the room that a gives; c would fit into what is free now, and has to wait."""
    a = instance("a", State.STOPPING, {GPU0: 6000}, since_s=NOW_S)
    b = instance("b", State.CLAIMED, {GPU0: 8000}, claimed_at_s=NOW_S)
    models = [model("a", 6000), model("b", 8000), model("c", 3000)]
    plan = make_plan(world([gpu(0, 10000)], models, [a, b], [entry("b"), entry("c")]), {})
    assert started(plan) == {}
    assert "c" in plan.entries


def test_a_load_that_cannot_be_served_yet_lets_others_pass() -> None:
    a = instance("a", State.READY, {GPU0: 7000}, ready_at_s=NOW_S - 1)
    models = [model("a", 7000), model("big", 9000), model("small", 2000)]
    entries = [entry("big", waited_s=5), entry("small")]
    plan = make_plan(world([gpu(0, 10000)], models, [a], entries), busy("a"))
    assert started(plan) == {"small": {GPU0: 2000}}
    assert "big" in plan.entries


def test_a_start_waits_for_a_sample_newer_than_the_last_release() -> None:
    snapshot = world([gpu(0, 10000)], [model("a", 6000)], entries=[entry("a")])
    plan = make_plan(replace(snapshot, released_at_s={GPU0: NOW_S}), {})
    assert started(plan) == {}
    assert state_of(plan, "a") is State.CLAIMED


def test_a_claim_whose_room_was_taken_by_others_is_planned_again() -> None:
    claim = instance("a", State.CLAIMED, {GPU0: 6000}, claimed_at_s=NOW_S)
    snapshot = world([gpu(0, 10000)], [model("a", 6000)], [claim], [entry("a")], foreign_mib={GPU0: 5000})
    plan = make_plan(snapshot, {})
    assert isinstance(plan.verdicts["r-a"], Refused)
    assert state_of(plan, "a") is State.STOPPED


def test_a_claim_that_even_all_who_leave_cannot_make_room_for_is_planned_again() -> None:
    """Others took 6000 of what it was promised; 1000 are left, and one drains for as long as it likes."""
    claim = instance("a", State.CLAIMED, {GPU0: 6000}, claimed_at_s=NOW_S)
    drain = instance("d", State.DRAINING, {GPU0: 3000}, since_s=NOW_S, unload_wanted=True)
    models = [model("a", 6000), model("d", 3000)]
    snapshot = world([gpu(0, 10000), gpu(1, 10000)], models, [claim, drain], [entry("a")], {}, {GPU0: 6000})
    plan = make_plan(snapshot, busy("d"))
    assert started(plan) == {"a": {GPU1: 6000}}


def test_a_claim_that_those_who_leave_make_room_for_waits() -> None:
    claim = instance("a", State.CLAIMED, {GPU0: 6000}, claimed_at_s=NOW_S)
    drain = instance("d", State.DRAINING, {GPU0: 3000}, since_s=NOW_S, unload_wanted=True)
    models = [model("a", 6000), model("d", 3000)]
    snapshot = world([gpu(0, 10000), gpu(1, 10000)], models, [claim, drain], [entry("a")], {}, {GPU0: 3000})
    assert "a" not in make_plan(snapshot, busy("d")).instances


def test_a_failed_start_is_not_tried_again_before_its_time() -> None:
    failed = instance("a", State.FAILED, failure=Failure("boom"), retry_at_s=NOW_S + 4, failures=3)
    snapshot = world([gpu(0, 10000)], [model("a", 6000)], [failed], [entry("a")])
    plan = make_plan(snapshot, {})
    assert started(plan) == {}
    assert plan.wake_at_s == NOW_S + 4
    told = replace(snapshot, entries={"a": entry("a", tries_now=True)})
    assert set(started(make_plan(told, {}))) == {"a"}


# --- ends


def test_an_idle_model_expires_and_a_busy_or_pinned_one_does_not() -> None:
    running = [instance(n, State.READY, {GPU0: 1000}) for n in ("idle", "busy", "pinned")]
    models = [model(n, 1000, idle_after_s=100.0, pinned=n == "pinned") for n in ("idle", "busy", "pinned")]
    assert stopped(make_plan(world([gpu(0, 10000)], models, running), busy("busy"))) == {"idle"}


def test_the_idle_clock_starts_when_the_last_request_ends() -> None:
    a = instance("a", State.READY, {GPU0: 1000})
    snapshot = world([gpu(0, 10000)], [model("a", 1000, idle_after_s=100.0)], [a])
    plan = make_plan(snapshot, {"a-1": Usage(0, 9, last_ended_s=NOW_S - 40)})
    assert not plan.actions
    assert plan.wake_at_s == pytest.approx(NOW_S + 60)


def test_a_start_that_takes_too_long_is_stopped_and_its_waiters_learn_why() -> None:
    a = instance("a", State.STARTING, {GPU0: 1000}, since_s=NOW_S - 601)
    plan = make_plan(world([gpu(0, 10000)], [model("a", 1000)], [a], [entry("a")]), {})
    assert stopped(plan) == {"a"}
    verdict = plan.verdicts["r-a"]
    assert isinstance(verdict, Broken)
    assert verdict.failure.code == "start_timeout"
    told = "(/health on port 1 never answered 2xx; at last: nobody listens there)"
    assert verdict.failure.message.endswith(told)
    assert plan.instances["a"].is_failing


def test_a_start_that_takes_too_long_says_what_its_health_path_said_last() -> None:
    a = instance("a", State.STARTING, {GPU0: 1000}, since_s=NOW_S - 100, port=41234)
    snapshot = world([gpu(0, 10000)], [model("a", 1000, start_timeout_s=60.0)], [a], [entry("a")])
    said = [Progressed("a", "a-1", Progress(LOADING, detail=text)) for text in ("HTTP 404", "HTTP 503")]
    verdict = make_plan(fold(snapshot, said, now_s=NOW_S, wall_s=snapshot.wall_s), {}).verdicts["r-a"]
    assert isinstance(verdict, Broken)
    assert verdict.failure.message == (
        "it did not become healthy within 60 s (/health on port 41234 never answered 2xx; at last: HTTP 503)"
    )


def test_a_start_has_its_time_from_when_the_engine_has_started_it() -> None:
    """Before that it may pull an image for an hour."""
    a = instance("a", State.STARTING, {GPU0: 1000}, since_s=NOW_S - 3600, host=None, port=None)
    snapshot = world([gpu(0, 10000)], [model("a", 1000, start_timeout_s=60.0)], [a], [entry("a")])
    plan = make_plan(snapshot, {})
    assert not plan.actions
    begun = fold(snapshot, [Started("a", "a-1", "127.0.0.1", 1)], now_s=NOW_S, wall_s=snapshot.wall_s)
    plan = make_plan(begun, {})
    assert not plan.actions
    assert plan.wake_at_s == NOW_S + 60
    assert stopped(make_plan(later(begun, plan, 59.0), {})) == set()
    assert stopped(make_plan(later(begun, plan, 60.5), {})) == {"a"}


def test_a_model_that_left_the_catalogue_finishes_its_requests() -> None:
    snapshot = world([gpu(0, 10000)], [], [instance("a", State.READY, {GPU0: 6000})])
    for seconds in (0.01, 599.0):
        plan = make_plan(snapshot, busy("a"))
        assert not plan.actions
        snapshot = later(snapshot, plan, seconds)
        assert snapshot.instances["a"].state is State.DRAINING
    assert stopped(make_plan(snapshot, {})) == {"a"}
    assert stopped(make_plan(later(snapshot, make_plan(snapshot, busy("a")), 2.0), busy("a"))) == {"a"}


def test_a_drain_for_a_claim_that_is_gone_relents() -> None:
    a = instance("a", State.DRAINING, {GPU0: 6000}, drained_for="b-1", since_s=NOW_S - 1)
    plan = make_plan(world([gpu(0, 10000)], [model("a", 6000)], [a]), busy("a"))
    assert state_of(plan, "a") is State.READY


def test_a_drain_ends_when_it_is_quiet_forced_or_too_long() -> None:
    def drained(usage: dict[str, Usage], **more: object) -> set[str]:
        a = instance("a", State.DRAINING, {GPU0: 6000}, unload_wanted=True, **more)
        return stopped(make_plan(world([gpu(0, 10000)], [model("a", 6000)], [a]), usage))

    assert drained(busy("a"), since_s=NOW_S - 1) == set()
    assert drained({}, since_s=NOW_S - 1) == {"a"}
    assert drained(busy("a"), since_s=NOW_S - 1, force=True) == {"a"}
    assert drained(busy("a"), since_s=NOW_S - 601) == {"a"}


def test_a_stop_that_is_overdue_is_stuck_and_keeps_its_memory() -> None:
    a = instance("a", State.STOPPING, {GPU0: 6000}, since_s=NOW_S - 21)
    snapshot = world([gpu(0, 10000)], [model("a", 6000), model("b", 6000)], [a], [entry("b")])
    plan = make_plan(snapshot, {})
    assert state_of(plan, "a") is State.STUCK
    verdict = plan.verdicts["r-b"]
    assert isinstance(verdict, Refused)
    assert [(h.holder, h.why_kept) for h in verdict.holders] == [("a", "stuck")]


# --- unknown is not zero


def test_a_device_that_cannot_be_measured_stops_admission() -> None:
    snapshot = world([gpu(0, 10000)], [model("a", 1000)], entries=[entry("a")])
    lost = replace(snapshot, sample=Sample(NOW_S, {}, {GPU0: "the GPU is lost"}))
    verdict = make_plan(lost, {}).verdicts["r-a"]
    assert isinstance(verdict, Unmeasured)
    assert verdict.errors == {GPU0: "the GPU is lost"}
    stale = replace(snapshot, now_s=NOW_S + 3.5)
    assert isinstance(make_plan(stale, {}).verdicts["r-a"], Unmeasured)


def test_the_other_gpu_still_serves() -> None:
    snapshot = world([gpu(0, 10000), gpu(1, 10000)], [model("a", 1000)], entries=[entry("a")])
    one = {GPU1: snapshot.sample.readings[GPU1]}
    half = replace(snapshot, sample=Sample(NOW_S, one, {GPU0: "the GPU is lost"}))
    assert started(make_plan(half, {})) == {"a": {GPU1: 1000}}


def test_nobody_leaves_for_a_budget_that_has_just_become_larger() -> None:
    """A reload gives RAM more room: the last sample is of the smaller one."""
    idle = instance("idle", State.READY, {HOST: 90})
    models = [model("idle", 0, 90), model("new", 0, 40)]
    small = world([ram(100)], models, [idle], [entry("new")])
    assert make_plan(small, {}).instances["idle"].state is State.STOPPING
    state = fold(small, [CatalogueRead(small.models, {HOST: ram(5000)})], now_s=NOW_S + 0.1, wall_s=0.0)
    plan = make_plan(state, {})
    assert (plan.verdicts, plan.actions, state_of(plan, "new")) == ({}, (), State.QUEUED)
    reading = Reading(4910 * MIB, 90 * MIB, {"idle-1": 90 * MIB})
    state = apply(state, plan)
    state = fold(state, [Sampled(Sample(NOW_S + 0.2, {HOST: reading}))], now_s=NOW_S + 0.2, wall_s=0.0)
    plan = make_plan(state, {})
    assert started(plan) == {"new": {HOST: 40}}
    assert "idle" not in plan.instances


def test_a_device_that_is_only_not_measured_yet_is_waited_for_whatever_another_says() -> None:
    snapshot = world(
        [gpu(0, 10000), gpu(1, 10000)], [model("a", 1000, devices=(GPU0,))], entries=[entry("a")]
    )
    lost = replace(snapshot, sample=Sample(NOW_S, {}, {GPU1: "the GPU is lost"}))
    assert make_plan(lost, {}).verdicts == {}
    late = replace(lost, now_s=NOW_S + 3.5)
    assert isinstance(make_plan(late, {}).verdicts["r-a"], Unmeasured)


def test_where_processes_cannot_be_told_apart_starts_go_one_at_a_time() -> None:
    starting = instance("a", State.STARTING, {GPU0: 2000}, started_at_s=NOW_S)
    snapshot = world([gpu(0, 10000)], [model("a", 2000), model("b", 2000)], [starting], [entry("b")])
    dark = Reading(9000 * MIB, 1000 * MIB, unexplained_bytes=1000 * MIB, attributed=False)
    plan = make_plan(replace(snapshot, sample=Sample(NOW_S, {GPU0: dark})), {})
    assert started(plan) == {}
    assert state_of(plan, "b") is State.CLAIMED


def test_growth_in_the_dark_counts_once_where_somebody_elses_is_taken_over_meanwhile() -> None:
    def dark(at_s: float, used: int) -> Sampled:
        size = used * MIB
        reading = Reading(10000 * MIB - size, size, unexplained_bytes=size, attributed=False)
        return Sampled(Sample(at_s, {GPU0: reading}))

    own = instance("own", State.STARTING, {GPU0: 3000}, claimed_at_s=NOW_S - 2)
    snapshot = world([gpu(0, 10000)], [model("lent", 6000), model("own", 3000)], [own])
    state = replace(snapshot, sample=dark(NOW_S - 0.1, 500).sample)
    taken = [Adopted("lent", "lent-9"), dark(NOW_S + 0.5, 3000)]
    state = fold(state, taken, now_s=NOW_S + 0.5, wall_s=0.0)
    assert uses(state) == {"own": 2500, "lent": 0}
    state = fold(state, [BecameHealthy("own", "own-1")], now_s=NOW_S + 0.9, wall_s=0.0)
    state = fold(state, [dark(NOW_S + 1.0, 3100)], now_s=NOW_S + 1.0, wall_s=0.0)
    assert uses(state) == {"own": 2600, "lent": 0}, "the first sample after it was ready still counts to it"
    state = fold(state, [dark(NOW_S + 1.5, 4000)], now_s=NOW_S + 1.5, wall_s=0.0)
    assert uses(state) == {"own": 2600, "lent": 900}


def uses(state: Snapshot) -> dict[str, int]:
    """What is assumed to be in use on the first GPU, in MiB."""
    return {name: one.assumed_bytes.get(GPU0, 0) // MIB for name, one in state.instances.items()}


def test_what_was_assumed_in_the_dark_is_nothing_once_processes_can_be_told_apart() -> None:
    """It has given its memory back, and keeps what it was promised."""
    slept = instance("slept", State.READY, {GPU0: 6000}, assumed_bytes={GPU0: 5000 * MIB})
    holders = [slept]
    dark = Reading(5000 * MIB, 5000 * MIB, unexplained_bytes=5000 * MIB, attributed=False)
    assert available_bytes(gpu(0, 10000), dark, holders) == 4000 * MIB
    assert available_bytes(gpu(0, 10000), Reading(10000 * MIB, 0), holders) == 4000 * MIB


def test_where_processes_cannot_be_told_apart_nobody_starts_before_the_last_growth_was_measured() -> None:
    """It is ready, and the next sample still counts to it: another one's first bytes would be in it."""
    ready = instance("lazy", State.READY, {GPU0: 6000}, ready_at_s=NOW_S, assumed_bytes={GPU0: 500 * MIB})
    claim = instance("b", State.CLAIMED, {GPU0: 3000}, claimed_at_s=NOW_S - 1)
    models = [model("lazy", 6000), model("b", 3000)]
    snapshot = world([gpu(0, 10000)], models, [ready, claim], [entry("b")])

    def seen(at_s: float, used: int) -> Sample:
        size = used * MIB
        reading = Reading(10000 * MIB - size, size, unexplained_bytes=size, attributed=False)
        return Sample(at_s, {GPU0: reading})

    before = replace(
        snapshot,
        sample=seen(NOW_S - 0.3, 500),
        measured={"lazy-1": {GPU0: Measured(used_bytes=500 * MIB)}},
    )
    assert started(make_plan(before, {})) == {}
    measured = fold(before, [Sampled(seen(NOW_S + 0.2, 500))], now_s=NOW_S + 0.2, wall_s=0.0)
    plan = make_plan(measured, {})
    assert started(plan) == {"b": {GPU0: 3000}}
    half = fold(apply(measured, plan), [Sampled(seen(NOW_S + 0.7, 3000))], now_s=NOW_S + 0.7, wall_s=0.0)
    uses = {name: one.assumed_bytes[GPU0] // MIB for name, one in half.instances.items()}
    assert uses == {"lazy": 500, "b": 2500}
    holders = half.instances.values()
    left = available_bytes(half.devices[GPU0], half.sample.readings[GPU0], holders)
    assert left == 1000 * MIB, "what each was promised is kept back"


def test_nobody_is_refused_for_memory_that_a_start_has_just_taken() -> None:
    """It took 6000 between the list of processes and the memory beside it: they count twice for a moment."""
    starting = instance("big", State.STARTING, {GPU0: 7000}, started_at_s=NOW_S, port=1)
    snapshot = world([gpu(0, 10000)], [model("big", 7000), model("b", 5000)], [starting], [entry("b")])

    def seen(unexplained: int) -> Snapshot:
        reading = Reading(4000 * MIB, 6000 * MIB, {}, unexplained_bytes=unexplained * MIB)
        measured = {"big-1": {GPU0: Measured(overhead_bytes=unexplained * MIB)}}
        return replace(snapshot, sample=Sample(NOW_S, {GPU0: reading}), measured=measured)

    plan = make_plan(seen(6000), {})
    assert (plan.verdicts, state_of(plan, "b")) == ({}, State.QUEUED)
    assert isinstance(make_plan(seen(9), {}).verdicts["r-b"], Refused)


def measured_as_a_strangers(state: State, port: int | None, since_s: float) -> Snapshot:
    """`new` has taken its 4000 of 10000 MiB, and the newest sample takes its process for a stranger's."""
    times = {"started_at_s": NOW_S - 1, "since_s": since_s, "ready_at_s": since_s}
    starting = instance("new", state, {GPU0: 4000}, port=port, **times)
    idle = instance("idle", State.READY, {GPU0: 3000})
    models = [model("new", 4000), model("idle", 3000), model("b", 2000)]
    snapshot = world([gpu(0, 10000)], models, [starting, idle], [entry("b")])
    others = (ForeignProcess(7, "python3", 4000 * MIB),)
    mistaken = Reading(3000 * MIB, 7000 * MIB, {"idle-1": 3000 * MIB}, others)
    return replace(snapshot, sample=Sample(NOW_S - 0.2, {GPU0: mistaken}))


@pytest.mark.parametrize(
    ("state", "port", "since_s", "settled_s"),
    [
        (State.STARTING, 1, NOW_S - 0.1, 0.0),
        (State.READY, 1, NOW_S - 0.1, 0.0),
        (State.STARTING, None, NOW_S - 0.3, SETTLES_S),
    ],
)
def test_nobody_leaves_for_a_start_that_was_measured_as_a_strangers(
    state: State, port: int | None, since_s: float, settled_s: float
) -> None:
    """With its bytes counted twice, the idle one would have to go."""
    snapshot = measured_as_a_strangers(state, port, since_s)
    mistaken = snapshot.sample.readings[GPU0]
    plan = make_plan(snapshot, {})
    assert (state_of(plan, "b"), plan.actions, plan.closing) == (State.QUEUED, (), frozenset())
    now_s = NOW_S + settled_s
    plan = make_plan(replace(snapshot, now_s=now_s, sample=Sample(now_s, {GPU0: mistaken})), {})
    assert plan.instances["idle"].state is State.STOPPING, "it is a stranger's after all"
    known = Reading(3000 * MIB, 7000 * MIB, {"idle-1": 3000 * MIB, "new-1": 4000 * MIB})
    assert started(make_plan(replace(snapshot, sample=Sample(NOW_S, {GPU0: known})), {})) == {
        "b": {GPU0: 2000}
    }


def test_without_a_stranger_there_is_nothing_to_measure_first() -> None:
    """A start of which nothing is to be seen yet holds up no eviction that it makes necessary."""
    snapshot = measured_as_a_strangers(State.STARTING, None, NOW_S - 0.3)
    models = {**snapshot.models, "b": model("b", 3500)}
    reading = Reading(7000 * MIB, 3000 * MIB, {"idle-1": 3000 * MIB})
    plan = make_plan(replace(snapshot, models=models, sample=Sample(NOW_S - 0.2, {GPU0: reading})), {})
    assert plan.instances["idle"].state is State.STOPPING


def test_nobody_takes_the_room_of_one_who_waits_for_a_measurement() -> None:
    """The next sample has room for the first, unless the second has taken it: then the idle one would go."""
    snapshot = measured_as_a_strangers(State.STARTING, 1, NOW_S - 0.1)
    models = {**snapshot.models, "a": model("a", 5000, priority=90)}
    reading = replace(snapshot.sample.readings[GPU0], free_bytes=6000 * MIB)
    house = replace(
        snapshot,
        devices={GPU0: gpu(0, 13000)},
        models=models,
        entries={"a": entry("a"), "b": entry("b")},
        sample=Sample(NOW_S - 0.2, {GPU0: reading}),
    )
    plan = make_plan(house, {})
    assert (state_of(plan, "a"), state_of(plan, "b")) == (State.QUEUED, State.QUEUED)
    known = replace(reading, by_attempt={"idle-1": 3000 * MIB, "new-1": 4000 * MIB}, foreign=())
    after = make_plan(replace(apply(house, plan), sample=Sample(NOW_S, {GPU0: known})), {})
    assert started(after) == {"a": {GPU0: 5000}}


@pytest.mark.parametrize("state", [State.STARTING, State.READY])
def test_nobody_is_refused_for_a_start_that_was_measured_as_a_strangers(state: State) -> None:
    """The sample is older than the engine's word which process it is."""
    others = (ForeignProcess(7, "python3", 6000 * MIB),)
    times = {"started_at_s": NOW_S - 1, "ready_at_s": NOW_S - 1, "since_s": NOW_S - 1}
    started_late = instance("big", state, {GPU0: 6000}, port=1, **times)
    models = [model("big", 6000, pinned=True), model("b", 5000)]
    snapshot = world([gpu(0, 10000)], models, [started_late], [entry("b")])
    reading = Reading(4000 * MIB, 6000 * MIB, {}, others)

    def measured(at_s: float) -> Snapshot:
        return replace(snapshot, sample=Sample(at_s, {GPU0: reading}))

    assert make_plan(measured(started_late.since_s - 0.1), {}).verdicts == {}
    assert isinstance(make_plan(measured(started_late.since_s), {}).verdicts["r-b"], Refused)


def test_what_a_later_claim_has_taken_already_is_no_room_for_an_earlier_one() -> None:
    """An engine can complete the start of a claim late that an earlier server had ordered."""
    first = instance("first", State.CLAIMED, {GPU0: 3000}, claimed_at_s=NOW_S - 2)
    late = instance("late", State.CLAIMED, {GPU0: 6000}, claimed_at_s=NOW_S - 1, started_at_s=NOW_S - 9)
    models = [model("first", 3000), model("late", 6000)]
    snapshot = world([gpu(0, 10000)], models, [first, late], [entry("first"), entry("late")])

    def with_foreign(mib: int) -> Snapshot:
        others = (ForeignProcess(7, "game", mib * MIB),)
        free = 6000 - mib
        reading = Reading(free * MIB, (4000 + mib) * MIB, {"late-1": 4000 * MIB}, others)
        return replace(snapshot, sample=Sample(NOW_S, {GPU0: reading}))

    assert "first" in started(make_plan(with_foreign(1000), {}))
    assert "first" not in started(make_plan(with_foreign(4000), {})), "2000 are free, and it takes 3000"


# --- what is kept of the past


def test_finished_operations_stay_bounded_and_those_under_way_are_kept() -> None:
    snapshot = world([gpu(0, 10000)], [model("a", 1000), model("b", 1000)])
    snapshot = fold(snapshot, [LoadAsked("b", "under-way")], now_s=NOW_S, wall_s=1.0)
    for number in range(FINISHED_OPERATIONS_KEPT + 50):
        asked = [UnloadAsked("a", f"op-{number}")]
        snapshot = fold(snapshot, asked, now_s=NOW_S, wall_s=2.0 + number)
        snapshot = apply(snapshot, make_plan(snapshot, {}))
    kept = snapshot.operations
    assert len(kept) == FINISHED_OPERATIONS_KEPT + 1
    assert {"under-way", f"op-{number}"} <= kept.keys()
    assert "op-0" not in kept


# --- devices that cannot be measured


def claim_on_a_lost_device(blind_s: float) -> Snapshot:
    """`split` has a claim on two GPUs, one of which is lost; `other` wants the healthy one."""
    split = instance("split", State.CLAIMED, {GPU0: 900, GPU1: 900}, attempt="split-1")
    models = [model("split", 1800, gpu_counts=(2,)), model("other", 500)]
    snapshot = world([gpu(0, 1000), gpu(1, 1000)], models, [split], [entry("split"), entry("other")])
    readings = {GPU0: snapshot.sample.readings[GPU0]}
    lost = replace(snapshot.sample, readings=readings, errors={GPU1: "lost"})
    return replace(snapshot, sample=lost, blind_since_s={GPU1: NOW_S - blind_s})


def test_a_claim_waits_for_a_device_that_is_blind_for_a_moment() -> None:
    plan = make_plan(claim_on_a_lost_device(2.0), {})
    assert started(plan) == {}
    assert "split" not in plan.instances


def test_a_claim_on_a_lost_device_does_not_keep_the_others() -> None:
    plan = make_plan(claim_on_a_lost_device(4.0), {})
    assert started(plan) == {"other": {GPU0: 500}}
    assert isinstance(plan.verdicts["r-split"], Unmeasured)


# --- memory that comes back


def test_bytes_that_two_give_back_are_not_counted_twice() -> None:
    """Two left at once; 500 MiB that nobody explains may be either's, but not both's."""
    leaving = [
        instance(name, State.RECLAIMING, {GPU0: 500}, gone_at_s=NOW_S - 1, held_bytes={GPU0: 500 * MIB})
        for name in ("a", "b")
    ]
    reading = Reading(500 * MIB, 500 * MIB, unexplained_bytes=500 * MIB)
    assert [held_bytes(one, GPU0, reading) for one in leaving] == [500 * MIB, 500 * MIB]
    assert freed_bytes(leaving, GPU0, reading) == 500 * MIB


def while_one_stops(state: State, need_mib: int = 900) -> Snapshot:
    """`a` stops; for a moment the device shows its bytes as somebody else's, so they count twice."""
    models = [model("a", 800), model("b", need_mib)]
    snapshot = world(
        [gpu(0, 1000)],
        models,
        [instance("a", state, {GPU0: 800}, since_s=NOW_S - 1)],
        [entry("b")],
        used_mib={("a", GPU0): 0},
        foreign_mib={GPU0: 800},
    )
    return replace(snapshot, released_at_s={})


@pytest.mark.parametrize("state", [State.STOPPING, State.RECLAIMING])
def test_nobody_is_refused_while_memory_is_on_the_move(state: State) -> None:
    snapshot = while_one_stops(state)
    plan = make_plan(snapshot, {})
    assert not plan.verdicts
    assert "measured first" in plan.entries["b"].reason


@pytest.mark.parametrize("state", [State.READY, State.STUCK])
def test_a_refusal_is_told_at_once_where_nothing_moves(state: State) -> None:
    assert isinstance(make_plan(while_one_stops(state), {}).verdicts["r-b"], Refused)


def test_what_can_never_fit_is_refused_at_once_even_then() -> None:
    refused = make_plan(while_one_stops(State.STOPPING, need_mib=1100), {}).verdicts["r-b"]
    assert isinstance(refused, Refused)
    assert refused.forever


def test_a_claim_is_not_given_up_while_memory_is_on_the_move() -> None:
    snapshot = while_one_stops(State.STOPPING)
    claim = instance("b", State.CLAIMED, {GPU0: 900}, attempt="b-1")
    waiting = replace(snapshot, instances={**snapshot.instances, "b": claim})
    assert "b" not in make_plan(waiting, {}).instances
    gone = replace(waiting, instances={"b": claim})
    assert isinstance(make_plan(gone, {}).verdicts["r-b"], Refused), "somebody else has it"


# --- a catalogue that is read again


@pytest.mark.parametrize(
    "changed",
    [
        model("b", 950),
        model("b", 900, devices=(GPU1,)),
        model("b", 900, gpu_counts=(2,)),
        model("b", 900, problem="the file is gone"),
    ],
)
def test_a_claim_is_planned_again_if_its_model_has_changed(changed: Model) -> None:
    claim = instance("b", State.CLAIMED, {GPU0: 900}, attempt="b-1")
    snapshot = world([gpu(0, 1000), gpu(1, 1000)], [changed], [claim], [entry("b")])
    plan = make_plan(snapshot, {})
    assert plan.instances["b"].attempt != "b-1"
    if changed.problem:
        assert isinstance(plan.verdicts["r-b"], Unusable)
    else:
        assert started(plan)["b"] != {GPU0: 900}
