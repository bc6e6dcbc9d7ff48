"""The server ends, cleanly or not, and comes back: what runs is adopted, nothing runs twice."""

import asyncio
import os
import signal
from pathlib import Path

from tests.e2e.world import Engine, World, mimic, open_house, open_world, until, whole_text
from tests.server import run_command

GIB = 1024
MODELS = {
    "plain": mimic(6 * GIB),
    "other": mimic(4 * GIB),
    "slow": mimic(6 * GIB, load_s=4),
    "lingering": mimic(6 * GIB, release_s=1),
    "big": mimic(20 * GIB),
}
SETTINGS = {"stop_containers_on_exit": False}


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


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


async def test_what_runs_when_the_server_is_killed_is_adopted(world: World) -> None:
    await world.load("plain")
    await world.load("other")
    (pid,), (others,) = world.seen.pids("plain"), world.seen.pids("other")
    world.server.kill()
    assert is_alive(pid)
    world.server.restart()
    await world.wait_state("plain", "ready")
    await world.wait_state("other", "ready")
    answers = await asyncio.gather(*(world.chat(model) for model in ("plain", "other") for _ in range(5)))
    assert [answer.status_code for answer in answers] == [200] * 10
    stream = await world.stream("plain", tokens=20).wait_end()
    assert stream.text == whole_text("plain", 20)
    assert world.seen.one_run("plain").pid == pid, "one start only"
    assert world.seen.one_run("other").pid == others

    os.kill(others, signal.SIGKILL)
    view = await world.wait_state("other", "failed")
    assert view["failure"]["exit_code"] == 137, "seen although whoever started it was killed"
    assert world.seen.holding("other") == {}

    assert (await world.chat("big")).status_code == 200, "what was adopted makes room like any other"
    assert world.seen.one_run("plain").last_s < world.seen.one_run("big").first_s
    assert (await world.unload("big"))["freed_mib"] == 20 * GIB
    assert world.gpus.used_mib(0) == 0


async def test_what_was_adopted_can_be_unloaded(world: World) -> None:
    stream = await world.busy("plain")
    (pid,) = world.seen.pids("plain")
    world.server.kill()
    await stream.wait_end()
    assert stream.was_cut
    world.server.restart()
    view = await world.wait_state("plain", "ready")
    assert view["instance"]["in_flight"] == 0
    assert (await world.unload("plain"))["freed_mib"] == 6 * GIB
    assert not is_alive(pid)
    assert world.gpus.used_mib(0) == 0


async def test_what_was_half_done_when_the_server_was_killed_is_finished(world: World) -> None:
    """One was starting, one stopping, and one ended while nobody watched."""
    await world.load("plain")
    await world.load("lingering")
    asked = [world.ask("slow")]
    await world.wait_holding("slow")
    asked.append(asyncio.create_task(world.post("/models/unload", model="lingering")))
    await world.wait_state("lingering", "stopping")
    (starting,), (stopping,) = world.seen.pids("slow"), world.seen.pids("lingering")
    (ended,) = world.seen.pids("plain")
    world.server.kill()
    os.kill(ended, signal.SIGKILL)
    await asyncio.gather(*asked, return_exceptions=True)
    world.server.restart()

    await world.wait_state("slow", "ready")
    assert (await world.chat("slow")).status_code == 200
    assert world.seen.one_run("slow").pid == starting, "it went on, and was not started twice"
    await world.wait_state("lingering", "stopped")
    assert not is_alive(stopping)
    world.seen.one_run("lingering")
    await world.wait_state("plain", "failed", "stopped")
    assert world.gpus.processes(0) == {starting: 6 * GIB}
    assert (await world.chat("plain")).status_code == 200
    assert [run.pid == ended for run in world.seen.runs("plain")] == [True, False]


async def test_what_is_held_out_is_not_restored(engine: Engine, tmp_path: Path) -> None:
    models = {name: mimic(2 * GIB, pinned=True) for name in ("pinned", "held")}
    with open_house(tmp_path, engine, models, settings=SETTINGS) as house:
        async with open_world(house) as world:
            for model in models:
                await world.wait_state(model, "ready")
            await world.unload("held", hold="10m")
            world.server.stop()
            world.server.restart()
            await world.wait_state("pinned", "ready")
            view = await world.view("held")
            assert view["state"] == "stopped"
            assert view["held_for_s"] > 0
            assert (await world.chat("held")).status_code == 503


async def test_a_second_server_on_the_same_database_is_refused(world: World) -> None:
    await world.load("plain")
    command = ("serve", "--config", str(world.server.config), "--port", "0")
    second = await asyncio.to_thread(run_command, *command, cwd=world.server.folder, env=world.gpus.env)
    said = second.stderr + second.stdout
    assert second.returncode == 2, said
    assert "orchestrator.db" in said
    assert f"PID {world.server.pid}" in said, "it names the server to stop"
    assert "Traceback" not in said
    assert (await world.chat("plain")).status_code == 200
    world.seen.one_run("plain")


async def test_servers_with_their_own_databases_leave_each_other_alone(
    world: World, engine: Engine, tmp_path: Path
) -> None:
    await world.load("plain")
    (pid,) = world.seen.pids("plain")
    house = open_house(tmp_path, engine, MODELS, shared_gpus=world.gpus, settings=SETTINGS)
    with house as neighbour:
        async with open_world(neighbour) as beside:

            async def sees_it_as_foreign() -> bool:
                foreign = (await beside.device())["foreign"]
                is_named = engine.name == "process" or all(process["container_name"] for process in foreign)
                return [process["used_mib"] for process in foreign] == [6 * GIB] and is_named

            await until(sees_it_as_foreign)
            (stranger,) = (await beside.device())["foreign"]
            assert (await beside.view("plain"))["status"]["value"] == "unloaded"
            await beside.load("other")
            (others,) = world.seen.pids("other")
            refused = await beside.chat("big")
            assert refused.status_code == 503, refused.text
            named = stranger["container_name"] or f"(PID {pid})"
            assert f"{named} {6 * GIB} MiB" in refused.json()["error"]["message"]

            world.server.kill()
            world.server.restart()
            await world.wait_state("plain", "ready")
            assert world.gpus.processes(0) == {pid: 6 * GIB, others: 4 * GIB}
            assert (await beside.chat("other")).status_code == 200
        neighbour.server.stop()
        assert world.gpus.processes(0) == {pid: 6 * GIB}
    assert (await world.chat("plain")).status_code == 200
    assert world.seen.one_run("plain").pid == pid
    world.seen.one_run("other")
