"""The real loop over an engine in memory: counts that come back, commands that end, saves that fail."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from orchestrator.control.feed import SUBSCRIBER_LIMIT, Feed
from orchestrator.control.loop import NotReady
from orchestrator.control.ports import Changes, Exit
from orchestrator.core.entities import LOADING, Operation, OperationKind, OperationState, Progress
from orchestrator.core.errors import DeadlineExceeded, ShuttingDown, StoreError
from orchestrator.core.lifecycle import State
from orchestrator.core.verdicts import Broken, QueueFull, Refused, Unloaded
from tests.control.world import World, model, running, turning


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Room for `small` and `other` together, or for `big` alone."""
    async with running(
        model("small", 300), model("other", 400), model("big", 900), model("giant", 2000)
    ) as world:
        yield world


# --- counts


async def test_one_start_serves_all_who_wait(world: World) -> None:
    world.engine.starting.clear()
    asked = [world.ask("small") for _ in range(20)]
    await world.waiting("small", 20)
    world.engine.starting.set()
    gates = await asyncio.gather(*asked)
    assert world.in_flight("small") == 20
    assert len(world.engine.processes) == 1
    for gate in gates:
        gate.leave()
    assert world.in_flight("small") == 0
    assert world.loop.snapshot.entries == {}


async def test_a_request_to_a_ready_model_takes_no_turn(world: World) -> None:
    await world.ready("small")
    await world.turns()
    before = world.loop.snapshot
    gate = world.loop.try_enter("small")
    assert gate is not None
    assert world.in_flight("small") == 1
    gate.leave()
    assert world.in_flight("small") == 0
    assert world.loop.snapshot is before


async def test_a_waiter_that_is_cancelled_leaves_the_load_to_the_others(world: World) -> None:
    world.engine.starting.clear()
    leaver, stayer = world.ask("small"), world.ask("small")
    await world.waiting("small", 2)
    leaver.cancel()
    await world.waiting("small", 1)
    world.engine.starting.set()
    gate = await stayer
    assert leaver.cancelled()
    assert world.in_flight("small") == 1
    gate.leave()
    assert world.in_flight("small") == 0


async def test_a_load_goes_on_when_everyone_who_asked_has_left(world: World) -> None:
    world.engine.starting.clear()
    leaver = world.ask("small")
    await world.until(lambda: world.engine.starts_held)
    leaver.cancel()
    await world.waiting("small", 0)
    world.engine.starting.set()
    await world.until(lambda: world.state("small") == State.READY)
    assert world.in_flight("small") == 0


async def test_a_queue_entry_without_waiters_is_dropped(world: World) -> None:
    await world.ready("small")
    busy = world.loop.try_enter("small")
    assert busy is not None
    leaver = world.ask("big")
    await world.waiting("big", 1)
    assert world.state("big") == State.QUEUED
    leaver.cancel()
    await world.until(lambda: world.state("big") == State.STOPPED)
    busy.leave()
    await world.turns(2)
    assert world.engine.alive("small")
    assert not world.engine.alive("big")


async def test_cancelled_while_the_admission_is_saved(world: World) -> None:
    """Between the plan that lets it in and the delivery."""
    world.probe.healthy.clear()
    leaver, stayer = world.ask("small"), world.ask("small")
    await world.waiting("small", 2)

    def cancel(changes: Changes) -> None:
        instance = changes.instances.get("small")
        if instance is not None and instance.state is State.READY:
            leaver.cancel()

    world.store.before_save = cancel
    world.probe.healthy.set()
    gate = await stayer
    await asyncio.gather(leaver, return_exceptions=True)
    assert leaver.cancelled()
    assert world.in_flight("small") == 1
    gate.leave()
    assert world.in_flight("small") == 0


async def test_cancelled_at_the_moment_of_admission(world: World) -> None:
    """It has its gate, and has not run since: the gate is left for it."""
    world.probe.healthy.clear()
    counted: list[int] = []

    async def first() -> None:
        gate = await world.loop.wait_ready("small", world.clock() + 60)
        counted.append(world.in_flight("small"))
        leaver.cancel()
        gate.leave()

    asked = asyncio.create_task(first())
    await world.waiting("small", 1)
    leaver = world.ask("small")
    await world.waiting("small", 2)
    world.probe.healthy.set()
    await asked
    await asyncio.gather(leaver, return_exceptions=True)
    assert counted == [2]
    assert leaver.cancelled()
    assert world.in_flight("small") == 0


