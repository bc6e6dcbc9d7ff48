"""The server dies with an order on its way, and the engine carries it out late, or never."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.crash.audit import audit, containers
from tests.crash.engine_proxy import CREATE, START, EngineProxy, Fault
from tests.e2e.world import Engine, World, mimic, open_house, open_world, until

pytestmark = pytest.mark.docker
MODELS = {"plain": mimic(6 * 1024), "big": mimic(20 * 1024)}
RESYNC_S = 60.0  # it compares every 30 s
SETTINGS = {"stop_containers_on_exit": False}


@pytest.fixture
async def proxied(
    mimic_image: str, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[World, EngineProxy]]:
    """A world whose server reaches the engine through the proxy only."""
    with EngineProxy(tmp_path / "engine.sock") as proxy:
        monkeypatch.setenv("DOCKER_HOST", proxy.url)
        engine = Engine("docker", mimic_image, network)
        with open_house(tmp_path / "house", engine, MODELS, settings=SETTINGS) as house:
            async with open_world(house) as world:
                yield world, proxy
            proxy.clear()


async def killed_with(world: World, fault: Fault) -> None:
    """Ask for a load, and kill the server when the engine's part of it has met the fault."""
    asked = asyncio.create_task(world.post("/models/load", model="plain", wait=True))
    await asyncio.to_thread(fault.wait_hit)
    world.server.kill()
    (ended,) = await asyncio.gather(asked, return_exceptions=True)
    assert isinstance(ended, httpx.TransportError), ended


async def settled(world: World) -> None:
    """The load that was asked for before the kill has ended well, once, and without a failure."""
    await world.wait_state("plain", "ready")
    assert (await world.chat("plain")).status_code == 200
    assert await audit(world.house, world.http) == []
    world.seen.one_run("plain")
    assert await world.notes("failed", "plain") == []
    assert (await world.chat("big")).status_code == 200, "nothing of it holds room that is not known"


async def test_what_was_created_and_never_started_is_started(proxied: tuple[World, EngineProxy]) -> None:
    world, proxy = proxied
    lost = proxy.cut_requests(START)
    await killed_with(world, lost)
    assert len(containers(world.house).unstarted) == 1
    lost.end()
    await asyncio.to_thread(world.server.start)
    await settled(world)


async def test_a_start_that_is_late_for_a_dead_server_is_the_one_start(
    proxied: tuple[World, EngineProxy],
) -> None:
    world, proxy = proxied
    late = proxy.hold_requests(START, times=1)
    await killed_with(world, late)
    await asyncio.to_thread(world.server.start)
    late.end()
    await settled(world)


async def test_a_container_that_is_created_late_for_a_dead_server_is_not_a_second_one(
    proxied: tuple[World, EngineProxy],
) -> None:
    world, proxy = proxied
    late = proxy.hold_requests(CREATE, times=1)
    await killed_with(world, late)
    await asyncio.to_thread(world.server.start)
    late.end()
    await settled(world)


async def test_a_start_whose_answer_is_lost_is_asked_about(proxied: tuple[World, EngineProxy]) -> None:
    world, proxy = proxied
    proxy.cut_answers(START, times=1)
    await world.load("plain")
    await settled(world)


async def test_an_exit_that_no_event_told_of_is_seen(proxied: tuple[World, EngineProxy]) -> None:
    """The event stream goes silent without an error; the periodic comparison finds the end."""
    world, proxy = proxied
    await world.load("plain")
    muted = proxy.mute()
    (container,) = containers(world.house).models
    pid = world.seen.pids("plain")[0]
    os.kill(pid, signal.SIGKILL)
    await until(lambda: container not in containers(world.house).models)
    view = await until(lambda: failed(world), RESYNC_S, "the end should be seen")
    assert dict(view["failure"])["exit_code"] == 137
    assert not muted.ended.is_set()


async def failed(world: World) -> dict[str, Any]:
    view = await world.view("plain")
    return view if view["state"] == "failed" else {}
