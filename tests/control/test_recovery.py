"""The first state of a server: what is remembered against what runs, one row of the table each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import pytest

from orchestrator.control.ports import Exit, Found, Kept
from orchestrator.control.recovery import SHUT_DOWN, Recovered, recover, shut_down
from orchestrator.core.entities import MIB, Failure, Model, Sample, Start, Stop
from orchestrator.core.events import Adopted, Ended, Sampled, UnloadAsked
from orchestrator.core.fold import fold
from orchestrator.core.lifecycle import Instance, State
from orchestrator.core.planner import make_plan
from tests.core.worlds import NOW_S, entry, gpu, instance, model, world

GPU0 = "GPU-0"
MODELS = {"a": model("a", 6000)}
RUNS = Found("a-1", "a", "127.0.0.1", 1)
ENDED = Found("a-1", "a", exit=Exit(7, log_tail=("boom",)))
CREATED = Found("a-1", "a", exit=Exit(None), has_run=False)
PLACES: Mapping[str, tuple[Found, ...]] = {
    "running": (RUNS,),
    "ended": (ENDED,),
    "created": (CREATED,),
    "gone": (),
}


def recovered(
    *instances: Instance,
    found: Iterable[Found] = (),
    same_boot: bool = True,
    models: Mapping[str, Model] = MODELS,
) -> Recovered:
    kept = Kept("me", same_boot, instances={i.model: i for i in instances})
    return recover(kept, found, models, now_s=NOW_S)


def a_in(state: State, **more: object) -> Instance:
    return instance("a", state, {GPU0: 6000}, **more)


def done(result: Recovered) -> list[str]:
    """What is done about it, in words."""
    words = []
    for event in result.events:
        assert isinstance(event, Ended)
        words.append("told" if event.exit_code == 7 else "told without a code")
    words += [type(action).__name__.lower() for action in result.actions]
    return words + [f"lost {name}" for name in result.lost]


@pytest.mark.parametrize(
    ("state", "place", "becomes", "words"),
    [
        (State.CLAIMED, "running", State.STARTING, ["start"]),
        (State.CLAIMED, "ended", State.STARTING, ["told"]),
        (State.CLAIMED, "gone", State.STOPPED, []),
        (State.STARTING, "running", State.STARTING, ["start"]),
        (State.STARTING, "ended", State.STARTING, ["told"]),
        (State.STARTING, "created", State.CLAIMED, []),
        (State.CLAIMED, "created", State.STOPPED, ["stop"]),
        (State.STOPPING, "created", State.STOPPING, ["told without a code", "stop"]),
        (State.STOPPED, "created", State.STOPPED, ["stop"]),
        (State.STARTING, "gone", State.CLAIMED, []),
        (State.READY, "running", State.READY, []),
        (State.READY, "ended", State.READY, ["told"]),
        (State.READY, "gone", State.STOPPED, ["lost a"]),
        (State.DRAINING, "running", State.STOPPING, ["stop"]),
        (State.DRAINING, "ended", State.STOPPING, ["told"]),
        (State.DRAINING, "gone", State.STOPPING, ["told without a code"]),
        (State.STOPPING, "running", State.STOPPING, ["stop"]),
        (State.STOPPING, "ended", State.STOPPING, ["told"]),
        (State.STOPPING, "gone", State.STOPPING, ["told without a code"]),
        (State.STUCK, "running", State.STOPPING, ["stop"]),
        (State.RECLAIMING, "ended", State.RECLAIMING, []),
        (State.RECLAIMING, "gone", State.RECLAIMING, []),
        (State.STOPPED, "running", State.STOPPING, ["stop"]),
        (State.FAILED, "running", State.STOPPING, ["stop"]),
        (State.STOPPED, "gone", State.STOPPED, []),
        (State.QUEUED, "gone", State.STOPPED, []),
    ],
)
def test_what_was_in_a_state_and_is_found_so(
    state: State, place: str, becomes: State, words: list[str]
) -> None:
    result = recovered(a_in(state, attempt="a-1"), found=PLACES[place])
    assert result.instances["a"].state is becomes
    assert done(result) == words


def test_what_is_adopted_serves_on_and_is_idle_from_now() -> None:
    moved = replace(RUNS, host="127.0.0.2", port=99)
    result = recovered(a_in(State.READY), found=[moved])
    adopted = result.instances["a"]
    assert (adopted.host, adopted.port, adopted.ready_at_s) == ("127.0.0.2", 99, NOW_S)
    assert result.adopted == ("a-1",)


def test_what_was_starting_goes_on_with_the_time_that_is_left() -> None:
    result = recovered(a_in(State.STARTING, started_at_s=NOW_S - 400), found=[RUNS])
    assert result.actions == (Start("a-1", "a", {GPU0: 6000 * MIB}),)
    assert result.instances["a"].started_at_s == NOW_S - 400


def test_a_start_that_was_ordered_is_ordered_again_once_there_is_room() -> None:
    """The engine may complete the dead caller's request late; the same attempt cannot run twice."""
    result = recovered(a_in(State.STARTING, host=None, port=None))
    for foreign_mib, ordered in ((0, Start), (5000, Stop)):
        snapshot = world([gpu(0, 10000)], [model("a", 6000)], foreign_mib={GPU0: foreign_mib})
        [action] = make_plan(replace(snapshot, instances=result.instances), {}).actions
        assert (type(action), action.attempt) == (ordered, "a-1"), "else the engine might complete it yet"


