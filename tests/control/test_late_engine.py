"""The loop over an engine that answers late, or was away for a while: nothing fails, nothing runs twice."""

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from orchestrator.control import effects
from orchestrator.control.checkup import Checkup
from orchestrator.control.loop import NotReady
from orchestrator.control.ports import Exit, Found, Kept, StartOrder
from orchestrator.control.recovery import recover
from orchestrator.core.entities import MIB, Launch, OperationState, Progress, Stop
from orchestrator.core.lifecycle import Instance, State
from orchestrator.core.verdicts import Unloaded
from tests.control.world import GPU, Process, World, model, running, turning

RETRY_S = 0.05


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(effects, "ENGINE_RETRY_S", RETRY_S)
    async with running(model("small", 300), model("other", 400)) as world:
        yield world


def is_under_way(task: str) -> bool:
    return any(known.get_name() == task for known in asyncio.all_tasks())


# --- at the start of the server


async def test_an_engine_that_answers_late_fails_neither_the_restore_nor_who_waits() -> None:
    world = World({"small": model("small", 300), "other": model("other", 400)})
    asked = world.ask("small")
    await asyncio.sleep(0)
    world.clock.now_s += 30  # no sample has reached the loop meanwhile
    async with turning(world, restore=["other"]):
        await world.turns(3)
        assert not asked.done()
        world.measure()
        (await asked).leave()
        await world.until(lambda: world.state("other") == State.READY)
        [restored] = world.loop.snapshot.operations.values()
        assert restored.state is OperationState.SUCCEEDED


async def test_devices_that_stay_unmeasured_are_told_in_the_end() -> None:
    world = World({"small": model("small", 300)})
    world.clock.now_s += 30
    async with turning(world):
        asked = world.ask("small")
        await world.waiting("small", 1)
        world.clock.now_s += 3.5
        with pytest.raises(NotReady, match="measure"):
            await asked


async def test_what_was_starting_on_a_device_that_is_gone_goes_on() -> None:
    one = model("small", 300)
    world = World({"small": one})
    world.engine.processes["x"] = Process(StartOrder("x", "small", Launch("test")), 300)
    old = Instance(
        "small", State.STARTING, attempt="x", placement={"GPU-gone": 300 * MIB}, started_at_s=990.0
    )
    kept = Kept("me", same_boot=True, instances={"small": old})
    found = [Found("x", "small", "127.0.0.1", 1)]
    async with turning(world, recover(kept, found, {"small": one}, now_s=world.clock())):
        world.measure()
        await world.until(lambda: world.state("small") == State.READY)
        assert len(world.engine.processes) == 1


async def test_who_asks_while_the_server_starts_does_not_wait_for_what_had_ended_before() -> None:
    """A start that died unseen is old news to a request of now: it is held for the next try."""
    one = model("small", 300)
    world = World({"small": one})
    old = Instance("small", State.STARTING, attempt="x", placement={GPU: 300 * MIB}, started_at_s=990.0)
    kept = Kept("me", same_boot=True, instances={"small": old})
    found = [Found("x", "small", exit=Exit(137, log_tail=("Killed",)))]
    asked = world.ask("small")
    await asyncio.sleep(0)
    async with turning(world, recover(kept, found, {"small": one}, now_s=world.clock())):
        await world.turns()
        assert world.loop.snapshot.instance("small").failures == 1
        assert not asked.done()
        await world.pass_time(1.1)
        (await asked).leave()
        assert world.loop.snapshot.instance("small").attempt != "x"


# --- away for a while


async def test_a_start_waits_for_an_engine_that_is_away(world: World) -> None:
    world.engine.problem = "Docker is away."
    asked = world.ask("small")
    await world.until(lambda: world.engine.refused)
    await world.pass_time(3600)
    assert world.state("small") == State.STARTING, "its time begins when the engine has started it"
    world.engine.problem = None
    (await asked).leave()
    assert world.loop.snapshot.instance("small").failures == 0


