"""`kill -9` of a process that writes, at random moments: what it was told is saved is there."""

import asyncio
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

from orchestrator.control.ports import Changes
from orchestrator.core.entities import Note, Operation, OperationKind
from orchestrator.core.lifecycle import Instance, State
from orchestrator.store.backup import check
from orchestrator.store.copies import copies_of, copy_problem
from orchestrator.store.repository import SqliteStore, open_store
from tests.store.conftest import Opener

KILLS = 10
WRITING_S = (0.05, 0.8)  # how long each process writes before it is killed
MODELS = 5


def turn(number: int) -> Changes:
    """Rows of two tables that belong together: each holds the number."""
    name = f"m{number % MODELS}"
    state = random.choice([State.CLAIMED, State.READY, State.STOPPED])
    instance = Instance(name, state, attempt=f"a{number}", load_time_s=float(number), stop_reason="x" * 300)
    operation = Operation(f"op-{name}", OperationKind.LOAD, name, float(number), message="x" * 300)
    return Changes({name: instance}, {operation.id: operation})


def write(path: Path, first: int, told: Connection) -> None:
    """In a process of its own: save, log, copy and prune, and tell each number once it is saved."""

    async def work() -> None:
        store, _ = open_store(path, "boot-1", time.time)
        others: set[asyncio.Task[object]] = set()
        for number in range(first, first + 1_000_000):
            await store.save(turn(number))
            await store.log((Note("k", str(number)),))
            told.send(number)
            if number % 25 == 0:
                others = {task for task in others if not task.done()}
                others.add(asyncio.create_task(store.back_up()))
                others.add(asyncio.create_task(prune(store)))

    asyncio.run(work())


async def prune(store: SqliteStore) -> None:
    await store.prune(keep_events=500, keep_operations=2, keep_attempts=20)


def newest_told(told: Connection, first: int) -> int:
    newest = first - 1
    try:
        while told.poll():
            newest = told.recv()
    except EOFError:
        pass
    return newest


def killed_writer(path: Path, first: int) -> int:
    """Let a process write from this number on, kill it at some moment; the last number it told."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=write, args=(path, first, theirs))
    process.start()
    theirs.close()
    assert ours.poll(30), "nothing was saved"
    time.sleep(random.uniform(*WRITING_S))  # the moment is meant to be any
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    newest = newest_told(ours, first)
    ours.close()
    return newest


def assert_whole(opened: Opener, path: Path, told: list[int]) -> int:
    """All that was told is there, each turn whole, each copy good; the newest number that is there."""
    newest = told[-1]
    store, kept = opened()
    try:
        numbers = {name: instance.load_time_s for name, instance in kept.instances.items()}
        assert max(numbers.values()) in (newest, newest + 1)  # saved and not told yet
        last_of = {f"m{number % MODELS}": number for number in told}
        for name, number in numbers.items():
            assert number >= last_of.get(name, 0)
            operation = asyncio.run(store.operation(f"op-{name}"))
            assert operation is not None
            assert operation.created_at == number
        logged = [int(event.text) for event in asyncio.run(store.events(limit=10_000))]
        assert logged == sorted(set(logged))
        assert {number for number in told if number >= logged[0]} <= set(logged)
    finally:
        store.close()
    assert check(path).problem is None
    assert [copy.path.name for copy in copies_of(path) if copy_problem(copy.path)] == []
    return int(max(numbers.values()))


def test_killed_at_random_moments(opened: Opener, path: Path) -> None:
    told: list[int] = []
    first = 1
    for _ in range(KILLS):
        newest = killed_writer(path, first)
        assert newest >= first
        told += range(first, newest + 1)
        first = assert_whole(opened, path, told) + 1
    assert copies_of(path)