def test_it_waits_for_the_first_sample() -> None:
    result = recovered(a_in(State.STARTING, host=None, port=None))
    snapshot = world([gpu(0, 10000)], [model("a", 6000)])
    unmeasured = replace(snapshot, instances=result.instances, sample=Sample(NOW_S - 5))
    assert make_plan(unmeasured, {}).instances == {}


def test_a_start_that_is_still_to_come_is_called_back_by_an_unload() -> None:
    result = recovered(a_in(State.STARTING, host=None, port=None), found=[CREATED])
    snapshot = replace(world([gpu(0, 10000)], [model("a", 6000)]), instances=result.instances)
    unloaded = fold(snapshot, [UnloadAsked("a", "op-1")], now_s=NOW_S, wall_s=0.0)
    [action] = make_plan(unloaded, {}).actions
    assert (type(action), action.attempt) == (Stop, "a-1")


def test_what_is_adopted_without_an_address_is_started_again_to_learn_it() -> None:
    result = recovered(a_in(State.READY), found=[replace(RUNS, host=None, port=None)])
    assert (result.instances["a"].state, done(result)) == (State.STARTING, ["start"])


@pytest.mark.parametrize("more", [{"unload_wanted": True}, {"model": "dropped"}])
def test_a_start_that_nobody_wants_any_more_is_not_ordered_again(more: dict[str, object]) -> None:
    old = replace(a_in(State.STARTING), **more)  # type: ignore[arg-type]
    assert recovered(old).instances[old.model].state is State.STOPPED


def test_a_stop_is_repeated_with_the_models_own_grace() -> None:
    models = {"a": model("a", 6000, stop_grace_s=42.0)}
    [stop] = recovered(a_in(State.STOPPING), found=[RUNS], models=models).actions
    assert isinstance(stop, Stop)
    assert stop.grace_s == 42


def test_what_runs_and_is_no_longer_in_the_catalogue_is_stopped() -> None:
    result = recovered(a_in(State.READY), found=[RUNS], models={})
    assert result.instances["a"].state is State.STOPPING
    assert done(result) == ["stop"]


@pytest.mark.parametrize("same_boot", [True, False])
def test_what_was_created_and_never_started_is_cleared_away(same_boot: bool) -> None:
    """No failure of the model's: the server died between the two."""
    result = recovered(found=[CREATED], same_boot=same_boot)
    assert (done(result), result.notes) == (["stop"], ())


def test_what_nobody_knows_is_stopped_and_said_so() -> None:
    stranger = Found("x-1", "x", "127.0.0.1", 1)
    result = recovered(found=[stranger, Found("y-1", "y", exit=Exit(0))])
    assert [action.attempt for action in result.actions] == ["x-1"]
    assert [note.kind for note in result.notes] == ["orphan"]


