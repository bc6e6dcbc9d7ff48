"""The comparison itself: it is content with a healthy server, and names what does not belong."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.crash.audit import audit
from tests.e2e.world import Engine, World, mimic, open_house, open_world, until
from tests.mimic.process import mimic as mimic_process
from tests.server import MARK

MIB = 512
SOON_S = 0.5


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    with open_house(tmp_path, Engine("process"), {"alpha": mimic(MIB)}) as house:
        async with open_world(house) as world:
            await world.load("alpha")
            yield world


def run(world: World, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(world.server.settings["database"], timeout=20)) as database:
        database.execute(statement)
        database.commit()


async def test_a_healthy_server_agrees_with_all(world: World) -> None:
    assert await audit(world.house, world.http) == []


async def test_an_orphan_is_seen_on_the_engine_and_on_the_device(world: World) -> None:
    orphan = {MARK: world.server.env[MARK], "ORCHESTRATOR_ATTEMPT": "ghost", "MIMIC_NAME": "alpha"}
    with mimic_process(world.gpus.env | orphan, cuda_visible_devices="0", mib=MIB, hold_only=1) as process:
        await until(lambda: process.pid in world.gpus.processes(0))
        wrong = await audit(world.house, world.http, SOON_S)
    assert "the engine runs ghost alpha, which the server does not know" in wrong
    assert "the engine runs more than one 'alpha'" in wrong
    assert any("the device shows memory of ghost" in line for line in wrong)


async def test_what_the_database_never_ended_is_seen(world: World) -> None:
    run(world, "INSERT INTO operation VALUES ('op-x', 'load', 'alpha', 1, 'running', '', NULL, 0, NULL)")
    run(world, "INSERT INTO attempt (id, model, state, placement, claimed_at, oom) "
               "VALUES ('lost', 'alpha', 'claimed', '{}', 1, 0)")  # fmt: skip
    wrong = await audit(world.house, world.http)
    assert "operation op-x (load 'alpha') is still running" in wrong
    assert "attempt lost of 'alpha' is claimed for ever" in wrong
