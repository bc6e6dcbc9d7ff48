"""What services have printed of their buffers, through the real loop."""

import asyncio
from dataclasses import replace

import pytest

from orchestrator.control import buffer_lines
from orchestrator.control.buffer_lines import MOST_BYTES, logged_buffers
from orchestrator.core.entities import MIB, Model, Recipe
from tests.control.world import FakeEngine, World, model, running

RECIPE = Recipe("file", "service", 8192, 999, 4, "f16", "f16", 1)
LINE = b"load_tensors:        CUDA0 model buffer size =   300.00 MiB\n"
SAID = {"CUDA0": {"model": 300 * MIB}}


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_lines, "SETTLES_S", 0.0)


def known(name: str) -> Model:
    return replace(model(name, 400), recipe=replace(RECIPE, content=name))


async def buffers_of(world: World, name: str) -> object:
    """What is kept of the load of the model that is ready, once it says anything."""

    def said() -> object:
        world.measure()
        return [
            load.buffers for row in world.loop.snapshot.learned.values() for load in row.loads if load.buffers
        ]

    await world.ready(name)
    await world.until(said)
    await world.turns()
    assert world.store.learned == world.loop.snapshot.learned
    return said()


async def test_what_is_printed_is_kept_with_the_load(caplog: pytest.LogCaptureFixture) -> None:
    async with running(known("one"), model("plain", 100)) as world:
        world.engine.printed = [b"loading\n" + LINE[:20], LINE[20:] + b"\xff\n"]
        assert await buffers_of(world, "one") == [SAID]
        attempt = world.loop.snapshot.instance("one").attempt
        assert world.loop.snapshot.logged == {attempt: SAID}
        await world.ready("plain")
        await world.loop.unload("one")
        await world.at_rest("one")
        assert world.loop.snapshot.logged == {}, "of one that is gone nothing stays"


async def test_what_comes_once_it_is_leaving_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    settled = asyncio.Event()

    async def late(engine: object, model: str, attempt: str) -> object:
        await settled.wait()
        return SAID

    monkeypatch.setattr("orchestrator.control.effects.logged_buffers", late)
    async with running(known("one")) as world:
        await world.ready("one")
        await world.loop.unload("one")
        await world.at_rest("one")
        settled.set()
        await world.turns(3)
        assert world.loop.snapshot.logged == {}


async def test_a_log_that_cannot_be_read_says_nothing() -> None:
    engine = FakeEngine({})
    engine.problem = "it is gone"
    assert await logged_buffers(engine, "one", "a1") == {}


async def test_an_engine_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer_lines, "LIMIT_S", 0.05)

    class Silent(FakeEngine):
        async def logs(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def, override]
            await asyncio.Event().wait()
            yield b""

    assert await logged_buffers(Silent({}), "one", "a1") == {}


async def test_of_an_endless_log_only_the_beginning_is_kept() -> None:
    engine = FakeEngine({})
    engine.printed = [LINE, b"x" * MOST_BYTES, b"\n" + LINE]
    assert await logged_buffers(engine, "one", "a1") == SAID
