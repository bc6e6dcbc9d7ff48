"""GPUs that report errors or break: what is noted, whom it is put down to, and what ends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core import events as ev
from orchestrator.core.entities import MIB, ForeignProcess, Reading, Sample, Start, Stop, Usage
from orchestrator.core.fold import fold
from orchestrator.core.health import Blame, Incident
from orchestrator.core.incidents import BLIND_TOLD_S, JUST_LEFT_S, KEPT, NOTED_ONCE_S
from orchestrator.core.lifecycle import State
from orchestrator.core.losses import BROKEN_S, FAULT_S
from orchestrator.core.planner import make_plan
from orchestrator.core.snapshot import Plan, Snapshot, apply
from tests.core.worlds import NOW_S, gpu, instance, model, world

GPU0, GPU1 = "GPU-0", "GPU-1"
PAGE_FAULT = Incident(GPU0, 31, Blame.PROGRAM, "XID 31: a page fault")
HALT = Incident(GPU0, 62, Blame.GPU, "XID 62: halted")
ALIVE = [State.STARTING, State.READY, State.DRAINING]


def running(state: State = State.READY, *others: str) -> Snapshot:
    """Models on the first GPU, each with 1000 MiB; the first one in this state."""
    names = ["a", *others]
    instances = [instance(name, State.READY, {GPU0: 1000}) for name in names]
    instances[0] = instance("a", state, {GPU0: 1000})
    return world([gpu(0, 10_000), gpu(1, 10_000)], [model(name, 1000) for name in names], instances)


def sample(
    at_s: float,
    foreign: int = 0,
    unexplained: int = 0,
    *,
    broken: bool = False,
    attributed: bool = True,
) -> ev.Sampled:
    strangers = (ForeignProcess(7, "game", foreign * MIB),) if foreign else ()
    free = (9000 - foreign) * MIB
    own = {"a-1": 1000 * MIB}
    first = Reading(free, 1000 * MIB, own, strangers, unexplained * MIB, attributed=attributed)
    second = Reading(10_000 * MIB, 0)
    if broken:
        return ev.Sampled(Sample(at_s, {GPU1: second}, {GPU0: "it must be reset"}, frozenset({GPU0})))
    return ev.Sampled(Sample(at_s, {GPU0: first, GPU1: second}))


def turn(state: Snapshot, at_s: float, *news: ev.Event, in_flight: int = 0) -> tuple[Snapshot, Plan]:
    folded = fold(state, news, now_s=at_s, wall_s=at_s)
    plan = make_plan(folded, {"a-1": Usage(in_flight, in_flight, None)})
    return apply(folded, plan), plan


def stops(plan: Plan) -> list[str]:
    return [action.model for action in plan.actions if isinstance(action, Stop)]


# ---- what is noted


def test_that_a_gpu_cannot_be_measured_is_noted_once_and_its_return_too() -> None:
    told: list[tuple[float, str]] = []
    state = running()
    for step in range(40):
        at_s = NOW_S + step / 2
        state, _ = turn(state, at_s, sample(at_s, broken=2 <= step < 30))
        told += [(step / 2, note.text) for note in state.notes if note.kind in ("unmeasured", "measured")]
    why = "GPU 0 (GPU 0) has not been measurable for 5 s, and gets nothing meanwhile: it must be reset"
    assert told == [(1 + BLIND_TOLD_S, why), (15.0, "GPU 0 (GPU 0) can be measured again, after 14 s")]


def test_a_hiccup_is_not_noted() -> None:
    state = running()
    for step in range(12):
        at_s = NOW_S + step / 2
        state, _ = turn(state, at_s, sample(at_s, broken=2 <= step < 11))
        assert not [note for note in state.notes if note.kind in ("unmeasured", "measured")]


def test_an_incident_is_noted_with_the_card_and_its_number() -> None:
    state, _ = turn(running(), NOW_S, sample(NOW_S), ev.IncidentsHeard((HALT,)))
    (note,) = (note for note in state.notes if note.kind == "gpu_error")
    assert "GPU 0" in note.text
    assert "XID 62" in note.text
    assert note.data == {"device": GPU0, "xid": 62, "blame": "gpu"}
    assert note.model is None
    assert [reported.incident for reported in state.incidents] == [HALT]


def test_only_the_newest_are_kept() -> None:
    many = [replace(HALT, code=code) for code in range(KEPT + 5)]
    state, _ = turn(running(), NOW_S, sample(NOW_S), *(ev.IncidentsHeard((one,)) for one in many))
    assert [reported.incident.code for reported in state.incidents] == list(range(5, KEPT + 5))


def test_what_a_card_repeats_without_end_is_noted_now_and_then() -> None:
    state, notes = running(), 0
    for step in range(40):
        at_s = NOW_S + step * NOTED_ONCE_S / 20
        state, _ = turn(state, at_s, sample(at_s), ev.IncidentsHeard((HALT,) * 64))
        notes += len([note for note in state.notes if note.kind == "gpu_error"])
    assert notes == len(state.incidents) == 2
    other = replace(HALT, device=GPU1)
    state, _ = turn(state, NOW_S, sample(NOW_S), ev.IncidentsHeard((other, replace(HALT, code=63))))
    assert len(state.incidents) == 4, "of another card, or another error: that is news"


def test_whom_a_fault_is_put_down_to_is_noted_also_if_it_repeats_another_ones() -> None:
    state, _ = turn(running(), NOW_S, sample(NOW_S, foreign=300), ev.IncidentsHeard((PAGE_FAULT,)))
    later_s = NOW_S + JUST_LEFT_S
    for step in range(2):
        heard = ev.IncidentsHeard((PAGE_FAULT, PAGE_FAULT))
        state, _ = turn(state, later_s + step, sample(later_s + step), heard)
        assert [note.model for note in state.notes if note.kind == "gpu_error"] == ["a"][step:]
    assert state.faults["a-1"].at_s == later_s


# ---- a program's fault


def test_who_was_alone_on_the_gpu_is_ended_when_it_does_not_end_by_itself() -> None:
    state, plan = turn(running(), NOW_S, sample(NOW_S), ev.IncidentsHeard((PAGE_FAULT,)))
    assert (stops(plan), plan.wake_at_s) == ([], NOW_S + FAULT_S)
    state, plan = turn(state, NOW_S + FAULT_S, sample(NOW_S + FAULT_S), in_flight=3)
    assert stops(plan) == ["a"]
    stopped = state.instance("a")
    assert (stopped.state, stopped.is_failing) == (State.STOPPING, True)
    assert stopped.failure is not None
    assert stopped.failure.code == "gpu_fault"
    assert "XID 31" in stopped.failure.message
    assert stopped.retry_at_s is not None, "the next try is due like after any failure"


def test_who_ends_by_itself_has_its_own_last_words() -> None:
    state, _ = turn(running(), NOW_S, sample(NOW_S), ev.IncidentsHeard((PAGE_FAULT,)))
    ended = ev.Ended("a", "a-1", 134, log_tail=("CUDA error: an illegal memory access",))
    state, _ = turn(state, NOW_S + 1, ended)
    failure = state.instance("a").failure
    assert failure is not None
    assert (failure.exit_code, failure.log_tail) == (134, ended.log_tail)


@pytest.mark.parametrize(
    ("others", "foreign", "unexplained", "attributed"),
    [
        (["b"], 0, 0, True),
        ([], 300, 0, True),
        ([], 0, 0, False),
        ([], 0, 300, True),
    ],
    ids=["another model", "a foreign program", "nobody can be told apart", "a program that is not listed"],
)
def test_nobody_is_ended_for_what_may_be_anothers_fault(
    others: list[str], foreign: int, unexplained: int, attributed: bool
) -> None:
    def seen(at_s: float) -> ev.Sampled:
        return sample(at_s, foreign, unexplained, attributed=attributed)

    world_ = running(State.READY, *others)
    state, _ = turn(world_, NOW_S, seen(NOW_S), ev.IncidentsHeard((PAGE_FAULT,)))
    later_s = NOW_S + 10 * FAULT_S
    state, plan = turn(state, later_s, seen(later_s))
    assert stops(plan) == []
    assert state.instance("a").state is State.READY


def test_nobody_is_ended_for_a_model_that_has_just_ended() -> None:
    """Whoever faults mostly ends at once: its end is known before the report of it is heard."""
    state, _ = turn(running(State.READY, "b"), NOW_S, sample(NOW_S))
    state, _ = turn(state, NOW_S + 0.2, ev.Ended("b", "b-1", 134))
    state, _ = turn(state, NOW_S + 0.5, sample(NOW_S + 0.5), ev.IncidentsHeard((PAGE_FAULT,)))
    assert state.faults == {}
    assert state.instance("b").state is State.FAILED, "its memory is back, and it is not seen any more"


@pytest.mark.parametrize(("foreign", "unexplained"), [(300, 0), (0, 300)])
def test_nobody_is_ended_for_a_program_that_has_just_ended(foreign: int, unexplained: int) -> None:
    state, _ = turn(running(), NOW_S, sample(NOW_S, foreign, unexplained))
    state, _ = turn(state, NOW_S + 0.5, sample(NOW_S + 0.5), ev.IncidentsHeard((PAGE_FAULT,)))
    assert state.faults == {}


def test_who_is_alone_for_a_while_is_ended_for_its_own_fault() -> None:
    state, _ = turn(running(State.READY, "b"), NOW_S, sample(NOW_S, foreign=300))
    state, _ = turn(state, NOW_S + 0.2, ev.Ended("b", "b-1", 134))
    later_s = NOW_S + 0.2 + JUST_LEFT_S
    state, _ = turn(state, later_s, sample(later_s), ev.IncidentsHeard((PAGE_FAULT,)))
    assert state.faults.keys() == {"a-1"}


@pytest.mark.parametrize("blame", [Blame.GPU, Blame.NOBODY])
def test_nobody_is_ended_for_what_is_no_programs_fault(blame: Blame) -> None:
    heard = ev.IncidentsHeard((replace(PAGE_FAULT, blame=blame),))
    state, _ = turn(running(), NOW_S, sample(NOW_S), heard)
    _, plan = turn(state, NOW_S + 10 * FAULT_S, sample(NOW_S + 10 * FAULT_S))
    assert stops(plan) == []


def test_the_fault_of_one_attempt_is_not_the_next_ones() -> None:
    state, _ = turn(running(), NOW_S, sample(NOW_S), ev.IncidentsHeard((PAGE_FAULT,)))
    assert state.faults.keys() == {"a-1"}
    state, _ = turn(state, NOW_S + 1, ev.Ended("a", "a-1", 134))
    assert state.faults == {}


# ---- a broken GPU


@pytest.mark.parametrize("state_before", ALIVE)
def test_what_runs_on_a_broken_gpu_is_ended_and_counted_as_failed(state_before: State) -> None:
    state, plan = turn(running(state_before), NOW_S, sample(NOW_S, broken=True), in_flight=1)
    assert stops(plan) == []
    state, plan = turn(state, NOW_S + BROKEN_S, sample(NOW_S + BROKEN_S, broken=True), in_flight=1)
    assert stops(plan) == ["a"]
    failure = state.instance("a").failure
    assert failure is not None
    assert failure.code == "gpu_broken"
    assert "it must be reset" in failure.message


def test_a_hiccup_ends_nobody() -> None:
    state, _ = turn(running(), NOW_S, sample(NOW_S, broken=True))
    state, _ = turn(state, NOW_S + BROKEN_S / 2, sample(NOW_S + BROKEN_S / 2))
    state, plan = turn(state, NOW_S + BROKEN_S, sample(NOW_S + BROKEN_S, broken=True))
    assert stops(plan) == []
    assert state.instance("a").state is State.READY


@pytest.mark.parametrize("lost", ["its GPU", "its context"])
def test_who_was_to_go_anyway_is_ended_and_has_not_failed(lost: str) -> None:
    leaving = running(State.DRAINING)
    wanted = replace(leaving.instance("a"), unload_wanted=True)
    leaving = replace(leaving, instances={"a": wanted})
    broken = lost == "its GPU"
    news = [sample(NOW_S, broken=broken), *([] if broken else [ev.IncidentsHeard((PAGE_FAULT,))])]
    state, _ = turn(leaving, NOW_S, *news, in_flight=1)
    later_s = NOW_S + BROKEN_S
    state, plan = turn(state, later_s, sample(later_s, broken=broken), in_flight=1)
    assert stops(plan) == ["a"]
    state, _ = turn(state, later_s, ev.Ended("a", "a-1", 137))
    assert (state.instance("a").failure, state.instance("a").is_failing) == (None, False)


def test_a_driver_that_hangs_after_a_hiccup_ends_nobody() -> None:
    """It was seen to be broken once, and nothing has been seen since."""
    state, _ = turn(running(), NOW_S, sample(NOW_S, broken=True))
    state, plan = turn(state, NOW_S + 10 * BROKEN_S)
    assert stops(plan) == []
    state, plan = turn(state, NOW_S + 10 * BROKEN_S, sample(NOW_S + 10 * BROKEN_S, broken=True))
    assert stops(plan) == ["a"]


def test_a_gpu_that_can_only_not_be_read_ends_nobody() -> None:
    def unread(at_s: float) -> ev.Sampled:
        return ev.Sampled(Sample(at_s, {GPU1: Reading(10_000 * MIB, 0)}, {GPU0: "NVML says: Timeout"}))

    state, _ = turn(running(), NOW_S, unread(NOW_S))
    for step in range(1, 20):
        state, plan = turn(state, NOW_S + step * BROKEN_S, unread(NOW_S + step * BROKEN_S))
        assert stops(plan) == []
    assert state.instance("a").state is State.READY


def test_it_is_loaded_on_another_gpu_when_somebody_asks() -> None:
    state, _ = turn(running(), NOW_S, sample(NOW_S, broken=True))
    at_s = NOW_S + BROKEN_S
    state, _ = turn(state, at_s, sample(at_s, broken=True))
    state, _ = turn(state, at_s + 1, ev.Ended("a", "a-1", None), ev.WaiterCame("a", "r1", NOW_S + 1000))
    started: list[Start] = []
    for step in range(2, 60):
        state, plan = turn(state, at_s + step, sample(at_s + step, broken=True))
        started += [action for action in plan.actions if isinstance(action, Start)]
    assert [start.placement for start in started] == [{GPU1: 1000 * MIB}]