async def test_cancelled_in_flight(world: World) -> None:
    async def use() -> None:
        gate = await world.loop.wait_ready("small", world.clock() + 60)
        try:
            await asyncio.Event().wait()
        finally:
            gate.leave()

    users = [asyncio.create_task(use()) for _ in range(3)]
    await world.until(lambda: world.in_flight("small") == 3)
    for left, user in enumerate(users):
        user.cancel()
        await asyncio.gather(user, return_exceptions=True)
        assert world.in_flight("small") == 2 - left


@pytest.mark.parametrize("steps", range(5))
async def test_the_deadline_that_passes_while_it_is_let_in_leaks_no_count(world: World, steps: int) -> None:
    """Whichever comes first, the deadline's timer or the delivery, the count comes back."""
    world.probe.healthy.clear()
    stayer = world.ask("small")
    await world.waiting("small", 1)
    hurried = world.ask("small", seconds=0.03)
    await world.waiting("small", 2)
    due_s = time.monotonic() + 0.03

    async def pass_the_deadline(changes: Changes) -> None:
        instance = changes.instances.get("small")
        if instance is not None and instance.state is State.READY:
            time.sleep(max(0.0, due_s - time.monotonic()) + 0.005)  # noqa: ASYNC251 (the loop is held up)
            for _ in range(steps):
                await asyncio.sleep(0)

    world.store.before_save = pass_the_deadline
    world.probe.healthy.set()
    gate = await stayer
    [outcome] = await asyncio.gather(hurried, return_exceptions=True)
    if isinstance(outcome, DeadlineExceeded):
        assert world.in_flight("small") == 1
    else:
        assert not isinstance(outcome, BaseException)
        assert world.in_flight("small") == 2
        outcome.leave()
    gate.leave()
    assert world.in_flight("small") == 0
    await world.turns(2)
    assert world.loop.snapshot.entries == {}


async def test_a_wait_that_reaches_its_deadline_says_what_it_waited_for(world: World) -> None:
    world.engine.starting.clear()
    with pytest.raises(DeadlineExceeded) as caught:
        await world.ask("small", seconds=0.01)
    assert "it is starting" in caught.value.message
    await world.waiting("small", 0)


async def test_counts_of_a_crashed_attempt_do_not_reach_the_next(world: World) -> None:
    old = await world.ask("small")
    [attempt] = world.engine.alive("small")
    world.engine.crash(attempt, Exit(9, log_tail=("boom",)))
    await world.until(old.closed.is_set)
    await world.at_rest("small")
    await world.pass_time(2.0)
    new = await world.ask("small")
    assert world.in_flight("small") == 1
    old.leave()
    assert world.in_flight("small") == 1
    new.leave()
    assert world.in_flight("small") == 0


async def test_the_queue_has_a_limit() -> None:
    async with running(model("small", 300, queue_limit=2)) as world:
        world.engine.starting.clear()
        asked = [world.ask("small") for _ in range(2)]
        await world.waiting("small", 2)
        with pytest.raises(NotReady) as caught:
            await world.ask("small")
        assert caught.value.verdict == QueueFull("small", 2)
        world.engine.starting.set()
        for gate in await asyncio.gather(*asked):
            gate.leave()
        assert world.in_flight("small") == 0


async def test_a_model_that_becomes_quiet_while_a_turn_is_saved_is_seen_to_be(world: World) -> None:
    """The turn that queues a waiter has counted it as busy: another one follows at once."""
    gate = await world.ask("small")
    await world.pass_time(1.0)
    is_saving, may_go_on = asyncio.Event(), asyncio.Event()

    async def hold(changes: Changes) -> None:
        is_saving.set()
        await may_go_on.wait()

    world.store.before_save = hold
    asked = world.ask("big", seconds=1000)
    await is_saving.wait()
    gate.leave()
    world.clock.now_s += 1  # and it stays so; nobody measures or asks meanwhile
    world.store.before_save = None
    may_go_on.set()
    await world.until(lambda: not world.engine.alive("small"))
    world.measure()
    (await asked).leave()