def test_nor_is_a_start_ordered_again_beside_a_stray() -> None:
    stray = replace(RUNS, attempt="a-0")
    result = recovered(a_in(State.STARTING, attempt="a-1"), found=[stray])
    waiting = result.instances["a"]
    assert (waiting.state, waiting.attempt, done(result)) == (State.STOPPING, "a-0", ["stop"])


def test_nothing_of_a_model_starts_beside_a_stray_of_it_that_is_being_stopped() -> None:
    """The rows are an older copy's, say, and do not know what runs."""
    result = recovered(found=[RUNS])
    assert result.instances["a"].state is State.STOPPING
    snapshot = world([gpu(0, 10000)], [model("a", 3000)], entries=[entry("a")])
    plan = make_plan(replace(snapshot, instances=result.instances), {})
    assert plan.actions == ()
    gone = [Ended("a", "a-1", exit_code=0)]
    folded = fold(replace(snapshot, instances=result.instances), gone, now_s=NOW_S, wall_s=0.0)
    seen = Sampled(replace(snapshot.sample, taken_at_s=NOW_S + 1))
    folded = fold(folded, [seen], now_s=NOW_S + 1, wall_s=0.0)
    assert [action.model for action in make_plan(folded, {}).actions] == ["a"]


# --- a restart of the machine


@pytest.mark.parametrize("place", ["ended", "gone"])
@pytest.mark.parametrize("state", [State.STARTING, State.READY])
def test_after_a_reboot_nothing_has_failed_and_what_was_loaded_is_lost(state: State, place: str) -> None:
    """Whatever the exit of a container says that the machine took down with it."""
    result = recovered(a_in(state), found=PLACES[place], same_boot=False)
    assert result.instances["a"].state is State.STOPPED
    assert done(result) == ["lost a"]


@pytest.mark.parametrize("place", ["ended", "gone"])
@pytest.mark.parametrize("state", [State.DRAINING, State.STOPPING, State.STUCK, State.RECLAIMING])
def test_after_a_reboot_what_was_leaving_has_left(state: State, place: str) -> None:
    old = a_in(state, unload_wanted=True, stop_reason="unloaded by request")
    result = recovered(old, found=PLACES[place], same_boot=False)
    assert result.instances["a"].state is State.STOPPED
    assert done(result) == []


def test_after_a_reboot_the_clock_begins_anew() -> None:
    """Monotonic times of before lie far ahead: nothing of them may be waited for."""
    failed = a_in(State.FAILED, failure=Failure("boom"), failures=3, retry_at_s=NOW_S + 1e6)
    result = recovered(failed, same_boot=False)
    now = result.instances["a"]
    assert (now.state, now.failures, now.retry_at_s) == (State.FAILED, 3, NOW_S)
    assert now.since_s <= NOW_S


def test_what_comes_back_by_itself_after_a_reboot_is_adopted() -> None:
    """A checkpointed machine, or an engine that restarts containers: it runs, so it is kept."""
    result = recovered(a_in(State.READY, ready_at_s=NOW_S + 1e6), found=[RUNS], same_boot=False)
    assert result.instances["a"].state is State.READY
    assert result.instances["a"].ready_at_s == NOW_S


# --- a clean stop of ours


@pytest.mark.parametrize("same_boot", [True, False])
@pytest.mark.parametrize("place", ["ended", "gone"])
@pytest.mark.parametrize("state", [State.STARTING, State.READY])
def test_what_a_clean_stop_has_ended_is_to_be_restored(state: State, place: str, same_boot: bool) -> None:
    rows = shut_down({"a": a_in(state)})
    assert rows["a"].stop_reason == SHUT_DOWN
    result = recovered(rows["a"], found=PLACES[place], same_boot=same_boot)
    assert result.instances["a"].state is State.STOPPED
    assert done(result) == ["lost a"]
    assert recovered(result.instances["a"], same_boot=same_boot).lost == (), "once only"


@pytest.mark.parametrize("same_boot", [True, False])
@pytest.mark.parametrize("state", [State.STARTING, State.READY, State.DRAINING, State.STOPPING])
def test_a_clean_stop_during_an_unload_restores_nothing(state: State, same_boot: bool) -> None:
    leaving = a_in(state, unload_wanted=True, stop_reason="unloaded by request", unloads=("op-1",))
    rows = shut_down({"a": leaving})
    assert recovered(rows["a"], same_boot=same_boot).lost == ()


