"""The Docker engine stops, dies, freezes and comes back, under load; with our server, or without it.

What is ready goes on serving, starts and stops wait, and once the engine is back all agrees again. This
engine is one of our own, in namespaces of its own. CRASH_FREEZE_S says how long it is frozen.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.crash.audit import audit
from tests.crash.island import Island, island
from tests.crash.rounds import GIB, STOP_GRACE, overlaps
from tests.e2e.world import Engine, House, World, mimic, open_house, open_world, until
from tests.soak.load import REFUSALS, Crowd

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

PACE_S = 2.0
STUCK_AFTER_S = 11.0  # the grace of a stop, and ten seconds more
ASKED_WHILE_AWAY = 20
CLIENTS = 4
BACK_S = 60.0
CROWDED = {
    "quick": mimic(4 * GIB),
    "steady": mimic(6 * GIB),
    "slow-to-load": mimic(7 * GIB, load_s=0.6),
    "slow-to-stop": mimic(6 * GIB, release_s=0.5),
    "big": mimic(12 * GIB, load_s=0.2),
}
OUR_OWN = {
    "anchor": mimic(2 * GIB, pinned=True, idle_after="never"),
    "warm": mimic(2 * GIB, pinned=True, idle_after="never"),
    "cold": mimic(2 * GIB, idle_after="never"),
}
TAKEN_DOWN = REFUSALS | {"service_failed", "upstream_failed"}
"""An engine that takes its containers with it looks, from outside, like services that exit."""


@pytest.fixture(scope="module")
def isle(mimic_image: str) -> Iterator[Island]:
    with island(live_restore=True) as made:
        made.copy_image(mimic_image)
        yield made


@dataclass
class Scene:
    """A house on the island, its clients, and the model whose container must outlive the engine."""

    isle: Island
    house: House
    world: World
    crowd: Crowd
    anchor: int  # its PID

    async def serves_on(self) -> None:
        """Ready instances serve while the engine is away."""
        for _ in range(ASKED_WHILE_AWAY):
            answer = await self.world.chat("anchor")
            assert answer.status_code == 200, answer.text
        assert self.world.seen.pids("anchor") == [self.anchor]

    async def make_room(self) -> None:
        """No load, and nothing of it loaded, until the crowd resumes."""
        await self.crowd.quiet()
        for model in CROWDED:
            await self.world.unload(model)

    async def is_not_ready(self) -> None:
        assert await until(self._names_the_engine, BACK_S, "/readyz should name the engine")

    async def back(self) -> None:
        """The engine is back: all that waited is served, and everything agrees."""
        assert await until(self._is_ready, BACK_S, "the server should be ready again")
        self.crowd.came_up()
        await self.crowd.quiet()
        assert self.crowd.tally.lost == []
        for model in (*OUR_OWN, *CROWDED):
            answer = await self.world.chat(model)
            assert answer.status_code == 200, answer.text
        assert await audit(self.house, self.world.http) == []
        assert overlaps(self.world.seen) == []

    async def _names_the_engine(self) -> bool:
        answer = await self.world.http.get("/readyz")
        return answer.status_code == 503 and answer.json()["checks"]["engine"] != "ok"

    async def _is_ready(self) -> bool:
        return (await self.world.http.get("/readyz")).status_code == 200


@asynccontextmanager
async def scene(
    isle: Island,
    folder: Path,
    image: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    live_restore: bool = True,
    refusals: frozenset[str] = REFUSALS,
) -> AsyncIterator[Scene]:
    """Under load, with `anchor` and `warm` ready, and `cold` never asked for."""
    if isle.live_restore != live_restore:
        isle.live_restore = live_restore
        isle.stop_engine()
        isle.start_engine()
    monkeypatch.setenv("DOCKER_HOST", isle.url)
    engine = Engine("docker", image, "orchestrator-outage")
    settings = {"stop_containers_on_exit": False}
    services = {"mimic": {"stop_grace": STOP_GRACE}}
    with open_house(folder, engine, CROWDED | OUR_OWN, settings=settings, services=services) as house:
        async with open_world(house) as world:
            await world.load("anchor")
            await world.load("warm")
            (pid,) = world.seen.pids("anchor")
            crowd = Crowd(house.server, list(CROWDED), seed=1, refusals=refusals)
            async with crowd.running(CLIENTS):
                await until(lambda: crowd.tally.answered > 20, BACK_S, "the load should be under way")
                try:
                    yield Scene(isle, house, world, crowd, pid)
                finally:
                    isle.revive()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_containers_that_outlive_the_engine_go_on_serving(
    isle: Island, mimic_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    async with scene(isle, tmp_path, mimic_image, monkeypatch) as on:
        await asyncio.to_thread(isle.stop_engine, number)
        starts = asyncio.create_task(on.world.load("cold"))
        stops = asyncio.create_task(on.world.unload("warm"))
        await on.is_not_ready()
        await on.serves_on()
        assert not starts.done(), "a start waits for the engine"
        assert not stops.done(), "and so does a stop"
        await asyncio.to_thread(isle.start_engine)
        assert (await stops)["freed_mib"] == 2 * GIB
        await starts
        await on.back()
        assert on.world.seen.one_run("anchor").pid == on.anchor, "it was never started again"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_containers_that_go_down_with_the_engine_come_back_when_asked_for(
    isle: Island, mimic_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """An engine without live-restore: SIGTERM ends its containers at once, SIGKILL when it starts again."""
    away = scene(isle, tmp_path, mimic_image, monkeypatch, live_restore=False, refusals=TAKEN_DOWN)
    async with away as on:
        on.crowd.going_down()
        await asyncio.to_thread(isle.stop_engine, number)
        await on.is_not_ready()
        if number is signal.SIGKILL:
            await on.serves_on()
        await asyncio.to_thread(isle.start_engine)
        await until(lambda: on.anchor not in on.world.seen.pids("anchor"), BACK_S)
        await on.back()


async def test_a_frozen_engine_holds_up_starts_and_stops_only(
    isle: Island, mimic_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze_s = float(os.environ.get("CRASH_FREEZE_S") or 5)
    async with scene(isle, tmp_path, mimic_image, monkeypatch) as on:
        isle.signal_engine(signal.SIGSTOP)
        starts = asyncio.create_task(on.world.post("/models/load", model="cold", wait=True))
        stops = asyncio.create_task(on.world.unload("warm"))
        until_s = asyncio.get_running_loop().time() + freeze_s
        await on.is_not_ready()
        while asyncio.get_running_loop().time() < until_s:
            await on.serves_on()
            # A frozen engine reads no logs: a container that has written 64 KiB of them would stand still.
            await asyncio.sleep(PACE_S)
        assert not stops.done()
        if starts.done():  # frozen for longer than a stop may take: who waits for stuck memory is told so
            assert freeze_s > STUCK_AFTER_S
            refusal = starts.result()
            assert (refusal.status_code, "(stuck)" in refusal.text) == (503, True), refusal.text
        isle.signal_engine(signal.SIGCONT)
        assert (await stops)["freed_mib"] == 2 * GIB
        if (await starts).status_code != 200:
            await on.world.load("cold")
        await on.back()
        assert on.world.seen.one_run("anchor").pid == on.anchor


@pytest.mark.parametrize("comes_first", ["server", "engine"])
async def test_both_die_and_come_back_in_either_order(
    isle: Island, mimic_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_first: str
) -> None:
    async with scene(isle, tmp_path, mimic_image, monkeypatch) as on:
        server = on.house.server
        await asyncio.to_thread(isle.stop_engine, signal.SIGKILL)
        await on.is_not_ready()
        on.crowd.going_down()
        server.kill()
        if comes_first == "server":
            server.launch()
            await asyncio.to_thread(server.wait_listening)
            await on.is_not_ready()
            state = await on.world.http.get("/state")
            assert state.status_code == 200, "it can be looked at"
            await asyncio.to_thread(isle.start_engine)
        else:
            await asyncio.to_thread(isle.start_engine)
            await asyncio.to_thread(server.start)
        await on.back()
        assert on.world.seen.one_run("anchor").pid == on.anchor, "adopted, and never started again"


async def test_an_engine_that_is_told_nothing_more_by_a_dead_server(
    isle: Island, mimic_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen with orders in its hands: the server dies, and the engine carries them out afterwards."""
    async with scene(isle, tmp_path, mimic_image, monkeypatch) as on:
        await on.make_room()
        isle.signal_engine(signal.SIGSTOP)
        asked = asyncio.create_task(on.world.post("/models/load", model="cold", wait=True))
        await on.world.wait_state("cold", "starting")
        on.crowd.going_down()
        on.house.server.kill()
        assert isinstance((await asyncio.gather(asked, return_exceptions=True))[0], httpx.TransportError)
        isle.signal_engine(signal.SIGCONT)
        await asyncio.to_thread(on.house.server.start)
        await on.world.wait_state("cold", "ready")
        on.world.seen.one_run("cold")  # the load that was asked for went on, once
        on.crowd.resume()
        await on.back()
        assert on.world.seen.one_run("anchor").pid == on.anchor