# --- what is refused, and what fails


async def test_what_can_never_fit_is_refused_with_numbers_and_evicts_nobody(world: World) -> None:
    await world.idle("small")
    with pytest.raises(NotReady) as caught:
        await world.ask("giant")
    verdict = caught.value.verdict
    assert isinstance(verdict, Refused)
    assert verdict.forever
    assert verdict.needed_bytes > verdict.capacity_bytes > 0
    assert world.engine.alive("small")


async def test_a_failed_start_tells_everyone_why(world: World) -> None:
    world.probe.healthy.clear()
    asked = [world.ask("small") for _ in range(3)]
    await world.until(lambda: world.engine.alive("small"))
    [attempt] = world.engine.alive("small")
    world.engine.crash(attempt, Exit(3, log_tail=("no such file",)))
    for outcome in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(outcome, NotReady)
        assert isinstance(outcome.verdict, Broken)
        assert outcome.verdict.failure.exit_code == 3
        assert outcome.verdict.failure.log_tail == ("no such file",)
    await world.at_rest("small")
    assert world.state("small") == State.FAILED


# --- loads and unloads that cross


async def test_a_stop_during_a_start(world: World) -> None:
    world.engine.starting.clear()
    waiter = world.ask("small")
    await world.until(lambda: world.engine.starts_held)
    unload = await world.loop.unload("small")
    assert unload.operation.state is OperationState.RUNNING
    with pytest.raises(NotReady) as caught:
        await waiter
    assert isinstance(caught.value.verdict, Unloaded)
    world.engine.starting.set()
    await world.at_rest("small")
    ended = await world.loop.finished(unload, 5)
    assert ended.operation.state is OperationState.SUCCEEDED
    assert world.state("small") == State.STOPPED
    assert world.engine.used_mib() == 0


async def test_a_stop_between_the_start_and_the_first_healthy_answer(world: World) -> None:
    world.probe.healthy.clear()
    load = await world.loop.load("small")
    await world.until(lambda: world.engine.alive("small"))
    unload = await world.loop.unload("small")
    world.probe.healthy.set()
    await world.at_rest("small")
    assert (await world.loop.finished(unload, 5)).operation.state is OperationState.SUCCEEDED
    assert (await world.loop.finished(load, 5)).operation.code == "model_unloaded"
    assert world.engine.alive("small") == []
    assert world.state("small") == State.STOPPED


async def test_what_the_health_path_said_last_is_known_until_it_is_healthy(world: World) -> None:
    world.probe.healthy.clear()
    for said in ("nobody listens there", "HTTP 404", "HTTP 503", "HTTP 503"):
        world.probe.says.put_nowait(said)
    load = await world.loop.load("small")
    said_last = [Progress(LOADING, detail="HTTP 503")]
    await world.until(lambda: [*world.loop.snapshot.progress.values()] == said_last)
    await world.until(world.probe.says.empty)
    await world.turns(2)
    assert [*world.loop.snapshot.progress.values()] == said_last
    world.probe.healthy.set()
    assert (await world.loop.finished(load, 5)).operation.state is OperationState.SUCCEEDED
    assert world.loop.snapshot.progress == {}


async def test_a_load_while_it_stops_queues_and_starts_afterwards(world: World) -> None:
    await world.ready("small")
    [first] = world.engine.alive("small")
    world.measure()
    world.engine.stopping.clear()
    world.engine.lingers = True
    unload = await world.loop.unload("small")
    await world.until(lambda: world.engine.stops_held)
    load = await world.loop.load("small")
    await world.turns(2)
    assert world.state("small") == State.STOPPING
    assert world.engine.alive("small") == [first]

    world.engine.stopping.set()
    await world.until(lambda: world.state("small") == State.RECLAIMING)
    world.measure()
    await world.turns(2)
    assert world.engine.alive("small") == [], "it started before its memory was seen free"
    assert world.state("small") == State.RECLAIMING
    assert not (await world.loop.finished(unload, 0)).operation.ended_at

    world.engine.give_back()
    world.measure()
    assert (await world.loop.finished(unload, 5)).operation.state is OperationState.SUCCEEDED
    world.measure()
    assert (await world.loop.finished(load, 5)).operation.state is OperationState.SUCCEEDED
    [second] = world.engine.alive("small")
    assert second != first