def test_a_clean_stop_leaves_what_is_at_rest_alone() -> None:
    at_rest = (instance("a", State.FAILED, failure=Failure("boom")), instance("b", State.STOPPED))
    assert shut_down({i.model: i for i in at_rest}) == {}


def test_a_failure_of_before_does_not_hide_that_it_was_loaded() -> None:
    rows = shut_down({"a": a_in(State.READY, failure=None, failures=2)})
    result = recovered(rows["a"])
    assert (result.lost, result.instances["a"].failures) == (("a",), 2)


# --- a device that is gone


@pytest.mark.parametrize("state", [State.STARTING, State.READY, State.STOPPING])
def test_what_sits_on_a_device_that_is_gone_is_adopted_and_the_others_are_planned(state: State) -> None:
    old = instance("a", state, {"GPU-gone": 6000})
    result = recovered(old, found=[RUNS])
    models = [model("a", 6000), model("b", 8000)]
    snapshot = world([gpu(0, 10000)], models, entries=[entry("b")])
    folded = fold(
        replace(snapshot, instances=result.instances), result.events, now_s=NOW_S, wall_s=snapshot.wall_s
    )
    plan = make_plan(folded, {})
    assert [action.model for action in plan.actions if isinstance(action, Start)] == ["b"]
    assert "a" not in plan.instances


def test_what_was_giving_back_memory_of_a_device_that_is_gone_can_be_loaded_again() -> None:
    held = {"GPU-gone": 6000 * MIB}
    old = instance("a", State.RECLAIMING, {"GPU-gone": 6000}, gone_at_s=NOW_S - 9, held_bytes=held)
    snapshot = world([gpu(0, 10000)], [model("a", 6000)], entries=[entry("a")])
    snapshot = replace(snapshot, instances=recovered(old).instances)
    for step in range(1, 80):
        now_s = NOW_S + step * 0.1
        shown = Sampled(replace(snapshot.sample, taken_at_s=now_s - 0.01))
        snapshot = fold(snapshot, [shown], now_s=now_s, wall_s=snapshot.wall_s)
    assert snapshot.instance("a").state is State.STOPPED


# --- what somebody else has started, and lends

LENT = Found("lent-1", "a", "127.0.0.1", 1, is_lent=True, gpus=(GPU0,))


@pytest.mark.parametrize("state", [None, State.STOPPED, State.FAILED])
def test_what_is_lent_is_taken_over_by_a_model_at_rest(state: State | None) -> None:
    """Also if it is the same that was stopped before: somebody has started it again."""
    rows = [a_in(state, attempt="lent-1")] if state else []
    result = recovered(*rows, found=[LENT])
    assert result.events == (Adopted("a", "lent-1", (GPU0,)),)
    assert result.actions == (Start("lent-1", "a", {}),)
    before = world([gpu(0, 10000), gpu(1, 10000)], [model("a", 6000)])
    before = replace(before, instances=result.instances)
    instance = fold(before, result.events, now_s=NOW_S, wall_s=0).instance("a")
    assert (instance.state, instance.attempt) == (State.STARTING, "lent-1")
    assert instance.placement == {GPU0: 6000 * MIB}, "on the GPU that it was given"


def test_what_is_lent_to_a_model_that_is_held_out_stays_its_owners() -> None:
    before = world([gpu(0, 10000)], [model("a", 6000)])
    held = replace(before, holds={"a": NOW_S + 1})
    for state, taken in ((held, False), (replace(held, holds={"a": NOW_S - 1}), True)):
        after = fold(state, [Adopted("a", "lent-1", (GPU0,))], now_s=NOW_S, wall_s=0)
        assert (after.instance("a").state is State.STARTING) == taken


def test_what_was_taken_over_serves_on_after_a_restart() -> None:
    result = recovered(a_in(State.READY, attempt="lent-1"), found=[LENT])
    assert (result.events, result.actions) == ((), ())
    assert result.adopted == ("lent-1",)


def test_a_stop_of_what_was_taken_over_is_finished() -> None:
    result = recovered(a_in(State.STOPPING, attempt="lent-1"), found=[LENT])
    assert [type(action) for action in result.actions] == [Stop]
