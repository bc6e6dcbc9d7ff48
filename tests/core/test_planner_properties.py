"""What holds for every plan, whatever the snapshot; memory is checked against the drawn device truth."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core.claims import is_on_the_move
from orchestrator.core.draft import Draft
from orchestrator.core.entities import Start, Stop
from orchestrator.core.lifecycle import AT_REST, HAS_PROCESS, State
from orchestrator.core.planner import make_plan
from orchestrator.core.snapshot import Plan, Snapshot, apply
from orchestrator.core.victims import candidates, emptied_bytes
from tests.core.worlds import Drawn, worlds

MANY = settings(max_examples=400, deadline=None)


def occupied(after: Snapshot, drawn: Drawn, device: str) -> int:
    """Bytes that could be in use there once everything that runs or starts has grown to what it reserved."""
    reading = drawn.snapshot.sample.readings[device]
    total = drawn.foreign[device]
    for instance in after.instances.values():
        used = reading.by_attempt.get(instance.attempt or "", 0)
        if instance.state in HAS_PROCESS:
            total += max(used, instance.placement.get(device, 0))
        else:
            total += used
    return total


@MANY
@given(worlds())
def test_no_device_is_overbooked(drawn: Drawn) -> None:
    plan = make_plan(drawn.snapshot, drawn.usage)
    after = apply(drawn.snapshot, plan)
    for action in plan.actions:
        if isinstance(action, Start):
            for device in action.placement:
                limit = drawn.snapshot.devices[device].usable_bytes
                assert occupied(after, drawn, device) <= limit


@MANY
@given(worlds())
def test_busy_and_pinned_are_safe(drawn: Drawn) -> None:
    plan = make_plan(drawn.snapshot, drawn.usage)
    for action in plan.actions:
        if not isinstance(action, Stop):
            continue
        before = drawn.snapshot.instance(action.model)
        if before.state is State.READY:
            assert drawn.usage[before.attempt or ""].in_flight == 0
            assert not drawn.snapshot.is_pinned(action.model)
    for model, after in plan.instances.items():
        if after.state is State.DRAINING and after.drained_for:
            assert not drawn.snapshot.is_pinned(model)


def victims_of(before: Snapshot, plan: Plan) -> dict[str, list[str]]:
    """Models evicted in this plan, by the model that evicted them."""
    found: dict[str, list[str]] = {}
    for note in plan.notes:
        if note.kind == "evicted" and note.model:
            found.setdefault(str(note.data["by"]), []).append(note.model)
    return found


@MANY
@given(worlds())
def test_no_eviction_is_superfluous(drawn: Drawn) -> None:
    """Take back any one eviction: then the claims of this plan no longer fit on some device of its claim."""
    plan = make_plan(drawn.snapshot, drawn.usage)
    after = apply(drawn.snapshot, plan)
    for claimer, victims in victims_of(drawn.snapshot, plan).items():
        placement = after.instances[claimer].placement
        for victim in victims:
            kept = drawn.snapshot.instances[victim].placement
            leaving = surely_leaving(after) - {victim}
            assert any(
                kept.get(device, 0) > 0 and needed_there(after, drawn, device, leaving)
                for device in placement
            )


def surely_leaving(after: Snapshot) -> set[str]:
    """A drain for an unload may take minutes: nobody counts on it, so an idle model may have to go."""
    return {
        m
        for m, i in after.instances.items()
        if i.state in (State.STOPPING, State.RECLAIMING) or (i.state is State.DRAINING and i.drained_for)
    }


def needed_there(after: Snapshot, drawn: Drawn, device: str, leaving: set[str]) -> bool:
    """Does the device overflow if only those leave?"""
    reading = drawn.snapshot.sample.readings[device]
    total = drawn.foreign[device]
    for model, instance in after.instances.items():
        if model in leaving or instance.state in AT_REST:
            continue
        used = reading.by_attempt.get(instance.attempt or "", 0)
        total += max(used, instance.placement.get(device, 0))
    return total > drawn.snapshot.devices[device].usable_bytes


@MANY
@given(worlds(), st.integers(0, 1000))
def test_the_order_of_entries_and_instances_is_irrelevant(drawn: Drawn, seed: int) -> None:
    def shuffled(mapping: dict[str, object]) -> dict[str, object]:
        items = list(mapping.items())
        random.Random(seed).shuffle(items)
        return dict(items)

    other = replace(
        drawn.snapshot,
        instances=shuffled(dict(drawn.snapshot.instances)),  # type: ignore[arg-type]
        entries=shuffled(dict(drawn.snapshot.entries)),  # type: ignore[arg-type]
        models=shuffled(dict(drawn.snapshot.models)),  # type: ignore[arg-type]
    )
    one, two = make_plan(drawn.snapshot, drawn.usage), make_plan(other, drawn.usage)
    assert dict(one.instances) == dict(two.instances)
    assert set(map(str, one.actions)) == set(map(str, two.actions))
    assert dict(one.verdicts) == dict(two.verdicts)


@MANY
@given(worlds())
def test_every_request_is_placed_queued_with_a_reason_or_refused(drawn: Drawn) -> None:
    plan = make_plan(drawn.snapshot, drawn.usage)
    after = apply(drawn.snapshot, plan)
    for entry in drawn.snapshot.entries.values():
        if entry.waiters[0] in plan.verdicts:
            assert entry.model not in after.entries
            continue
        assert after.entries[entry.model].waiters == entry.waiters
        state = after.instance(entry.model).state
        assert state not in AT_REST
        if state is not State.STARTING:
            assert after.entries[entry.model].reason not in ("", "waiting for its turn")


@MANY
@given(worlds())
def test_a_refusal_evicts_nothing_for_the_refused(drawn: Drawn) -> None:
    plan = make_plan(drawn.snapshot, drawn.usage)
    refused = {v.model for v in plan.verdicts.values()}
    assert not refused & victims_of(drawn.snapshot, plan).keys()


@MANY
@given(worlds())
def test_a_plan_settles(drawn: Drawn) -> None:
    after = apply(drawn.snapshot, make_plan(drawn.snapshot, drawn.usage))
    after = replace(after, verdicts={}, notes=())
    again = make_plan(after, drawn.usage)
    assert again.actions == ()
    assert not again.verdicts


def asked(draft: Draft) -> dict[str, tuple[object, ...]]:
    """All that a draft remembers of a device, by device."""
    return {
        device: (
            draft.available(device),
            draft.projected(device),
            emptied_bytes(draft, device),
            is_on_the_move(draft, device),
            candidates(draft, device),
        )
        for device in draft.measured()
    }


@MANY
@given(worlds())
def test_what_a_draft_remembers_is_what_a_new_one_finds(drawn: Drawn) -> None:
    plan = make_plan(drawn.snapshot, drawn.usage)
    draft = Draft(drawn.snapshot, drawn.usage)
    asked(draft)
    for instance in plan.instances.values():
        draft.put(instance)
        fresh = Draft(replace(drawn.snapshot, instances=dict(draft.instances)), drawn.usage)
        assert asked(draft) == asked(fresh)
