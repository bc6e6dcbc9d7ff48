"""The server ends, cleanly or not, and comes back: what runs is adopted, nothing runs twice."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.e2e.world import Engine, House, World, mimic, open_house, open_world, until, whole_text
from tests.server import run_command

GIB = 1024
MODELS = {
    "plain": mimic(6 * GIB),
    "other": mimic(4 * GIB),
    "slow": mimic(6 * GIB, load_s=4),
    "lingering": mimic(6 * GIB, release_s=2),
    "big": mimic(20 * GIB),
}
SETTINGS = {"stop_containers_on_exit": False}


@pytest.fixture
def house(engine: Engine, tmp_path: Path) -> Iterator[House]:
    """A server for one test alone, which may end it."""
    with open_house(tmp_path / "house", engine, MODELS, settings=SETTINGS) as house:
        yield house


@pytest.fixture
def neighbour(engine: Engine, house: House, tmp_path: Path) -> Iterator[House]:
    """A second server of another owner on the same GPUs."""
    folder = tmp_path / "neighbour"
    with open_house(folder, engine, MODELS, shared_gpus=house.gpus, settings=SETTINGS) as neighbour:
        yield neighbour


@pytest.fixture
async def beside(neighbour: House) -> AsyncIterator[World]:
    """The neighbour's world; one test sees both."""
    async with open_world(neighbour) as world:
        yield world


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


async def test_a_clean_stop_ends_processes_and_leaves_containers(world: World) -> None:
    await world.load("plain")
    (pid,) = world.seen.pids("plain")
    world.server.stop()
    if world.engine == "process":
        assert not is_alive(pid)
        assert world.gpus.used_mib(0) == 0
        world.server.restart()
        assert (await world.view("plain"))["status"]["value"] == "unloaded", "nobody asked for it yet"
        assert (await world.chat("plain")).status_code == 200
        assert len(world.seen.runs("plain")) == 2
    else:
        assert is_alive(pid)
        assert world.gpus.processes(0) == {pid: 6 * GIB}
        world.server.restart()
        await world.wait_state("plain", "ready")
        assert (await world.chat("plain")).status_code == 200
        assert world.seen.one_run("plain").pid == pid, "adopted without a new start"
    await world.unload("plain")
    assert world.gpus.used_mib(0) == 0


async def test_a_kill_strands_nothing_what_runs_is_adopted(world: World) -> None:
    await world.load("plain")
    await world.load("other")
    (pid,) = world.seen.pids("plain")
    world.server.kill()
    assert is_alive(pid)
    world.server.restart()
    await world.wait_state("plain", "ready")
    await world.wait_state("other", "ready")
    answers = await asyncio.gather(*(world.chat(model) for model in ("plain", "other") for _ in range(5)))
    assert [answer.status_code for answer in answers] == [200] * 10
    stream = await world.stream("plain", tokens=20).wait_end()
    assert stream.text == whole_text("plain", 20)
    assert world.seen.one_run("plain").pid == pid
    world.seen.one_run("other")
    refused = await world.chat("big")  # what was adopted is held, and idle: it makes room
    assert refused.status_code == 200, refused.text
    assert world.seen.one_run("big").first_s > world.seen.one_run("plain").last_s
    assert (await world.unload("big"))["freed_mib"] == 20 * GIB
    assert world.gpus.used_mib(0) == 0


async def test_what_was_adopted_can_be_unloaded_and_its_crash_is_seen(world: World) -> None:
    await world.load("plain")
    await world.load("other")
    (pid,) = world.seen.pids("plain")
    world.server.kill()
    world.server.restart()
    await world.wait_state("other", "ready")
    assert (await world.unload("other"))["freed_mib"] == 4 * GIB
    assert world.seen.holding("other") == {}
    await world.wait_state("plain", "ready")
    os.kill(pid, 9)
    view = await world.wait_state("plain", "failed")
    assert view["failure"]["exit_code"] == 137, "seen although its parent was killed"
    assert world.gpus.used_mib(0) == 0


async def test_a_start_goes_on_after_a_kill(world: World) -> None:
    asked = world.ask("slow")
    await world.wait_holding("slow")
    (pid,) = world.seen.pids("slow")
    world.server.kill()
    await asyncio.gather(asked, return_exceptions=True)
    world.server.restart()
    await world.wait_state("slow", "ready")
    assert (await world.chat("slow")).status_code == 200
    assert world.seen.one_run("slow").pid == pid
    assert (await world.unload("slow"))["freed_mib"] == 6 * GIB


async def test_a_stop_is_finished_after_a_kill(world: World) -> None:
    await world.load("lingering")
    (pid,) = world.seen.pids("lingering")
    unloading = asyncio.create_task(world.post("/models/unload", model="lingering"))
    await world.wait_state("lingering", "stopping")
    world.server.kill()
    await asyncio.gather(unloading, return_exceptions=True)
    world.server.restart()
    await world.wait_state("lingering", "stopped")
    assert not is_alive(pid)
    assert world.gpus.used_mib(0) == 0
    assert (await world.chat("lingering")).status_code == 200
    assert len(world.seen.runs("lingering")) == 2


async def test_what_ended_while_nobody_watched_is_not_adopted(world: World) -> None:
    await world.load("plain")
    (pid,) = world.seen.pids("plain")
    world.server.kill()
    os.kill(pid, 9)
    await world.wait_gone("plain")
    world.server.restart()
    await world.wait_state("plain", "failed", "stopped")
    assert (await world.chat("plain")).status_code == 200
    assert [run.pid == pid for run in world.seen.runs("plain")] == [True, False]


async def test_a_second_server_on_the_same_database_is_refused(world: World) -> None:
    await world.load("plain")
    command = ("serve", "--config", str(world.server.config), "--port", "0")
    second = await asyncio.to_thread(
        run_command, *command, cwd=world.server.folder, env=world.gpus.env, timeout_s=30
    )
    assert second.returncode == 2, second.stderr + second.stdout
    said = second.stderr + second.stdout
    assert "orchestrator.db" in said
    assert f"PID {world.server.pid}" in said, "it names the server to stop"
    assert "Traceback" not in said
    assert (await world.chat("plain")).status_code == 200
    world.seen.one_run("plain")


async def test_servers_with_their_own_databases_leave_each_other_alone(world: World, beside: World) -> None:
    await world.load("plain")
    (pid,) = world.seen.pids("plain")

    async def sees_it_as_foreign() -> bool:
        device = (await beside.get("/devices"))["devices"][0]
        return [process["used_mib"] for process in device["foreign"]] == [6 * GIB]

    await until(sees_it_as_foreign)
    assert (await beside.view("plain"))["status"]["value"] == "unloaded"
    await beside.load("other")
    (others,) = world.seen.pids("other")
    refused = await beside.chat("big")
    assert refused.status_code == 503, refused.text
    assert str(pid) in refused.json()["error"]["message"]
    await beside.load("other")
    for signal_ in ("kill", "stop"):
        getattr(beside.server, signal_)()
        beside.server.restart()
        assert world.gpus.processes(0)[pid] == 6 * GIB
        assert (await world.chat("plain")).status_code == 200
    world.server.kill()
    world.server.restart()
    await world.wait_state("plain", "ready")
    assert (await world.chat("plain")).status_code == 200
    assert world.seen.one_run("plain").pid == pid
    if world.engine == "docker":
        assert is_alive(others), "a container survives both ways of ending its server"
    else:
        assert not is_alive(others), "its own server ended it when that was stopped cleanly"
