"""Learning through the real loop: what is measured is saved and counts, and memory that was short is made."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from orchestrator.control.loop import NotReady
from orchestrator.control.ports import Exit
from orchestrator.core.entities import MIB, Demand, Model, Recipe
from orchestrator.core.errors import StoreError
from orchestrator.core.lifecycle import State
from orchestrator.core.verdicts import Broken
from tests.control.world import GPU, World, model, running

RECIPE = Recipe("file", "service", 8192, 999, 4, "f16", "f16", 1)
NO_ROOM = Exit(1, log_tail=("loading", "CUDA error: out of memory"))


def predicted(name: str, mib: int, content: str) -> Model:
    demand = Demand(mib * MIB, source="predicted")
    return replace(model(name, mib), demand=demand, recipe=replace(RECIPE, content=content))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Of 1000 MiB `one` and `twin` (the same file) are said to take 500, and `other` 500."""
    models = predicted("one", 500, "f"), predicted("twin", 500, "f"), predicted("other", 500, "g")
    async with running(*models) as world:
        yield world


def footprint(world: World, name: str) -> tuple[str, int]:
    demand = world.loop.snapshot.models[name].demand
    return demand.source, demand.gpu_bytes // MIB


async def gone(world: World, name: str) -> None:
    await world.loop.unload(name)
    await world.at_rest(name)


async def test_what_a_load_showed_is_saved_and_counts_for_all_of_its_recipe(world: World) -> None:
    world.engine.sizes_mib = {"one": 420, "twin": 420, "other": 500}
    await world.idle("one")
    assert footprint(world, "one") == footprint(world, "twin") == ("measured", 420)
    assert footprint(world, "other") == ("predicted", 500)
    await world.turns()
    assert world.store.learned == world.loop.snapshot.learned
    await gone(world, "one")
    await world.ready("twin")
    assert world.loop.snapshot.instance("twin").placement == {GPU: 420 * MIB}


async def test_an_odd_load_counts_for_nothing_until_it_is_seen_again(world: World) -> None:
    world.engine.sizes_mib = {"one": 100, "twin": 100, "other": 500}
    await world.idle("one")
    assert footprint(world, "one") == ("predicted", 500)
    await gone(world, "one")
    await world.idle("one")
    assert footprint(world, "one") == ("measured", 100)


async def test_what_was_learned_while_the_store_failed_is_saved_later(world: World) -> None:
    world.engine.sizes_mib = {"one": 420, "twin": 420, "other": 500}
    await world.ready("one")
    world.store.problem = "the disk is full"
    await world.pass_time(1.0)
    assert footprint(world, "one") == ("measured", 420)
    assert world.store.learned == {}
    world.store.problem = None
    await world.pass_time(2.0)
    assert [row.loads[0].peak_bytes for row in world.store.learned.values() if row] == [420 * MIB]


async def starting(world: World, name: str) -> str:
    """Wait until a start of it is under way, and return its attempt."""

    def is_alive() -> bool:
        world.measure()
        return bool(world.engine.alive(name))

    await world.until(is_alive)
    await world.until(lambda: world.loop.snapshot.instance(name).port is not None)
    (attempt,) = world.engine.alive(name)
    return attempt


async def test_a_start_that_had_no_room_is_tried_again_with_more_and_makes_room(world: World) -> None:
    await world.idle("other")
    world.probe.healthy.clear()
    asked = world.ask("one")
    first = await starting(world, "one")
    world.engine.crash(first, NO_ROOM)
    await world.until(lambda: world.loop.snapshot.instance("one").failure)
    await world.pass_time(1.5)
    second = await starting(world, "one")
    assert not asked.done()
    assert world.loop.snapshot.instance("one").placement == {GPU: 756 * MIB}
    assert not world.engine.alive("other"), "what was promised now needs its room"
    world.probe.healthy.set()
    gate = await asked
    gate.leave()
    assert second != first
    assert world.loop.snapshot.instance("one").failure is None
    await world.pass_time(0.5)
    assert footprint(world, "one") == ("measured", 500), "the truth clears the floor"


async def test_a_second_start_without_room_is_a_failure(world: World) -> None:
    world.probe.healthy.clear()
    asked = world.ask("one")
    first = await starting(world, "one")
    world.engine.crash(first, NO_ROOM)
    await world.until(lambda: world.loop.snapshot.instance("one").failure)
    await world.pass_time(1.5)
    world.engine.crash(await starting(world, "one"), NO_ROOM)
    await world.until(lambda: world.loop.snapshot.instance("one").failures == 2)
    assert "one" not in world.loop.snapshot.entries, "nobody is kept waiting for a third"
    with pytest.raises(NotReady) as caught:
        await asyncio.wait_for(asked, 5)
    assert isinstance(caught.value.verdict, Broken)
    assert caught.value.verdict.failure.code == "gpu_out_of_memory"
    assert "too little memory" in caught.value.verdict.failure.message
    await world.at_rest("one")
    assert world.state("one") == State.FAILED


@pytest.mark.parametrize(
    "exit_",
    [Exit(1, log_tail=("no such file",)), Exit(137, oom=True, log_tail=("out of memory",)), Exit(0)],
    ids=["another reason", "the machine's RAM", "no failure code"],
)
async def test_any_other_end_of_a_start_is_told_at_once(world: World, exit_: Exit) -> None:
    world.probe.healthy.clear()
    asked = world.ask("one")
    world.engine.crash(await starting(world, "one"), exit_)
    with pytest.raises(NotReady):
        await asyncio.wait_for(asked, 5)
    assert world.loop.snapshot.learned == {}
    assert footprint(world, "one") == ("predicted", 500)


async def test_what_is_forgotten_is_gone_from_the_store_too(world: World) -> None:
    world.engine.sizes_mib = {"one": 420, "twin": 420, "other": 500}
    await world.idle("one")
    await gone(world, "one")
    await world.loop.forget(world.loop.snapshot.learned)
    assert world.loop.snapshot.learned == {}
    assert [row for row in world.store.learned.values() if row] == []
    assert footprint(world, "one") == footprint(world, "twin") == ("predicted", 500)


async def test_what_cannot_be_forgotten_in_the_store_stays(world: World) -> None:
    world.engine.sizes_mib = {"one": 420, "twin": 420, "other": 500}
    await world.idle("one")
    await gone(world, "one")
    known = dict(world.loop.snapshot.learned)
    world.store.problem = "the disk is full"
    with pytest.raises(StoreError, match="the disk is full"):
        await world.loop.forget(known)
    assert world.loop.snapshot.learned == known
    world.store.problem = None
    await world.pass_time(2.0)
    assert world.loop.snapshot.learned == known
    assert footprint(world, "one") == ("measured", 420)
