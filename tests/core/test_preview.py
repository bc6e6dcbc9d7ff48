"""What a load would do, told beforehand: by example, and as the planner then really decides."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.entities import HOST, MIB, Demand, Usage
from orchestrator.core.events import LoadAsked
from orchestrator.core.fold import fold
from orchestrator.core.lifecycle import State
from orchestrator.core.planner import make_plan
from orchestrator.core.preview import Alternatives, Fitting, Outcome, Parameters, Preview, preview, would_fit
from orchestrator.core.snapshot import Snapshot, apply
from orchestrator.core.verdicts import Refused, Unusable
from tests.core.worlds import NOW_S, Drawn, busy, entry, gpu, instance, model, ram, world, worlds

GPU0 = "GPU-0"


def seen(snapshot: Snapshot, name: str, usage: dict[str, Usage] | None = None) -> Preview:
    return preview(snapshot, usage or {}, snapshot.models[name])


def leaving(found: Preview) -> list[str]:
    return [eviction.model for eviction in found.evictions]


def room_mib(found: Preview, device: str = GPU0) -> tuple[int, int]:
    room = found.room[device]
    return room.before_bytes // MIB, room.after_bytes // MIB


def test_one_that_fits_starts() -> None:
    found = seen(world([gpu(0, 10000, headroom_mib=500), ram(50)], [model("a", 6000, 20)]), "a")
    assert (found.state, found.outcome, found.evictions) == (State.STOPPED, Outcome.STARTS, ())
    assert found.placement == {GPU0: 6000 * MIB, HOST: 20 * MIB}
    assert room_mib(found) == (9500, 3500)
    assert room_mib(found, HOST) == (50, 30)


def full_house() -> Snapshot:
    """8000 of 10,000 MiB: two small ones of low priority, and a large one that is dearer than both."""
    models = [
        model("x", 2000, priority=40),
        model("y", 2000, priority=40),
        model("large", 4000),
        model("new", 6000),
    ]
    ready = [
        instance("x", State.READY, {GPU0: 2000}),
        instance("y", State.READY, {GPU0: 2000}, load_time_s=1.0),
        instance("large", State.READY, {GPU0: 4000}),
    ]
    return world([gpu(0, 10000)], models, ready)


def test_two_small_ones_of_low_priority_leave_rather_than_a_large_one() -> None:
    used = {"x-1": Usage(0, 10, NOW_S - 60), "y-1": Usage(0, 10, NOW_S - 30)}
    found = seen(full_house(), "new", used)
    assert found.outcome is Outcome.WAITS
    assert found.waits_for == "'x' and 'y' to leave, and the memory to be seen free"
    assert room_mib(found) == (2000, 0)
    by_name = {eviction.model: eviction for eviction in found.evictions}
    assert leaving(found) == ["y", "x"], "the cheaper to bring back goes first"
    assert (by_name["y"].load_time_s, by_name["x"].load_time_s) == (1.0, 2.0)
    assert by_name["y"].reload_cost < by_name["x"].reload_cost
    assert (by_name["x"].idle_s, by_name["x"].priority, by_name["x"].in_flight) == (60, 40, 0)
    assert by_name["x"].frees == {GPU0: 2000 * MIB}


def test_a_busy_one_is_drained() -> None:
    snapshot = world(
        [gpu(0, 10000)], [model("a", 8000), model("b", 8000)], [instance("a", State.READY, {GPU0: 8000})]
    )
    found = seen(snapshot, "b", busy("a", in_flight=2))
    assert (found.outcome, leaving(found)) == (Outcome.WAITS, ["a"])
    assert found.evictions[0].in_flight == 2
    assert found.placement == {GPU0: 8000 * MIB}


def test_one_that_may_not_leave_yet_is_waited_for() -> None:
    young = instance("a", State.READY, {GPU0: 8000}, ready_at_s=NOW_S - 1)
    snapshot = world([gpu(0, 10000)], [model("a", 8000), model("b", 8000)], [young])
    found = seen(snapshot, "b", busy("a"))
    assert (found.outcome, found.evictions, found.placement) == (Outcome.WAITS, (), {})
    assert found.waits_for == (
        "it needs 8000 MiB, and the room is held by a (busy with 1 request, may be asked in 9 s)"
    )


def test_what_is_loaded_or_on_its_way_is_joined() -> None:
    for state, outcome in {
        State.READY: Outcome.LOADED,
        State.STARTING: Outcome.LOADING,
        State.CLAIMED: Outcome.LOADING,
        State.STOPPING: Outcome.WAITS,
    }.items():
        here = instance("a", state, {GPU0: 8000}, started_at_s=NOW_S, since_s=NOW_S)
        found = seen(world([gpu(0, 10000)], [model("a", 8000)], [here], [entry("a")]), "a")
        if state is State.CLAIMED:  # with room for it, this very turn starts it
            assert found.placement == {GPU0: 8000 * MIB}
        assert (found.state, found.outcome, found.evictions) == (state, outcome, ())


def test_what_can_never_fit_is_refused_with_the_numbers_of_a_load() -> None:
    snapshot = full_house()
    vast = model("vast", 20000)
    snapshot = replace(snapshot, models={**snapshot.models, "vast": vast})
    found = seen(snapshot, "vast")
    assert found.outcome is Outcome.REFUSED
    assert isinstance(found.verdict, Refused)
    assert found.verdict.forever
    assert (found.verdict.needed_bytes, found.verdict.capacity_bytes) == (20000 * MIB, 10000 * MIB)
    assert (found.evictions, found.placement) == ((), {})
    assert room_mib(found) == (2000, 2000)


def test_an_entry_that_cannot_be_loaded_is_refused() -> None:
    found = seen(world([gpu(0, 100)], [model("a", 10, problem="There is no file.")]), "a")
    assert found.verdict == Unusable("a", "There is no file.")
    assert found.outcome is Outcome.REFUSED


def test_the_largest_that_fits_is_named_of_each_kind_and_no_more_is_asked_than_needed() -> None:
    pinned = instance("kept", State.READY, {GPU0: 6000})
    models = [model("kept", 6000, pinned=True), model("a", 9000)]
    snapshot = world([gpu(0, 10000)], models, [pinned])
    assert isinstance(seen(snapshot, "a").verdict, Refused)
    asked: list[Parameters] = []

    def demand(parameters: Parameters) -> Demand:
        asked.append(parameters)
        return Demand(sum(int(value) for value in parameters.values()) * MIB)

    contexts = [{"context_size": size} for size in range(9000, 0, -1000)]
    ways = Alternatives((contexts, [{"parallel": 5000}], []), demand)
    fitting = would_fit(snapshot, {}, models[1], ways)
    assert fitting == (Fitting({"context_size": 4000}, Demand(4000 * MIB)),)
    assert len(asked) < 8


def test_layers_that_fit_between_the_gpu_and_ram_are_found() -> None:
    """Of 100 the GPU takes 30 at most and RAM 75: with fewer than 25 there it is refused again."""
    snapshot = world([gpu(0, 3000), ram(7500)], [model("a", 9000)])

    def demand(parameters: Parameters) -> Demand:
        on_gpu = int(parameters["n_gpu_layers"])
        return Demand(on_gpu * 100 * MIB, (100 - on_gpu) * 100 * MIB)

    layers = [{"n_gpu_layers": count} for count in range(99, -1, -1)]
    fitting = would_fit(snapshot, {}, snapshot.models["a"], Alternatives((layers,), demand))
    assert [one.parameters for one in fitting] == [{"n_gpu_layers": 30}]
    smaller = world([gpu(0, 3000), ram(6900)], [model("a", 9000)])
    assert would_fit(smaller, {}, smaller.models["a"], Alternatives((layers,), demand)) == ()


@settings(max_examples=300, deadline=None)
@given(worlds(), st.integers(0, 6))
def test_looking_ahead_is_right_and_changes_nothing(drawn: Drawn, pick: int) -> None:
    """Against a load that is really asked for in the same moment, among everything else that happens then."""
    snapshot, names = drawn.snapshot, sorted(drawn.snapshot.models)
    name = names[pick % len(names)]
    before = repr(snapshot)
    found = preview(snapshot, drawn.usage, snapshot.models[name])
    assert repr(snapshot) == before
    asked = fold(snapshot, [LoadAsked(name, "op")], now_s=snapshot.now_s, wall_s=snapshot.wall_s)
    plan = make_plan(asked, drawn.usage)
    after = apply(asked, plan)
    assert after.verdicts.get("op") == found.verdict
    planned = after.instance(name)
    if found.outcome in (Outcome.STARTS, Outcome.LOADING):
        assert planned.state in (State.STARTING, State.CLAIMED)
        assert planned.placement == found.placement
    made_room = {
        i.model: dict(i.placement)
        for i in plan.instances.values()
        if i.stop_reason == f"evicted for '{name}'" and snapshot.instance(i.model).stop_reason is None
    }
    assert made_room == {e.model: dict(snapshot.instance(e.model).placement) for e in found.evictions}
    assert set(found.room) == {d for d in snapshot.devices if snapshot.reading(d) is not None}
