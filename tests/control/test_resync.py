"""What the engine lists against what is known: one row of the table each, then what changed meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.control.ports import Exit, Found
from orchestrator.control.resync import corrections
from orchestrator.control.selfcheck import compare
from orchestrator.core.lifecycle import Instance, State
from orchestrator.core.snapshot import Snapshot
from tests.core.worlds import gpu, instance, model, world

GPU0 = "GPU-0"
RUNS = Found("a-1", "a", "127.0.0.1", 1)
ENDED = Found("a-1", "a", exit=Exit(7, log_tail=("boom",)))
PLACES: dict[str, tuple[Found, ...]] = {"running": (RUNS,), "ended": (ENDED,), "gone": ()}


def knowing(*instances: Instance) -> Snapshot:
    return world([gpu(0, 10000)], [model("a", 6000)], list(instances))


def a_in(state: State, **more: object) -> Instance:
    return instance("a", state, {GPU0: 6000}, **more)


@pytest.mark.parametrize(
    ("state", "place", "told"),
    [
        (State.CLAIMED, "gone", None),
        (State.STARTING, "running", None),
        (State.STARTING, "ended", 7),
        (State.STARTING, "gone", "nobody saw its code"),
        (State.READY, "running", None),
        (State.READY, "ended", 7),
        (State.READY, "gone", "nobody saw its code"),
        (State.DRAINING, "running", None),
        (State.DRAINING, "ended", 7),
        (State.DRAINING, "gone", "nobody saw its code"),
        (State.STOPPING, "running", None),
        (State.STOPPING, "ended", None),  # its stop tells
        (State.STOPPING, "gone", None),
        (State.RECLAIMING, "ended", None),
        (State.RECLAIMING, "gone", None),
        (State.STOPPED, "ended", None),
        (State.STOPPED, "gone", None),
    ],
)
def test_an_exit_that_nobody_told_is_told(state: State, place: str, told: int | str | None) -> None:
    snapshot = knowing(a_in(state, attempt="a-1"))
    found = corrections(snapshot, PLACES[place], snapshot)
    codes = [event.exit_code or "nobody saw its code" for event in found.events]
    assert codes == ([] if told is None else [told])
    assert found.orphans == ()


@pytest.mark.parametrize("place", ["ended", "gone"])
def test_what_the_engine_has_not_started_yet_is_told_by_its_start(place: str) -> None:
    snapshot = knowing(a_in(State.STARTING, attempt="a-1", host=None, port=None))
    assert corrections(snapshot, PLACES[place], snapshot).events == ()


def test_what_an_exit_says_is_passed_on() -> None:
    snapshot = knowing(a_in(State.READY))
    [event] = corrections(snapshot, [ENDED], snapshot).events
    assert (event.model, event.attempt, event.log_tail) == ("a", "a-1", ("boom",))


@pytest.mark.parametrize("state", [State.STOPPED, State.FAILED, State.QUEUED, State.RECLAIMING])
def test_what_runs_although_it_has_ended_is_stopped(state: State) -> None:
    """An engine that finished a dead caller's request late."""
    snapshot = knowing(a_in(state, attempt="a-1"))
    [stop] = corrections(snapshot, [RUNS], snapshot).orphans
    assert (stop.attempt, stop.model) == ("a-1", "a")


def test_a_start_that_an_earlier_server_ordered_and_that_comes_late_is_waited_for() -> None:
    """Recovery goes on with it as a claim of the same attempt."""
    snapshot = knowing(a_in(State.CLAIMED, attempt="a-1"))
    assert corrections(snapshot, [RUNS], snapshot).orphans == ()
    assert compare(snapshot, [RUNS], None, snapshot) == ()


def test_what_nobody_knows_is_stopped_if_it_runs() -> None:
    snapshot = knowing(a_in(State.READY))
    strangers = [Found("x-1", "x", "127.0.0.1", 2), Found("y-1", "y", exit=Exit(0))]
    found = corrections(snapshot, [RUNS, *strangers], snapshot)
    assert [stop.attempt for stop in found.orphans] == ["x-1"]
    assert found.events == ()


def test_what_was_created_late_and_never_started_is_cleared_away() -> None:
    created = Found("x-1", "x", exit=Exit(None), has_run=False)
    snapshot = knowing(a_in(State.READY))
    assert [stop.attempt for stop in corrections(snapshot, [RUNS, created], snapshot).orphans] == ["x-1"]


def test_an_older_attempt_of_a_loaded_model_is_nobodys() -> None:
    snapshot = knowing(a_in(State.READY, attempt="a-2"))
    newest = Found("a-2", "a", "127.0.0.1", 2)
    assert [s.attempt for s in corrections(snapshot, [RUNS, newest], snapshot).orphans] == ["a-1"]


# --- what changed while the engine was asked


def test_what_became_ready_meanwhile_has_not_ended() -> None:
    before, after = knowing(a_in(State.STARTING)), knowing(a_in(State.READY))
    assert corrections(before, [], after).events == ()


def test_what_was_started_or_stopped_meanwhile_is_no_orphan() -> None:
    runs = a_in(State.STARTING)
    none = knowing()
    assert corrections(none, [RUNS], knowing(runs)).orphans == ()
    assert corrections(knowing(runs), [RUNS], none).orphans == ()


def test_what_changed_otherwise_is_left_to_the_next_time() -> None:
    before = knowing(a_in(State.READY))
    touched = replace(before.instances["a"], failures=1)
    after = replace(before, instances={"a": touched})
    assert corrections(before, [ENDED], after).events == ()
    assert len(corrections(after, [ENDED], after).events) == 1