async def test_an_unload_of_a_queued_model_ends_its_waiters(world: World) -> None:
    await world.ready("small")
    busy = world.loop.try_enter("small")
    assert busy is not None
    asked = [world.ask("big") for _ in range(3)]
    await world.waiting("big", 3)
    load = await world.loop.load("big")
    unload = await world.loop.unload("big", hold_s=600)
    assert unload.operation.state is OperationState.SUCCEEDED
    for outcome in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(outcome, NotReady)
        assert isinstance(outcome.verdict, Unloaded)
        assert outcome.verdict.held_until_s == pytest.approx(world.clock() + 600)
    assert (await world.loop.finished(load, 5)).operation.state is OperationState.FAILED
    with pytest.raises(NotReady):  # still kept out
        await world.ask("big")
    busy.leave()
    assert world.in_flight("small") == 0
    assert world.engine.alive("small")


async def test_loads_of_one_model_join_one_start(world: World) -> None:
    world.engine.starting.clear()
    loads = [await world.loop.load("small") for _ in range(3)]
    world.engine.starting.set()
    for load in loads:
        assert (await world.loop.finished(load, 5)).operation.state is OperationState.SUCCEEDED
    assert len(world.engine.processes) == 1


async def test_an_idle_model_makes_room_and_its_memory_is_waited_for(world: World) -> None:
    await world.idle("small")
    world.engine.lingers = True
    asked = world.ask("big")
    await world.until(lambda: not world.engine.alive("small"))
    world.measure()
    await world.turns(3)
    assert world.engine.alive("big") == [], "it started into memory that the device still showed as used"
    world.engine.give_back()
    world.measure()
    gate = await asked
    gate.leave()
    assert world.engine.used_mib() == 900


async def test_a_busy_model_is_drained_not_cut(world: World) -> None:
    await world.ready("small")
    busy = world.loop.try_enter("small")
    assert busy is not None
    unload = await world.loop.unload("small")
    assert world.state("small") == State.DRAINING
    assert world.loop.try_enter("small") is None
    await world.turns(2)
    assert world.engine.alive("small")
    busy.leave()
    await world.at_rest("small")
    assert (await world.loop.finished(unload, 5)).operation.state is OperationState.SUCCEEDED


# --- a store that fails


async def test_who_came_while_it_drained_is_let_in_when_it_stays() -> None:
    async with running(model("small", 300), model("big", 900)) as world:
        await world.ready("small")
        busy = world.loop.try_enter("small")
        assert busy is not None
        await world.pass_time(12.0)
        rival = world.ask("big")
        await world.until(lambda: world.state("small") == State.DRAINING)
        load = await world.loop.load("small")
        waiting = world.ask("small", seconds=1000)
        await world.waiting("small", 2)
        await world.loop.unload("big")  # its claim is withdrawn, so the drain relents
        await world.until(lambda: rival.done())
        await world.until(lambda: world.state("small") == State.READY)
        await world.turns(3)
        busy.leave()
        await world.pass_time(1.0)
        await world.turns(3)
        ended = await world.loop.finished(load, 0)
        left = world.loop.snapshot.entries
        waiting.cancel()
        rival.exception()
        assert ended.operation.state is OperationState.SUCCEEDED, left


async def test_a_command_that_cannot_be_saved_is_refused_and_not_done(world: World) -> None:
    await world.ready("small")
    world.store.problem = "the disk is full"
    for command in (world.loop.load("other"), world.loop.unload("small")):
        with pytest.raises(StoreError, match="the disk is full"):
            await command
    assert world.engine.alive("other") == []
    assert world.engine.alive("small")
    assert world.loop.store_problem == "the disk is full"


async def test_gates_that_were_closed_for_an_unsaved_plan_open_again(world: World) -> None:
    await world.idle("small")
    world.store.problem = "the disk is full"
    refused = world.store.refused
    with pytest.raises(StoreError):
        await world.loop.unload("small")
    assert world.store.refused > refused
    gate = world.loop.try_enter("small")
    assert gate is not None
    assert gate.is_open
    assert not gate.closed.is_set()
    assert world.in_flight("small") == 1
    gate.leave()
    assert world.in_flight("small") == 0


