"""Models whose context or layers are left to us: which of their variants is placed, and where."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.core.entities import MIB, Demand, Launch, Model, Start, Variant
from orchestrator.core.lifecycle import State
from orchestrator.core.planner import make_plan
from orchestrator.core.preview import preview
from orchestrator.core.snapshot import Plan, apply
from orchestrator.core.verdicts import Refused
from tests.core.worlds import NOW_S, busy, entry, gpu, instance, model, world

GPU0, GPU1 = "GPU-0", "GPU-1"


def variant(context_size: int, mib: int) -> Variant:
    launch = Launch("test", command=("serve", str(context_size)))
    return Variant({"context_size": context_size}, Demand(mib * MIB), launch)


def flexible(name: str = "a", **more: object) -> Model:
    """8000, 6000 or 4000 MiB."""
    variants = (variant(32, 8000), variant(16, 6000), variant(8, 4000))
    least = variants[-1]
    return model(name, 4000, launch=least.launch, variants=variants, **more)


def chosen(plan: Plan, name: str = "a") -> tuple[int | None, dict[str, int]]:
    """The context that was chosen, and where it is in MiB."""
    placed = plan.instances[name]
    return placed.parameters.get("context_size"), {d: size // MIB for d, size in placed.placement.items()}


def test_the_largest_that_fits_starts_with_its_own_launch() -> None:
    for capacity, context, size in ((10000, 32, 8000), (7999, 16, 6000), (4000, 8, 4000)):
        plan = make_plan(world([gpu(0, capacity)], [flexible()], entries=[entry("a")]), {})
        assert chosen(plan) == (context, {GPU0: size})
        (start,) = plan.actions
        assert isinstance(start, Start)
        assert flexible().run_with(start.parameters).launch.command == ("serve", str(context))
        (note,) = (note for note in plan.notes if note.kind == "starting")
        assert note.text == f"'a' starts on GPU 0 ({size} MiB) with context_size {context}"
        assert note.data["parameters"] == {"context_size": context}


def test_a_roomier_gpu_is_better_than_a_shorter_context() -> None:
    ready = instance("x", State.READY, {GPU0: 3000})
    twins = [replace(gpu(0, 10000), name="RTX 3090"), replace(gpu(1, 9000), name="RTX 3090")]
    plan = make_plan(world(twins, [flexible(), model("x", 3000)], [ready], [entry("a")]), {})
    assert chosen(plan) == (32, {GPU1: 8000})
    assert "'a' starts on GPU 1 (8000 MiB) with context_size 32" in [note.text for note in plan.notes]


def test_nobody_leaves_for_a_longer_context() -> None:
    ready = instance("x", State.READY, {GPU0: 5000})
    snapshot = world([gpu(0, 10000)], [flexible(), model("x", 5000)], [ready], [entry("a")])
    plan = make_plan(snapshot, {})
    assert chosen(plan) == (8, {GPU0: 4000})
    assert "x" not in plan.instances


def test_where_somebody_idle_must_leave_the_room_is_used() -> None:
    ready = [instance("x", State.READY, {GPU0: 7000}), instance("y", State.READY, {GPU0: 1000})]
    models = [flexible(), model("x", 7000), model("y", 1000, pinned=True)]
    plan = make_plan(world([gpu(0, 10000)], models, ready, [entry("a")]), {})
    assert chosen(plan) == (32, {GPU0: 8000})
    assert plan.instances["x"].state is State.STOPPING
    assert plan.instances["a"].state is State.CLAIMED


def test_the_busy_leave_for_the_least_only() -> None:
    ready = [instance("x", State.READY, {GPU0: 4500}), instance("y", State.READY, {GPU0: 4500})]
    models = [flexible(), model("x", 4500), model("y", 4500)]
    plan = make_plan(world([gpu(0, 10000)], models, ready, [entry("a")]), busy("x", "y"))
    assert chosen(plan) == (8, {GPU0: 4000})
    assert [m for m, i in plan.instances.items() if i.state is State.DRAINING] in (["x"], ["y"])


def test_a_refusal_has_the_numbers_of_the_least() -> None:
    plan = make_plan(world([gpu(0, 3000)], [flexible()], entries=[entry("a")]), {})
    verdict = plan.verdicts["r-a"]
    assert isinstance(verdict, Refused)
    assert (verdict.needed_bytes, verdict.forever) == (4000 * MIB, True)


def test_what_was_chosen_stays_while_it_waits_and_goes_with_the_attempt() -> None:
    leaving = instance("x", State.STOPPING, {GPU0: 9000}, since_s=NOW_S)
    snapshot = world([gpu(0, 10000)], [flexible(), model("x", 9000)], [leaving], [entry("a")])
    after = apply(snapshot, make_plan(snapshot, {}))
    assert after.instances["a"].parameters == {"context_size": 32}
    again = make_plan(after, {})
    assert "a" not in again.instances
    assert replace(after.instances["a"]).without_attempt(State.QUEUED).parameters == {}


def test_a_claim_whose_variant_is_gone_is_planned_again() -> None:
    leaving = instance("x", State.STOPPING, {GPU0: 9000}, since_s=NOW_S)
    snapshot = world([gpu(0, 10000)], [flexible(), model("x", 9000)], [leaving], [entry("a")])
    after = apply(snapshot, make_plan(snapshot, {}))
    for changed in (
        replace(flexible(), variants=flexible().variants[1:]),
        replace(flexible(), variants=(variant(32, 8001), *flexible().variants[1:])),
        model("a", 8000),
    ):
        plan = make_plan(replace(after, models={**after.models, "a": changed}), {})
        assert "planning again" in next(note.text for note in plan.notes if note.kind == "replanned")
        assert plan.instances["a"].attempt != after.instances["a"].attempt


def test_a_preview_says_what_would_be_chosen() -> None:
    snapshot = world([gpu(0, 7000)], [flexible()])
    found = preview(snapshot, {}, snapshot.models["a"])
    assert found.parameters == {"context_size": 16}
    assert found.placement == {GPU0: 6000 * MIB}
    refused = preview(world([gpu(0, 3000)], [flexible()]), {}, flexible())
    assert refused.parameters == {}