@pytest.mark.parametrize("is_back_for_the_stop", [True, False])
async def test_no_start_happens_after_its_stop(world: World, is_back_for_the_stop: bool) -> None:
    world.engine.problem = "Docker is away."
    load = await world.loop.load("small")
    await world.until(lambda: world.engine.refused)
    if is_back_for_the_stop:
        world.engine.problem = None
    unload = await world.loop.unload("small")
    await world.turns()
    world.engine.problem = None
    await world.at_rest("small")
    await world.until(lambda: not is_under_way("start small"))
    assert world.engine.processes == {}
    assert (await world.loop.finished(unload, 5)).operation.state is OperationState.SUCCEEDED
    assert (await world.loop.finished(load, 5)).operation.code == "model_unloaded"


async def test_no_start_happens_after_its_stop_when_the_next_one_has_begun(world: World) -> None:
    world.engine.problem = "Docker is away."
    await world.loop.load("small")
    await world.until(lambda: world.engine.refused)
    first = world.loop.snapshot.instance("small").attempt
    old_start = next(task for task in asyncio.all_tasks() if task.get_name() == "start small")
    world.engine.problem = None
    await world.loop.unload("small")
    await world.at_rest("small")
    (await world.ask("small")).leave()
    await world.until(old_start.done)
    assert first not in world.engine.processes
    assert len(world.engine.alive("small")) == 1


async def test_what_the_engine_starts_after_all_is_stopped_once_more(world: World) -> None:
    """A stop was confirmed, then the engine finished an older request: resync finds it and stops it."""
    await world.ready("small")
    [attempt] = world.engine.alive("small")
    await world.loop.unload("small")
    await world.at_rest("small")
    world.engine.processes[attempt].is_alive = True
    world.loop.effects.perform(Stop(attempt, "small", 10.0, "nobody knows this attempt"))
    await world.until(lambda: not is_under_way("stop small"))
    assert world.engine.alive("small") == []


async def test_a_stop_is_asked_for_until_the_engine_confirms_it(world: World) -> None:
    await world.ready("small")
    world.engine.problem = "Docker is away."
    await world.loop.unload("small")
    await world.until(lambda: world.engine.refused >= 2)
    assert world.state("small") == State.STOPPING
    with pytest.raises(NotReady) as caught:
        waiter = world.ask("small")
        await world.waiting("small", 1)
        await world.loop.unload("small")
        await waiter
    assert isinstance(caught.value.verdict, Unloaded)
    world.engine.problem = None
    await world.at_rest("small")
    assert world.engine.alive("small") == []


# --- an exit that is seen early


def probes() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("probe")]


async def test_no_probe_outlives_an_attempt_whose_exit_was_seen_before_its_start_was_answered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.probe.healthy.clear()
    answer, asked = asyncio.Event(), asyncio.Event()
    start = world.engine.start

    async def slow_to_answer(order: StartOrder, report: Callable[[Progress], None]) -> Found:
        found = await start(order, report)
        asked.set()
        await answer.wait()
        return found

    monkeypatch.setattr(world.engine, "start", slow_to_answer)
    waiting = world.ask("small")
    await asked.wait()
    world.engine.crash(world.engine.alive("small")[0], Exit(1))
    await world.turns(2)
    answer.set()
    await asyncio.gather(waiting, return_exceptions=True)
    await world.at_rest("small")
    await world.turns(3)
    assert probes() == []


async def test_no_probe_outlives_an_attempt_whose_exit_only_the_checkup_saw(world: World) -> None:
    world.probe.healthy.clear()
    waiting = world.ask("small")
    await world.until(probes)
    await world.until(lambda: world.loop.snapshot.instance("small").port)
    world.engine.processes[world.engine.alive("small")[0]].is_alive = False
    await Checkup(world.loop, world.engine, world.store).run()
    await asyncio.gather(waiting, return_exceptions=True)
    await world.at_rest("small")
    assert probes() == []