async def test_a_victim_of_an_unsaved_plan_serves_on(world: World) -> None:
    await world.idle("small")
    world.store.problem = "the disk is full"
    asked = world.ask("big")
    await world.until(lambda: world.store.refused)
    gate = world.loop.try_enter("small")
    assert gate is not None
    gate.leave()
    assert world.engine.stops_held == set()
    assert world.engine.alive("small")

    world.store.problem = None
    world.clock.now_s += 2
    world.measure()
    await world.until(lambda: not world.engine.alive("small"))
    world.measure()
    (await asked).leave()
    assert world.loop.store_problem is None


async def test_what_is_seen_counts_even_if_it_cannot_be_saved(world: World) -> None:
    await world.ready("small")
    [attempt] = world.engine.alive("small")
    world.store.problem = "the disk is full"
    world.engine.crash(attempt, Exit(9))
    await world.until(lambda: world.state("small") == State.RECLAIMING)
    assert world.loop.try_enter("small") is None
    await world.at_rest("small")
    assert world.state("small") == State.FAILED

    world.store.problem = None
    await world.pass_time(2.0)
    await world.ready("small")
    await world.until(lambda: world.store.rows["small"].state is State.READY)
    assert world.store.rows["small"].attempt != attempt


async def test_a_start_that_became_healthy_while_nothing_can_be_saved_serves(world: World) -> None:
    world.probe.healthy.clear()
    asked = world.ask("small")
    await world.until(lambda: world.engine.alive("small"))
    world.store.problem = "the disk is full"
    world.probe.healthy.set()
    gate = await asked
    assert world.in_flight("small") == 1
    gate.leave()
    world.store.problem = None
    await world.turns(2)
    await world.until(lambda: world.store.rows["small"].state is State.READY)


async def test_a_request_held_while_nothing_can_be_saved_is_served_later(world: World) -> None:
    world.store.problem = "the disk is full"
    asked = world.ask("small")
    await world.until(lambda: world.store.refused)
    await world.turns(2)
    assert not asked.done()
    assert world.engine.processes == {}
    world.store.problem = None
    await world.turns()
    gate = await asked
    assert world.in_flight("small") == 1
    gate.leave()
    assert world.in_flight("small") == 0
    assert len(world.engine.processes) == 1


async def test_a_load_that_ends_while_nothing_can_be_saved_has_ended(world: World) -> None:
    world.probe.healthy.clear()
    load = await world.loop.load("small")
    await world.until(lambda: world.engine.alive("small"))
    ending = asyncio.create_task(world.loop.finished(load, 60))
    world.store.problem = "the disk is full"
    world.probe.healthy.set()
    await world.until(lambda: world.state("small") == State.READY)
    assert (await ending).operation.state is OperationState.SUCCEEDED
    world.store.problem = None
    await world.turns(2)
    assert world.store.operations[load.operation.id].state is OperationState.SUCCEEDED


async def test_a_load_that_fails_while_nothing_can_be_saved_has_failed(world: World) -> None:
    world.probe.healthy.clear()
    load = await world.loop.load("small")
    await world.until(lambda: world.engine.alive("small"))
    [attempt] = world.engine.alive("small")
    world.store.problem = "the disk is full"
    world.engine.crash(attempt, Exit(3))
    ended = await world.loop.finished(load, 5)
    assert ended.operation.state is OperationState.FAILED
    assert isinstance(ended.verdict, Broken)


async def test_what_is_asked_anew_after_a_restart_is_asked_until_it_can_be_saved() -> None:
    """The restore, and the operations of before; nobody is there to be told that the disk was full."""
    world = World({name: model(name, 100) for name in ("restored", "loading", "unloading")})
    kinds = {"loading": OperationKind.LOAD, "unloading": OperationKind.UNLOAD}
    kept = {name: Operation(name, kind, name, created_at=1.0) for name, kind in kinds.items()}
    world.loop._snapshot = replace(world.loop.snapshot, operations=kept)
    world.store.problem = "the disk is full"
    async with turning(world, restore=["restored"]):
        world.measure()
        await world.until(lambda: world.store.refused)
        await world.turns()
        assert world.engine.processes == {}
        world.store.problem = None
        await world.pass_time(2.0)
        await world.until(lambda: world.state("restored") == world.state("loading") == State.READY)
        assert world.state("unloading") == State.STOPPED
        operations = world.loop.snapshot.operations.values()
        assert [o.state for o in operations] == [OperationState.SUCCEEDED] * 3


