"""The real loop on a real database: when that fails, works again, and when an older copy is put back."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.control.ports import Exit, Kept
from orchestrator.control.recovery import Recovered, recover
from orchestrator.core.errors import StoreError
from orchestrator.core.lifecycle import State
from orchestrator.core.snapshot import Snapshot
from orchestrator.store.backup import restore
from orchestrator.store.repository import SqliteStore
from tests.control import world as worlds
from tests.control.world import FakeEngine, World, model, running, turning
from tests.store.conftest import Opener
from tests.store.peer import log_until_it_fails
from tests.store.test_disks import fill_disk

A, B, C = (model(name, 300) for name in "abc")
MODELS = {m.id: m for m in (A, B, C)}


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "PATIENCE_S", 30.0)  # a disk takes part


def use(monkeypatch: pytest.MonkeyPatch, store: SqliteStore, engine: FakeEngine | None = None) -> None:
    """Have the next world remember here, and find this engine."""
    monkeypatch.setattr(worlds, "FakeStore", lambda: store)
    if engine is not None:
        monkeypatch.setattr(worlds, "FakeEngine", lambda _: engine)
        # Each server has a seed of its own for the ids of its attempts.
        monkeypatch.setattr(worlds, "Snapshot", lambda **given: Snapshot(**given | {"seed": "again"}))


async def load_at_last(world: World, name: str) -> None:
    """Ask until it is taken, as a client does that was told to come again, and wait for it."""
    async with asyncio.timeout(worlds.PATIENCE_S):
        while True:
            await world.pass_time(1.0)
            try:
                await world.loop.load(name)
            except StoreError:
                continue
            break
    await world.until(lambda: world.state(name) == "ready")


async def test_a_full_disk_refuses_commands_and_lets_observations_count(
    opened: Opener, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_disk / "x.db"
    store, _ = opened(at=path)
    use(monkeypatch, store)
    async with running(A, B) as world:
        await world.ready("a")
        filler = fill_disk(small_disk)
        with pytest.raises(StoreError, match="full"):
            await log_until_it_fails(store)
        with pytest.raises(StoreError, match=rf"{path} cannot grow: the disk is full"):
            await world.loop.load("b")
        assert world.engine.alive("b") == []
        (await world.ask("a")).leave()  # what is ready serves on
        (attempt,) = world.engine.alive("a")
        world.engine.crash(attempt, Exit(3))
        await world.until(lambda: world.state("a") != "ready")
        assert (await store.instances())["a"].state is State.READY  # nothing half done
        filler.unlink()
        await load_at_last(world, "b")
        stored = await store.instances()
        assert stored["b"].attempt in world.engine.alive("b")
        assert stored["a"].state is world.loop.snapshot.instance("a").state is not State.READY
        assert world.loop.store_problem is None
    store.close()


async def before_the_damage(
    opened: Opener, path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[FakeEngine, str]:
    """A copy in which 'a' is ready and 'b' is not; since then both began anew, and 'c' came and went."""
    store, kept = opened()
    use(monkeypatch, store)
    async with running(A, B, C) as world:
        await world.idle("a")
        assert await store.back_up() is not None
        await world.loop.unload("a")
        await world.at_rest("a")
        for name in ("c", "b"):
            await world.idle(name)
        await world.loop.unload("c")
        await world.at_rest("c")
        await world.idle("a")
        assert len(world.engine.processes) == 4
    store.close()
    return world.engine, kept.owner


async def restarted(opened: Opener, engine: FakeEngine, boot: str) -> tuple[SqliteStore, Kept, Recovered]:
    store, kept = opened(boot)
    found = [replace(item, host="127.0.0.1", port=1) for item in await engine.list()]
    return store, kept, recover(kept, found, MODELS, now_s=1000.0)


@pytest.mark.parametrize("boot", ["boot-1", "boot-2"])
async def test_after_an_older_copy_is_put_back_nothing_is_double_or_left(
    opened: Opener, path: Path, monkeypatch: pytest.MonkeyPatch, boot: str
) -> None:
    engine, owner = await before_the_damage(opened, path, monkeypatch)
    unknown = {*engine.alive("a"), *engine.alive("b")}
    await asyncio.to_thread(path.write_bytes, b"x" * 8192)
    await asyncio.to_thread(restore, path)
    store, kept, recovered = await restarted(opened, engine, boot)
    assert {action.attempt for action in recovered.actions} == unknown  # and each of them is stopped
    assert recovered.adopted == ()
    assert kept.owner == owner
    use(monkeypatch, store, engine)
    world = World(MODELS)
    async with turning(world, recovered):
        world.measure()
        await world.until(lambda: not unknown & {*engine.alive("a"), *engine.alive("b")})
        await world.pass_time(1.0)
        for name in "abc":
            await world.ready(name)
        stored = await store.instances()
        for name in "abc":
            assert engine.alive(name) == [stored[name].attempt]
    store.close()


async def test_an_attempt_that_the_copy_knows_is_adopted(
    opened: Opener, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, _ = opened()
    use(monkeypatch, store)
    async with running(A, B) as world:
        await world.idle("a")
        await store.back_up()
        await world.idle("b")
    store.close()
    await asyncio.to_thread(restore, path)
    (known,), (unknown,) = world.engine.alive("a"), world.engine.alive("b")
    store, _, recovered = await restarted(opened, world.engine, "boot-1")
    assert recovered.adopted == (known,)
    assert [action.attempt for action in recovered.actions] == [unknown]
    use(monkeypatch, store, world.engine)
    again = World({m.id: m for m in (A, B)})
    async with turning(again, recovered):
        again.measure()
        await again.until(lambda: not world.engine.alive("b"))
        await again.ready("a")
        assert world.engine.alive("a") == [known]
    store.close()
