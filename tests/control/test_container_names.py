"""Names of others' containers: asked once each, never in a storm, and never in a turn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from orchestrator.control.container_names import KEPT_S, RETRY_S, ContainerNames
from orchestrator.core.entities import MIB, ForeignProcess, Sample
from orchestrator.core.events import Sampled
from tests.control.world import GPU, World, model, running

COMFY, WHISPER = "c0" * 32, "33" * 32


@dataclass
class Watched:
    """A world that sees foreign containers, and the one who asks for their names."""

    world: World
    names: ContainerNames

    def show(self, *containers: str) -> None:
        sample = self.world.engine.sample(self.world.clock())
        foreign = tuple(ForeignProcess(n, "python3", MIB, c) for n, c in enumerate(containers, 1))
        self._post(replace(sample, readings={GPU: replace(sample.readings[GPU], foreign=foreign)}))

    def hide(self) -> None:
        """The device cannot be read for a moment."""
        self._post(Sample(self.world.clock(), errors={GPU: "a hiccup"}))

    def _post(self, sample: Sample) -> None:
        self.world.loop.inbox.post(Sampled(sample))

    async def look(self) -> dict[str, str]:
        """The names that are known after a look at what has been shown."""
        await self.world.turns()
        await self.names.look()
        await self.world.turns()
        return dict(self.world.loop.snapshot.container_names)

    @property
    def asked(self) -> list[str]:
        return self.world.engine.asked_names


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    async with running(model("a", 100)) as world:
        yield Watched(world, ContainerNames(world.loop, world.engine, world.clock))


async def test_each_container_is_asked_for_once(watched: Watched) -> None:
    watched.world.engine.names = {COMFY: "comfyui", WHISPER: "whisper"}
    watched.show(COMFY, COMFY)
    assert await watched.look() == {COMFY: "comfyui"}
    watched.show(COMFY, WHISPER)
    assert await watched.look() == {COMFY: "comfyui", WHISPER: "whisper"}
    await watched.look()
    assert watched.asked == [COMFY, WHISPER]
    watched.show(WHISPER)
    assert await watched.look() == {WHISPER: "whisper"}


async def test_one_that_the_engine_does_not_know_is_asked_for_once_a_minute(watched: Watched) -> None:
    watched.show(COMFY)
    for _ in range(5):
        assert await watched.look() == {}
    assert watched.asked == [COMFY]
    watched.world.clock.now_s += KEPT_S
    watched.show(COMFY)
    await watched.look()
    assert watched.asked == [COMFY] * 2


async def test_a_bad_engine_is_asked_once_however_many_containers_there_are(watched: Watched) -> None:
    engine, clock = watched.world.engine, watched.world.clock
    engine.names = {COMFY: "comfyui", WHISPER: "whisper"}
    engine.problem = "it is away"
    watched.show(COMFY, WHISPER)
    for _ in range(5):
        assert await watched.look() == {}
    assert len(watched.asked) == 1
    clock.now_s += RETRY_S
    await watched.look()
    assert len(watched.asked) == 2
    engine.problem = None
    await watched.look()
    assert len(watched.asked) == 2, "not before it is time"
    clock.now_s += RETRY_S
    watched.show(COMFY, WHISPER)
    assert await watched.look() == {COMFY: "comfyui", WHISPER: "whisper"}


async def test_another_name_is_seen_within_a_minute(watched: Watched) -> None:
    engine = watched.world.engine
    engine.names[COMFY] = "comfyui"
    watched.show(COMFY)
    await watched.look()
    engine.names[COMFY] = "comfyui-old"
    assert await watched.look() == {COMFY: "comfyui"}
    watched.world.clock.now_s += KEPT_S
    watched.show(COMFY)
    assert await watched.look() == {COMFY: "comfyui-old"}


@pytest.mark.parametrize("engine_answers", [True, False])
async def test_what_is_gone_keeps_its_name_while_its_memory_is_shown(
    watched: Watched, engine_answers: bool
) -> None:
    engine = watched.world.engine
    engine.names[COMFY] = "comfyui"
    watched.show(COMFY)
    await watched.look()
    engine.names.clear()
    engine.problem = None if engine_answers else "it is away"
    watched.world.clock.now_s += KEPT_S
    watched.show(COMFY)
    assert await watched.look() == {COMFY: "comfyui"}
    watched.show()
    assert await watched.look() == {}


async def test_a_device_that_cannot_be_read_for_a_moment_asks_for_nothing_anew(watched: Watched) -> None:
    watched.world.engine.names[COMFY] = "comfyui"
    watched.show(COMFY)
    await watched.look()
    watched.hide()
    assert await watched.look() == {}
    watched.show(COMFY)
    assert await watched.look() == {COMFY: "comfyui"}
    assert watched.asked == [COMFY]


async def test_an_engine_that_does_not_answer_holds_up_nobody_else(watched: Watched) -> None:
    world = watched.world
    world.engine.names[COMFY] = "comfyui"
    world.engine.naming.clear()
    watched.show(COMFY)
    await world.turns()
    looking = asyncio.create_task(watched.names.run())
    try:
        await world.until(lambda: watched.asked)
        gate = await world.ready("a")
        assert gate.is_open
        assert world.loop.snapshot.container_names == {}
        watched.show(COMFY)
        world.engine.naming.set()
        await world.until(lambda: world.loop.snapshot.container_names == {COMFY: "comfyui"})
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def test_an_answer_that_comes_when_the_container_is_gone_is_not_kept(watched: Watched) -> None:
    world = watched.world
    world.engine.names[COMFY] = "comfyui"
    world.engine.naming.clear()
    watched.show(COMFY)
    await world.turns()
    looking = asyncio.create_task(watched.names.look())
    await world.until(lambda: watched.asked)
    watched.show()
    await world.turns()
    world.engine.naming.set()
    await looking
    await world.turns()
    assert world.loop.snapshot.container_names == {}
