"""What is said about a load before it, against the load itself: the real loop on the simulated machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.core.entities import MIB, ModelId, Note
from orchestrator.core.preview import Outcome, Preview, preview
from tests.control.simulation import Life, Simulation, flexible, model
from tests.control.test_stateful import FIRST

NAMES = st.sampled_from(sorted(FIRST))
USES = st.tuples(NAMES, st.sampled_from([0.0, 3.0, 500.0]), st.sampled_from([0.0, 0.1, 20.0]))
"""A request for a model: how long it is inside, and how much time passes after it came."""

ENOUGH = 4
MOST_ROUNDS = 10


def look_ahead(life: Life, name: ModelId) -> Preview:
    """And see that looking has changed nothing and told nobody."""
    loop, snapshot, usage, told = life.loop, life.loop.snapshot, life.loop.usage(), life.loop.feed.last_id
    found = preview(loop.as_of_now(), usage, snapshot.models[name])
    assert loop.snapshot is snapshot
    assert loop.usage() == usage
    assert loop.feed.last_id == told
    assert len(loop.inbox) == 0
    return found


def load(simulation: Simulation, name: ModelId) -> Sequence[Note]:
    """Ask for the model, and return what the loop notes in the turn that decides about it."""
    loop = simulation.life.loop
    before = loop.snapshot
    simulation.command("load", name, pin=None)
    while loop.snapshot is before:
        simulation.progress(1)
    return loop.snapshot.notes


def lived(uses: Sequence[tuple[ModelId, float, float]]) -> Simulation:
    simulation = Simulation(FIRST)
    simulation.pass_time(0.1)
    for name, use_s, passes_s in uses:
        simulation.ask(name, 30.0, use_s)
        simulation.pass_time(passes_s)
    return simulation


def test_what_would_leave_is_what_leaves() -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=200,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(st.lists(USES, min_size=2, max_size=6), st.integers(0, 6))
    def compare(uses: list[tuple[ModelId, float, float]], pick: int) -> None:
        simulation = lived(uses)
        try:
            missing = [name for name in FIRST if not simulation.machine.alive(name)]
            name = (missing or list(FIRST))[pick % len(missing or FIRST)]
            found = look_ahead(simulation.life, name)
            attempts = {i.model: i.attempt for i in simulation.life.loop.snapshot.instances.values()}
            notes = load(simulation, name)
            evicted = [note.model for note in notes if note.kind == "evicted" and note.data["by"] == name]
            assert evicted == [eviction.model for eviction in found.evictions]
            refused = any(note.kind == "refused" and note.model == name for note in notes)
            assert refused == (found.outcome is Outcome.REFUSED)
            stopped = {m for m, attempt in attempts.items() if attempt in simulation.promises.stop_ordered}
            assert {e.model for e in found.evictions if not e.in_flight} <= stopped
            seen.update([found.outcome.value, "evicts"] if evicted else [found.outcome.value])
        finally:
            simulation.close()

    for _ in range(MOST_ROUNDS):  # random lives need not have many evictions in them
        compare()
        if seen["evicts"] > ENOUGH:
            break
    assert seen["evicts"] > ENOUGH, seen
    assert seen[Outcome.STARTS] > ENOUGH, seen


def test_looking_often_does_not_keep_an_idle_model() -> None:
    simulation = Simulation({"a": model("a", 600, idle_after_s=100.0), "b": model("b", 600)})
    try:
        simulation.pass_time(0.1)
        simulation.ask("a", 30.0, 0.0)
        for _ in range(11):
            simulation.pass_time(10.0)
            if simulation.life.loop.snapshot.instance("a").attempt is not None:
                look_ahead(simulation.life, "a")
                look_ahead(simulation.life, "b")
        assert not simulation.machine.alive()
    finally:
        simulation.close()


def test_what_was_chosen_is_what_runs_and_survives_the_server() -> None:
    """The largest of three that fits beside another model; the process really takes that much."""
    gpu_0 = {"devices": ("GPU-0",)}
    models = [flexible("a", 700, 400, 200, **gpu_0), model("b", 500, **gpu_0)]
    simulation = Simulation({m.id: m for m in models})
    try:
        simulation.pass_time(0.1)
        load(simulation, "b")
        simulation.progress(None)
        assert look_ahead(simulation.life, "a").parameters == {"size": 400}
        load(simulation, "a")
        simulation.progress(None)
        (process,) = simulation.machine.alive("a")
        assert process.full["GPU-0"] == 400 * MIB
        assert simulation.machine.disk.instances["a"].parameters == {"size": 400}
        simulation.kill(is_saved=True)
        simulation.progress(None)
        instance = simulation.life.loop.snapshot.instance("a")
        assert (instance.attempt, instance.parameters) == (process.attempt, {"size": 400})
    finally:
        simulation.close()