async def test_an_unload_of_before_a_restart_does_not_stop_what_was_loaded_later() -> None:
    world = World({"small": model("small", 300)})
    old = Operation("old", OperationKind.UNLOAD, "small", created_at=1.0)
    world.loop._snapshot = replace(world.loop.snapshot, operations={"old": old})
    world.store.problem = "the disk is full"
    async with turning(world):
        world.measure()
        await world.until(lambda: world.store.refused)  # it is put off for a second
        world.store.problem = None
        await world.ready("small")  # asked later, and served before
        await world.pass_time(2.0)
        await world.turns(2)
        assert world.engine.alive("small"), "the older unload stopped the newer load"


async def test_what_could_not_be_saved_is_not_tried_again_without_a_pause() -> None:
    world = World({"small": model("small", 300)})
    world.store.problem = "the disk is full"
    async with turning(world, restore=["small"]):
        world.measure()
        await world.until(lambda: world.store.refused)
        for _ in range(100):
            await asyncio.sleep(0)
        assert world.store.refused <= 3


async def test_nothing_starts_before_it_is_remembered(world: World) -> None:
    saving = asyncio.Event()

    async def hold(changes: Changes) -> None:
        if changes.instances:
            await saving.wait()

    world.store.before_save = hold
    asked = world.ask("small")
    await world.until(lambda: len(world.loop.inbox) == 0)
    for _ in range(50):
        await asyncio.sleep(0)
    assert world.engine.starts_held == set()
    assert world.engine.processes == {}
    saving.set()
    (await asked).leave()
    [attempt] = world.engine.processes
    assert world.store.rows["small"].attempt == attempt


# --- the end


async def test_closing_ends_every_wait(world: World) -> None:
    world.engine.starting.clear()
    waiter = world.ask("small")
    load = await world.loop.load("small")
    ending = asyncio.create_task(world.loop.finished(load, 60))
    await world.waiting("small", 2)
    await world.turns()
    world.loop.close()
    for task in (waiter, ending):
        with pytest.raises(ShuttingDown):
            await task
    for late in (world.loop.load("small"), world.loop.wait_ready("small", world.clock() + 1)):
        with pytest.raises(ShuttingDown):
            await late


# --- who watches


async def test_a_subscriber_that_falls_behind_is_cut_off_and_the_others_are_not() -> None:
    feed = Feed(first_id=0)
    with feed.subscribe() as slow, feed.subscribe() as quick:
        quick_messages = quick.messages(tick_s=5)
        for number in range(SUBSCRIBER_LIMIT + 10):
            feed.publish("log", {"number": number})
            message = await anext(quick_messages)
            assert message is not None
            assert message.data == {"number": number}
        got = [message async for message in slow.messages(tick_s=5)]
        assert [m.data["number"] for m in got if m] == list(range(SUBSCRIBER_LIMIT))
        last = got[-1]
        assert last is not None
        assert feed.since(last.id) is not None, "what it missed is still kept, so it may resume"
        assert feed.since(1) is None, "what is no longer kept must not be passed over in silence"
    assert not feed.is_watched


async def test_status_events_tell_each_change_once(world: World) -> None:
    told: list[dict[str, object]] = []

    async def watch() -> None:
        with world.loop.feed.subscribe() as changes:
            watching.set()
            async for message in changes.messages(tick_s=60):
                if message is not None and message.topic == "status":
                    told.append(dict(message.data["data"]))  # type: ignore[call-overload]

    watching = asyncio.Event()
    watcher = asyncio.create_task(watch())
    await watching.wait()
    await world.ready("small")
    await world.until(lambda: any(data["status"] == "loaded" for data in told))
    words = [data["status"] for data in told]
    assert words == ["loading", "loaded"]
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)
