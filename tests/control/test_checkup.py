"""The periodic look at everything, over the real loop: what it tells, what it corrects, and how often."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.control.checkup import Checkup
from orchestrator.control.ports import StartOrder
from orchestrator.core.entities import Launch
from orchestrator.core.errors import StoreError
from orchestrator.core.lifecycle import State
from tests.control.world import Process, World, model, running


def notes(world: World) -> list[str]:
    return [note.text for note in world.store.notes if note.kind == "difference"]


async def test_an_exit_that_nobody_told_is_said_and_corrected() -> None:
    async with running(model("a", 600)) as world:
        gate = await world.ready("a")
        checkup = Checkup(world.loop, world.engine, world.store)
        await checkup.run()
        assert checkup.differences == ()
        world.engine.processes[gate.instance.attempt or ""].is_alive = False
        await checkup.run()
        await world.until(lambda: world.state("a") != State.READY)
        await world.until(lambda: notes(world))
        assert notes(world) == ["self-check: 'a' is ready, but the engine does not run it"]


async def test_what_nobody_knows_is_said_and_stopped() -> None:
    async with running(model("a", 600)) as world:
        await world.ready("a")
        [order] = [process.order for process in world.engine.processes.values()]
        stray = replace(order, attempt="stray")
        world.engine.processes["stray"] = Process(stray, 0)
        await Checkup(world.loop, world.engine, world.store).run()
        await world.until(lambda: not world.engine.processes["stray"].is_alive)
        await world.until(lambda: notes(world))
        assert notes(world) == ["self-check: the engine runs an attempt of 'a' that nobody knows"]


async def test_nothing_of_a_model_starts_beside_a_stray_that_is_being_stopped() -> None:
    async with running(model("a", 300)) as world:
        gate = await world.ready("a")
        order = world.engine.processes[gate.instance.attempt or ""].order
        await world.loop.finished(await world.loop.unload("a"), 0)
        await world.at_rest("a")
        world.engine.processes["stray"] = Process(replace(order, attempt="stray"), 300)
        world.engine.stopping.clear()
        await Checkup(world.loop, world.engine, world.store).run()
        asked = world.ask("a")
        await world.waiting("a", 1)
        await world.turns(3)
        assert world.engine.alive("a") == ["stray"]
        world.engine.stopping.set()
        await world.until(lambda: world.measure() or asked.done())
        assert "stray" not in world.engine.alive("a")
        (await asked).leave()


async def test_a_difference_is_told_once_while_it_lasts() -> None:
    async with running(model("a", 600)) as world:
        gate = await world.ready("a")
        checkup = Checkup(world.loop, world.engine, world.store)
        process = world.engine.processes[gate.instance.attempt or ""]
        for used_mib in (700, 710, 600, 720):
            process.used_mib = used_mib
            await world.pass_time(1.0)
            await checkup.run()
        await world.until(lambda: len(notes(world)) == 2)
        assert "700 MiB" in notes(world)[0]
        assert "720 MiB" in notes(world)[1], "it had gone in between"


async def test_a_store_that_lost_a_row_is_noticed() -> None:
    async with running(model("a", 600)) as world:
        await world.ready("a")
        world.store.rows.pop("a")
        await Checkup(world.loop, world.engine, world.store).run()
        await world.until(lambda: notes(world))
        assert notes(world) == ["self-check: 'a' is ready, but the store remembers it as stopped"]


async def test_an_engine_that_does_not_answer_changes_nothing() -> None:
    async with running(model("a", 600)) as world:
        await world.ready("a")
        world.engine.problem = "it is away"
        checkup = Checkup(world.loop, world.engine, world.store)
        await checkup.run()
        assert (checkup.differences, world.state("a")) == ((), State.READY)


async def test_a_store_that_cannot_be_read_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(model("a", 600)) as world:
        await world.ready("a")

        async def unreadable() -> dict[str, object]:
            raise StoreError("the disk is gone")

        monkeypatch.setattr(world.store, "instances", unreadable)
        checkup = Checkup(world.loop, world.engine, world.store)
        await checkup.run()
        assert checkup.differences == ()


async def test_what_somebody_else_has_started_and_lends_is_taken_over() -> None:
    async with running(model("a", 600), model("b", 600)) as world:
        theirs = StartOrder("lent-1", "a", Launch("test"))
        world.engine.processes["lent-1"] = Process(theirs, 600, is_lent=True)
        await world.pass_time(1)
        await Checkup(world.loop, world.engine, world.store).run()
        gate = await world.ask("a")
        assert gate.instance.attempt == "lent-1"
        assert notes(world) == []
        gate.leave()
        await world.pass_time(1)
        asked = world.ask("b")
        await world.until(lambda: world.measure() or asked.done())
        (await asked).leave()
        assert world.engine.alive("a") == [], "it makes room like any other"
        assert world.engine.most_used_mib == 600


async def test_what_is_lent_is_not_taken_while_the_model_runs_elsewhere() -> None:
    async with running(model("a", 300)) as world:
        gate = await world.ready("a")
        ours = gate.instance.attempt or ""
        lent = replace(world.engine.processes[ours].order, attempt="lent-1")
        world.engine.processes["lent-1"] = Process(lent, 300, is_lent=True)
        checkup = Checkup(world.loop, world.engine, world.store)
        await checkup.run()
        await world.turns(2)
        assert sorted(world.engine.alive("a")) == sorted([ours, "lent-1"]), "neither was stopped"
        assert world.loop.snapshot.instance("a").attempt == ours


async def test_what_is_lent_is_left_alone_while_its_model_is_held_out() -> None:
    async with running(model("a", 600)) as world:
        await world.loop.unload("a", hold_s=3600)
        theirs = StartOrder("lent-1", "a", Launch("test"))
        world.engine.processes["lent-1"] = Process(theirs, 600, is_lent=True)
        checkup = Checkup(world.loop, world.engine, world.store)
        await checkup.run()
        await world.turns(3)
        assert world.state("a") == State.STOPPED
        assert world.engine.alive("a") == ["lent-1"], "it is its owner's to end"
        await world.pass_time(3601)
        await checkup.run()
        (await world.ask("a")).leave()
        assert world.loop.snapshot.instance("a").attempt == "lent-1"
