"""What events do to the snapshot, before anything is decided."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core import events as ev
from orchestrator.core.entities import MIB, Failure, OperationState, Progress, Reading, Sample
from orchestrator.core.fold import fold
from orchestrator.core.lifecycle import State
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.verdicts import Broken, QueueFull, Ready, Unloaded, Unusable
from tests.core.worlds import NOW_S, entry, gpu, instance, model, world

GPU0 = "GPU-0"


def after(snapshot: Snapshot, *events: ev.Event, seconds: float = 0.0) -> Snapshot:
    return fold(snapshot, events, now_s=snapshot.now_s + seconds, wall_s=snapshot.wall_s + seconds)


def running(state: State = State.READY, **more: object) -> Snapshot:
    one = instance("a", state, {GPU0: 6000}, **more)
    return world([gpu(0, 10000)], [model("a", 6000, queue_limit=2)], [one])


def sample(snapshot: Snapshot, taken_at_s: float, used: int = 0, unexplained: int = 0) -> ev.Sampled:
    by_attempt = {"a-1": used * MIB} if used else {}
    total = used + unexplained
    reading = Reading((10000 - total) * MIB, total * MIB, by_attempt, unexplained_bytes=unexplained * MIB)
    return ev.Sampled(Sample(taken_at_s, {GPU0: reading}))


def test_a_request_for_a_ready_model_is_let_in() -> None:
    state = after(running(), ev.WaiterCame("a", "r1", NOW_S + 10))
    assert state.verdicts == {"r1": Ready("a", "a-1")}
    assert not state.entries


def test_requests_join_one_entry_and_leave_it_alone() -> None:
    state = after(
        running(State.STARTING), ev.WaiterCame("a", "r1", NOW_S + 10), ev.WaiterCame("a", "r2", NOW_S + 10)
    )
    assert state.entries["a"].waiters == ("r1", "r2")
    state = after(state, ev.WaiterLeft("a", "r1"))
    assert state.entries["a"].waiters == ("r2",)
    assert state.instance("a").state is State.STARTING  # the load goes on
    assert "a" not in after(state, ev.WaiterLeft("a", "r2")).entries


def test_a_full_queue_refuses_the_next() -> None:
    state = after(running(State.STARTING), *(ev.WaiterCame("a", f"r{n}", NOW_S + 10) for n in range(3)))
    assert state.verdicts == {"r2": QueueFull("a", 2)}


def test_a_model_with_a_problem_is_refused_with_it() -> None:
    snapshot = world([gpu(0, 10000)], [model("a", 1, problem="its file is missing")])
    state = after(snapshot, ev.WaiterCame("a", "r1", NOW_S + 10))
    assert state.verdicts == {"r1": Unusable("a", "its file is missing")}


def test_health_ends_the_wait_of_everyone() -> None:
    state = after(running(State.STARTING), ev.WaiterCame("a", "r1", NOW_S + 10))
    state = after(state, ev.Started("a", "a-1", "127.0.0.1", 99), ev.BecameHealthy("a", "a-1"), seconds=2)
    assert state.verdicts == {"r1": Ready("a", "a-1")}
    assert (state.instance("a").state, state.instance("a").port) == (State.READY, 99)
    assert not state.entries


def test_news_of_an_older_attempt_changes_nothing() -> None:
    snapshot = running()
    assert after(snapshot, ev.Ended("a", "a-0", exit_code=1)).instances == snapshot.instances
    assert after(snapshot, ev.BecameHealthy("a", "a-1")).instances == snapshot.instances


@pytest.mark.parametrize("state", [State.READY, State.STOPPING, State.RECLAIMING, State.STOPPED])
def test_progress_of_a_start_that_is_over_is_dropped(state: State) -> None:
    snapshot = running(state, attempt="a-1")
    assert after(snapshot, ev.Progressed("a", "a-1", Progress("pulling image"))).progress == {}


@pytest.mark.parametrize(
    "over", [ev.BecameHealthy("a", "a-1"), ev.Ended("a", "a-1", exit_code=1), ev.UnloadAsked("a", "op-1")]
)
def test_progress_is_kept_no_longer_than_its_attempt(over: ev.Event) -> None:
    state = after(running(State.STARTING), ev.Progressed("a", "a-1", Progress("pulling image")))
    assert state.progress == {"a-1": Progress("pulling image")}
    assert after(state, over, ev.Ended("a", "a-1", exit_code=0)).progress == {}


def test_a_crash_keeps_the_reason_and_backs_off() -> None:
    state = after(running(State.STARTING), ev.WaiterCame("a", "r1", NOW_S + 10))
    state = after(state, ev.Ended("a", "a-1", exit_code=3, log_tail=("loading", "boom")))
    failed = state.instance("a")
    assert (failed.state, failed.is_failing, failed.failures) == (State.RECLAIMING, True, 1)
    assert failed.failure == Failure("it exited with code 3", exit_code=3, log_tail=("loading", "boom"))
    assert failed.retry_at_s == NOW_S + 1
    assert isinstance(state.verdicts["r1"], Broken)


@pytest.mark.parametrize(("before", "delay_s"), [(0, 1), (1, 2), (4, 16), (8, 256), (9, 300), (60, 300)])
def test_the_back_off_doubles_to_five_minutes(before: int, delay_s: float) -> None:
    snapshot = running(State.STARTING, failures=before)
    state = after(snapshot, ev.Ended("a", "a-1", exit_code=1))
    assert state.instance("a").retry_at_s == NOW_S + delay_s


def test_a_minute_of_being_ready_resets_the_back_off() -> None:
    steady = running(failures=5, ready_at_s=NOW_S - 61)
    assert after(steady, ev.Ended("a", "a-1", exit_code=1)).instance("a").failures == 1
    shaky = running(failures=5, ready_at_s=NOW_S - 5)
    assert after(shaky, ev.Ended("a", "a-1", exit_code=1)).instance("a").failures == 6


def test_a_request_is_held_if_the_next_try_is_before_its_deadline() -> None:
    failed = instance("a", State.FAILED, failure=Failure("boom"), retry_at_s=NOW_S + 30)
    snapshot = world([gpu(0, 10000)], [model("a", 6000)], [failed])
    assert "a" in after(snapshot, ev.WaiterCame("a", "r1", NOW_S + 60)).entries
    verdict = after(snapshot, ev.WaiterCame("a", "r2", NOW_S + 10)).verdicts["r2"]
    assert isinstance(verdict, Broken)
    assert verdict.retry_at_s == NOW_S + 30


def test_an_explicit_load_tries_now() -> None:
    failed = instance("a", State.FAILED, failure=Failure("boom"), retry_at_s=NOW_S + 30)
    snapshot = world([gpu(0, 10000)], [model("a", 6000)], [failed])
    assert after(snapshot, ev.LoadAsked("a", "op-1")).entries["a"].tries_now


# --- unload


def test_unloading_what_is_not_loaded_is_a_success_that_says_so() -> None:
    snapshot = world([gpu(0, 10000)], [model("a", 6000)])
    operation = after(snapshot, ev.UnloadAsked("a", "op-1")).operations["op-1"]
    assert operation.state is OperationState.SUCCEEDED
    assert "was not loaded" in operation.message


def test_unloading_ends_the_waits_and_marks_the_instance() -> None:
    state = after(running(State.STARTING), ev.WaiterCame("a", "r1", NOW_S + 10))
    state = after(state, ev.UnloadAsked("a", "op-1"))
    assert state.verdicts == {"r1": Unloaded("a")}
    assert state.instance("a").unload_wanted
    assert state.operations["op-1"].state is OperationState.RUNNING


def test_a_load_during_an_unload_queues_and_does_not_undo_it() -> None:
    state = after(running(State.STOPPING, unload_wanted=True), ev.LoadAsked("a", "op-2"))
    assert state.instance("a").unload_wanted
    assert state.entries["a"].waiters == ("op-2",)


def test_a_hold_keeps_requests_out_until_it_ends_or_somebody_loads() -> None:
    snapshot = world([gpu(0, 10000)], [model("a", 6000)])
    held = after(snapshot, ev.UnloadAsked("a", "op-1", hold_s=600))
    assert after(held, ev.WaiterCame("a", "r1", NOW_S + 10)).verdicts == {"r1": Unloaded("a", NOW_S + 600)}
    assert "a" in after(held, ev.WaiterCame("a", "r1", NOW_S + 900), seconds=601).entries
    assert "a" in after(held, ev.LoadAsked("a", "op-2"), ev.WaiterCame("a", "r1", NOW_S + 10)).entries


def test_unloading_ends_a_pin() -> None:
    pinned = after(running(), ev.LoadAsked("a", "op-1", pin=True))
    assert pinned.is_pinned("a")
    assert not after(pinned, ev.UnloadAsked("a", "op-2")).is_pinned("a")


def test_unloading_a_crashed_model_that_still_gives_back_its_memory_forgives_it() -> None:
    """Its user wants it gone now: it ends stopped, and is not kept from the next load."""
    state = after(running(failures=3), sample(running(), NOW_S, used=6000))
    state = after(state, ev.Ended("a", "a-1", exit_code=1), ev.UnloadAsked("a", "op-1"))
    assert state.instance("a").state is State.RECLAIMING
    state = after(state, sample(state, NOW_S + 0.2), seconds=0.2)
    now = state.instance("a")
    assert (now.state, now.failure, now.failures, now.retry_at_s) == (State.STOPPED, None, 0, None)
    assert state.operations["op-1"].state is OperationState.SUCCEEDED


# --- memory coming back


def gone(snapshot: Snapshot) -> Snapshot:
    """Measured while alive at 6000 MiB with 100 unexplained, then stopped and exited."""
    state = after(snapshot, sample(snapshot, NOW_S, used=6000, unexplained=100))
    stopping = replace(state.instance("a"), state=State.STOPPING, unload_wanted=True, unloads=("op-1",))
    state = after(replace(state, instances={"a": stopping}), seconds=0.1)
    state = replace(state, operations=after(snapshot, ev.UnloadAsked("a", "op-1")).operations)
    return after(state, ev.Ended("a", "a-1", exit_code=0), seconds=0.1)


def test_memory_is_held_until_it_is_seen_free() -> None:
    state = gone(running())
    assert state.instance("a").state is State.RECLAIMING
    at_s = state.now_s
    early = after(state, sample(state, at_s - 0.01))  # begun before the exit: proves nothing
    assert early.instance("a").state is State.RECLAIMING
    late = after(state, sample(state, at_s + 0.1, unexplained=4100), seconds=0.1)
    assert late.instance("a").state is State.RECLAIMING  # 4000 MiB still come back
    back = after(late, sample(late, at_s + 0.2, unexplained=100), seconds=0.1)
    assert back.instance("a").state is State.STOPPED
    operation = back.operations["op-1"]
    assert (operation.state, operation.freed_bytes) == (OperationState.SUCCEEDED, 6000 * MIB)


def test_memory_that_never_comes_back_is_reported_as_a_leak() -> None:
    state = gone(running())
    start_s = state.now_s
    for step in range(1, 60):
        state = after(state, sample(state, start_s + step * 0.1, unexplained=1600), seconds=0.1)
        if state.instance("a").state is State.STOPPED:
            break
    assert state.now_s - start_s == pytest.approx(5.0, abs=0.3)
    assert [note.kind for note in state.notes] == ["leak"]
    assert state.notes[0].data["missing_mib"] == 1500


def test_a_device_that_cannot_be_read_neither_frees_nor_leaks() -> None:
    state = gone(running())
    start_s = state.now_s
    for step in range(1, 100):
        lost = ev.Sampled(Sample(start_s + step * 0.1, {}, {GPU0: "lost"}))
        state = after(state, lost, seconds=0.1)
    assert state.instance("a").state is State.RECLAIMING


def test_a_model_is_not_held_for_ever_by_a_device_that_is_blind() -> None:
    state = gone(running())
    start_s = state.now_s
    for step in range(1, 40):
        state = after(state, ev.Sampled(Sample(start_s + step, {}, {GPU0: "lost"})), seconds=1.0)
    assert state.instance("a").state is State.STOPPED
    assert state.measured == {}


def test_a_device_that_can_be_read_again_has_not_been_blind() -> None:
    state = gone(running())
    start_s = state.now_s
    for step in range(1, 100):
        lost = ev.Sampled(Sample(start_s + step, {}, {GPU0: "lost"}))
        seen = sample(state, start_s + step, unexplained=6000)
        state = after(state, seen if step % 20 == 0 else lost, seconds=1.0)
    assert state.instance("a").state is State.RECLAIMING


def test_an_attempt_that_died_between_two_samples_still_has_held_its_bytes() -> None:
    state = after(running(), sample(running(), NOW_S, used=6000))
    state = after(state, sample(state, NOW_S + 0.5, unexplained=6000), seconds=0.5)  # dead, not told yet
    state = after(state, ev.Ended("a", "a-1", exit_code=137), seconds=0.1)
    assert state.instance("a").held_bytes == {GPU0: 6000 * MIB}
    state = after(state, sample(state, state.now_s + 0.1, unexplained=6000), seconds=0.2)
    assert state.instance("a").state is State.RECLAIMING


def test_entries_of_others_are_left_alone() -> None:
    snapshot = world([gpu(0, 10000)], [model("a", 1), model("b", 1)], entries=[entry("b")])
    assert "b" in after(snapshot, ev.UnloadAsked("a", "op-1")).entries


def test_what_a_start_costs_beside_its_processes_is_known_until_it_is_ready() -> None:
    state = after(running(State.STARTING), sample(running(), NOW_S, unexplained=1))
    state = after(state, sample(state, NOW_S + 1, used=3000, unexplained=4), seconds=1)
    state = after(state, sample(state, NOW_S + 2, used=6000, unexplained=9), seconds=1)
    state = after(state, ev.BecameHealthy("a", "a-1"), seconds=0.5)
    state = after(state, sample(state, NOW_S + 3, used=6000, unexplained=10), seconds=0.5)
    assert state.measured["a-1"][GPU0].overhead_bytes == 10 * MIB
    state = after(state, sample(state, NOW_S + 4, used=6000, unexplained=900), seconds=1)
    assert state.measured["a-1"][GPU0].overhead_bytes == 10 * MIB, "what comes later is somebody else's"
