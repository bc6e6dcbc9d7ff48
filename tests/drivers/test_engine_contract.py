"""One contract for every engine (see ports.Engine), then what only one of them has to do."""

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.ports import Engine, Exit, Found, StartOrder
from orchestrator.core.entities import Device, DeviceKind, Launch, Progress
from orchestrator.core.errors import (
    Cancelled,
    EngineError,
    EngineUnavailable,
    ImageMissing,
    NameTaken,
    NoLog,
    StartFailed,
)
from orchestrator.drivers import docker_gpu, docker_spec, process_tree
from orchestrator.drivers.docker import _REMEMBERED_ENDS as REMEMBERED_ENDS
from orchestrator.drivers.docker import DockerEngine
from orchestrator.drivers.docker_pull import PullProgress, follow_pull
from orchestrator.drivers.docker_spec import ATTEMPT_LABEL
from orchestrator.drivers.log_tail import BoundedLog, last_lines
from orchestrator.drivers.process import ProcessEngine
from orchestrator.drivers.process_folder import Folder
from tests.crash.engine_proxy import EngineProxy
from tests.drivers.engines import (
    WAIT_S,
    Exits,
    World,
    answers,
    create_only,
    descendants,
    die,
    docker_client,
    ignore,
    lives,
    read_all,
    read_until,
    start_healthy,
    status_of,
    strangers_container,
    url,
    wait_healthy,
    with_script,
)
from tests.support import eventually, free_port

# Ends only with its own group, or by its name in the environment: it has left the session.
GRANDCHILD = (
    "import subprocess as s; print(s.Popen(['sleep', '600'], start_new_session=True).pid, flush=True);"
)


# ---- starting ----


async def test_a_started_attempt_answers_at_its_address(world: World) -> None:
    engine = await world.open()
    order = world.order()
    found = await start_healthy(engine, order)
    assert (found.attempt, found.model) == (order.attempt, "model")
    assert lives(engine.roots()[order.attempt].pid)
    assert await engine.list() == (found,)
    assert await engine.health() is None


async def test_two_starts_of_one_attempt_make_one(world: World) -> None:
    engine = await world.open()
    order = world.order()
    one, two = await asyncio.gather(engine.start(order, ignore), engine.start(order, ignore))
    assert one == two == await engine.start(order, ignore)
    assert await engine.list() == (one,)
    other = await world.open()  # as after a restart, and before anybody has listed
    assert await other.start(order, ignore) == one


async def test_two_attempts_live_side_by_side(world: World) -> None:
    engine = await world.open()
    both = await asyncio.gather(*(engine.start(world.order(), ignore) for _ in range(2)))
    assert len({url(found) for found in both}) == 2
    for found in both:
        await wait_healthy(found)


async def test_what_ends_at_once_is_told_with_its_code_and_last_lines(world: World) -> None:
    engine = await world.open()
    order = world.order(start="exit:7:no such model file")
    await engine.start(order, ignore)
    ended = await world.exits.of(order.attempt)
    assert ended.code == 7
    assert "no such model file" in "\n".join(ended.log_tail)
    (listed,) = await engine.list()
    assert listed.exit == ended
    assert (await engine.start(order, ignore)).exit == ended
    assert engine.roots() == {}


async def test_a_crash_is_told_with_its_code(world: World) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    await asyncio.to_thread(die, found, 5)
    ended = await world.exits.of(found.attempt)
    assert (ended.code, ended.oom) == (5, False)
    assert ended.log_tail[-1] == "ready"
    assert len(ended.log_tail) <= 20


async def test_a_killed_service_has_the_code_of_its_signal(world: World) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    everyone = [p for pid in process_tree._pids() if (p := process_tree.read_process(pid))]
    root = engine.roots()[found.attempt].pid
    (service,) = [p.pid for p in everyone if p.parent == root]
    os.kill(service, signal.SIGKILL)
    assert (await world.exits.of(found.attempt)).code == 137


# ---- stopping ----


async def test_a_stop_lets_the_service_end_by_itself(world: World) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    ended = await engine.stop(found.attempt, WAIT_S)
    assert ended.code == 0
    assert "stopping" in ended.log_tail
    assert not await asyncio.to_thread(answers, found)
    assert engine.roots() == {}
    assert [known.exit for known in await engine.list()] == [ended]
    assert await engine.stop(found.attempt, WAIT_S) == ended


async def test_what_is_deaf_is_killed_after_the_grace(world: World) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order(ignore_sigterm="1"))
    pid, begun_s = engine.roots()[found.attempt].pid, time.monotonic()
    ended = await engine.stop(found.attempt, 1)
    assert ended.code == 137
    assert time.monotonic() - begun_s >= 0.9
    assert not lives(pid)


async def test_a_second_stop_can_cut_the_grace_short(world: World) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order(ignore_sigterm="1"))
    patient = asyncio.create_task(engine.stop(found.attempt, 600))
    await asyncio.sleep(0.05)  # let it ask first; either order is to end in time
    async with asyncio.timeout(WAIT_S):
        assert (await engine.stop(found.attempt, 0)).code == 137
        assert (await patient).code == 137


async def test_what_does_not_exist_is_stopped_and_discarded(world: World) -> None:
    engine = await world.open()
    assert await engine.stop("never-heard-of", 1) == Exit(None)
    await engine.discard("never-heard-of")


@pytest.mark.parametrize("delay_s", [0, 0.002, 0.02, 0.2])  # different moments of a start
async def test_a_stop_during_the_start_leaves_nothing_running(world: World, delay_s: float) -> None:
    engine = await world.open()
    order = world.order()
    start = asyncio.create_task(engine.start(order, ignore))
    await asyncio.sleep(delay_s)
    await engine.stop(order.attempt, 0)
    with contextlib.suppress(Cancelled):
        await start
    assert not any(found.is_running for found in await engine.list())
    assert engine.roots() == {}


async def test_a_start_whose_caller_leaves_is_still_known(world: World) -> None:
    engine = await world.open()
    order = world.order()
    start = asyncio.create_task(engine.start(order, ignore))
    await asyncio.sleep(0)
    start.cancel()
    assert (await engine.start(order, ignore)).is_running
    assert len(await engine.list()) == 1


async def test_grandchildren_that_left_the_group_end_with_it(world: World) -> None:
    engine = await world.open()
    order = with_script(world.order(), GRANDCHILD + "import time; time.sleep(600)")
    await engine.start(order, ignore)
    await read_until(engine.logs("model", order.attempt, tail=10, follow=True), b"\n")
    inside = descendants(engine.roots()[order.attempt].pid)
    assert len(inside) == 3  # the shell or the init, the service, its child
    await engine.stop(order.attempt, 5)
    assert not any(lives(pid) for pid in inside)


async def test_grandchildren_do_not_outlive_a_crash(world: World) -> None:
    engine = await world.open()
    order = with_script(world.order(), GRANDCHILD + "raise SystemExit(3)")
    await engine.start(order, ignore)
    ended = await world.exits.of(order.attempt)
    assert ended.code == 3
    if world.launch.command:  # in a container the number means something else
        assert not lives(int(ended.log_tail[0]))


# ---- after a restart ----


async def test_a_restarted_engine_adopts_what_runs_and_sees_its_exit(world: World) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    engine = await world.restart(engine)
    assert await engine.list() == (found,)
    assert found.attempt in engine.roots()
    assert await asyncio.to_thread(answers, found)
    await asyncio.to_thread(die, found, 9)
    ended = await world.exits.of(found.attempt)
    assert ended.code == 9
    assert ended.log_tail


async def test_an_exit_while_nobody_watched_is_listed_but_is_no_news(world: World) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    pid = engine.roots()[found.attempt].pid
    await engine.close()
    await asyncio.to_thread(die, found, 9)
    await asyncio.to_thread(eventually, lambda: not lives(pid))
    engine = await world.open(exits=(fresh := Exits()))
    (listed,) = await engine.list()
    assert listed.exit is not None and listed.exit.code == 9
    assert not fresh.has(found.attempt)


async def test_a_restarted_engine_stops_what_it_was_not_asked_to_list(world: World) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    engine = await world.restart(engine)
    assert (await engine.stop(found.attempt, WAIT_S)).code == 0


async def test_what_others_own_is_never_touched(world: World) -> None:
    engine, theirs = await world.open(), await world.open(world.stranger)
    found = await start_healthy(theirs, world.order())
    try:
        assert await engine.list() == ()
        assert await engine.stop(found.attempt, 0) == Exit(None)
        await engine.discard(found.attempt)
        with pytest.raises(NoLog):
            await read_all(engine.logs("model", found.attempt, tail=1, follow=False))
        assert await asyncio.to_thread(answers, found)
    finally:
        await theirs.stop(found.attempt, 0)
        await theirs.discard(found.attempt)


async def test_an_ended_attempt_is_discarded_a_running_one_is_not(world: World) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    await engine.discard(found.attempt)
    assert await asyncio.to_thread(answers, found)
    await engine.stop(found.attempt, WAIT_S)
    await engine.discard(found.attempt)
    assert await engine.list() == ()
    assert await (await world.restart(engine)).list() == ()


async def kept_are(engine: Engine, *orders: StartOrder) -> None:
    """Wait until the engine has just these attempts."""
    async with asyncio.timeout(WAIT_S):
        while {known.attempt for known in await engine.list()} != {order.attempt for order in orders}:
            pass


async def test_the_attempt_before_the_last_is_kept_for_its_log_and_no_older_one(world: World) -> None:
    engine = await world.open()
    first, second, third = (world.order(start=f"exit:1:attempt {n} failed") for n in (1, 2, 3))
    other = world.order("other", start="exit:1")
    for order in (first, other, second, third):
        await engine.start(order, ignore)
        await world.exits.of(order.attempt)
    await kept_are(engine, other, second, third)
    fourth = world.order()
    await start_healthy(engine, fourth)
    await kept_are(engine, other, third, fourth)
    for restarted in (False, True):
        engine = await world.restart(engine) if restarted else engine
        before = await read_all(engine.logs("model", None, tail=10, follow=False, previous=True))
        assert b"attempt 3 failed" in before
        now = await read_all(engine.logs("model", None, tail=10, follow=False))
        assert b"ready" in now and b"failed" not in now
    with pytest.raises(NoLog, match=r"no earlier .* was kept"):
        await read_all(engine.logs("other", None, tail=10, follow=False, previous=True))


# ---- logs ----


async def test_a_log_is_read_from_its_tail_and_followed_to_its_end(world: World) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    whole = await read_all(engine.logs("model", None, tail=1000, follow=False))
    assert b"listening on" in whole
    last = await read_all(engine.logs("model", found.attempt, tail=1, follow=False))
    assert whole.endswith(last) and last.count(b"\n") == 1
    stream = engine.logs("model", found.attempt, tail=0, follow=True)
    reading = asyncio.create_task(read_until(stream, b"GET /echo/followed"))
    while not reading.done():
        await asyncio.to_thread(answers, found, "/echo/followed")
    rest = asyncio.create_task(read_all(stream))
    await engine.stop(found.attempt, WAIT_S)
    assert b"stopping" in await rest
    assert b"listening on" in await read_all(engine.logs("model", None, tail=1000, follow=False))


async def test_a_follower_that_leaves_leaves_no_thread(world: World) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    before = {thread.name for thread in threading.enumerate()}
    stream = engine.logs("model", found.attempt, tail=1, follow=True)
    await anext(stream)
    waiting: asyncio.Task[bytes] = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration):
        await waiting
    await stream.aclose()  # type: ignore[attr-defined]
    name = f"docker-log-{found.attempt[:8]}"
    assert name not in before
    await asyncio.to_thread(eventually, lambda: name not in {thread.name for thread in threading.enumerate()})


async def test_a_log_that_was_not_kept_is_said_to_be_missing(world: World) -> None:
    engine = await world.open()
    with pytest.raises(NoLog, match="no log of 'nothing'"):
        await read_all(engine.logs("nothing", None, tail=1, follow=True))


async def test_the_log_of_another_models_attempt_is_not_this_ones(world: World) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    assert await read_all(engine.logs("model", found.attempt, tail=1, follow=False))
    with pytest.raises(NoLog, match="no log of 'other'"):
        await read_all(engine.logs("other", found.attempt, tail=1, follow=False))


# ---- processes ----


async def test_a_missing_program_is_named(processes: World) -> None:
    engine = await processes.open()
    order = processes.order()
    order = replace(order, launch=replace(order.launch, command=("not-installed", "--port", "{port}")))
    with pytest.raises(StartFailed, match=r"'not-installed'.*services/mimic/service\.yaml"):
        await engine.start(order, ignore)
    with pytest.raises(StartFailed, match="no `command`"):
        await engine.start(replace(order, launch=Launch("mimic")), ignore)
    assert await engine.list() == ()


async def test_a_process_gets_its_settings_and_none_of_ours(
    processes: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_API_KEYS", "secret")
    engine = await processes.open()
    script = "import os, sys; [print(*item, sep='=') for item in os.environ.items()]; print(sys.argv[1])"
    order = with_script(processes.order(extra="1"), script)
    command = (*(order.launch.command or ()), "--port={port}")
    gpus = tuple(Device(f"GPU-{i}", i, "", DeviceKind.GPU, 1) for i in range(2))
    found = await engine.start(
        replace(order, gpus=gpus, launch=replace(order.launch, command=command)), ignore
    )
    assert (await processes.exits.of(order.attempt)).code == 0
    lines = (await read_all(engine.logs("model", None, tail=1000, follow=False))).decode().splitlines()
    assert "secret" not in "".join(lines)
    wanted = {"MIMIC_EXTRA=1", "HOST=127.0.0.1", "CUDA_VISIBLE_DEVICES=GPU-0,GPU-1"}
    assert wanted | {f"PORT={found.port}", f"--port={found.port}"} <= set(lines)


async def test_a_process_without_a_gpu_sees_none(processes: World) -> None:
    engine = await processes.open()
    order = with_script(processes.order(), "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    await engine.start(order, ignore)
    assert (await processes.exits.of(order.attempt)).log_tail == ()


ORPHAN_MAKER = """
import asyncio, os, sys
from pathlib import Path
from orchestrator.control.ports import StartOrder
from orchestrator.core.entities import Launch
from orchestrator.drivers.process import ProcessEngine

async def main():
    engine = ProcessEngine(Path(sys.argv[1]), sys.argv[2])
    await engine.open(lambda attempt, ended: None)
    launch = Launch("mimic", command=tuple(sys.argv[3:]))
    await engine.start(StartOrder("orphan", "model", launch), lambda progress: None)
    os.kill(os.getpid(), 9)

asyncio.run(main())
"""


@pytest.mark.parametrize("is_written_down", [True, False])
async def test_a_process_outlives_its_orchestrator_and_is_found(
    processes: World, tmp_path: Path, is_written_down: bool
) -> None:
    command = [sys.executable, "-c", ORPHAN_MAKER, str(tmp_path / "state"), processes.owner]
    command += processes.launch.command or ()
    assert (await asyncio.to_thread(subprocess.run, command, check=False)).returncode == -9
    meta = tmp_path / "state" / "attempts" / "orphan" / "meta.json"
    written = json.loads(meta.read_bytes())
    if not is_written_down:  # as if it had died between the spawn and this
        meta.unlink()
    engine = await processes.open()
    (found,) = await engine.list()
    assert found == Found("orphan", "model", "127.0.0.1", written["port"])
    assert json.loads(meta.read_bytes()) == written | {
        "created_at": json.loads(meta.read_bytes())["created_at"]
    }
    await wait_healthy(found)
    await asyncio.to_thread(die, found, 4)
    assert (await processes.exits.of("orphan")).code == 4


@pytest.mark.parametrize("same_boot", [True, False])
async def test_a_pid_that_somebody_else_has_now_is_not_taken_for_ours(
    processes: World, tmp_path: Path, same_boot: bool
) -> None:
    engine = await processes.open()
    found = await start_healthy(engine, processes.order())
    await engine.stop(found.attempt, WAIT_S)
    folder = Folder(tmp_path / "state" / "attempts" / found.attempt)
    meta = folder.read()
    assert meta is not None
    us = process_tree.read_process(os.getpid())
    assert us is not None
    meta = replace(meta, pid=us.pid)
    if not same_boot:
        meta = replace(meta, started_ticks=us.started_ticks, boot_id="an earlier one")
    await asyncio.to_thread(folder.write, meta)
    engine = await processes.restart(engine)
    assert [known.is_running for known in await engine.list()] == [False]
    await engine.stop(found.attempt, 0)  # and this test lives on


async def test_a_state_folder_that_cannot_be_made_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    engine = ProcessEngine(tmp_path / "file", "me")
    with pytest.raises(EngineUnavailable, match="may write"):
        await engine.open(Exits())


async def test_a_stop_right_after_the_spawn_is_not_lost_on_the_shell(processes: World) -> None:
    engine = await processes.open()
    sleeper = replace(processes.order(), launch=Launch("mimic", command=("sleep", "600")))
    async with asyncio.timeout(WAIT_S):
        for _ in range(30):
            order = replace(sleeper, attempt=uuid.uuid4().hex)
            start = asyncio.create_task(engine.start(order, ignore))
            await asyncio.sleep(0)
            await engine.stop(order.attempt, 600)
            with pytest.raises(Cancelled):
                await start


async def test_a_start_costs_little_more_than_its_spawn(processes: World) -> None:
    engine = await processes.open()
    order = with_script(processes.order(), "input()")
    took_s = []
    for _ in range(10):
        begun_s = time.process_time()  # of all threads; a busy machine does not change it
        await engine.start(replace(order, attempt=uuid.uuid4().hex), ignore)
        took_s.append(time.process_time() - begun_s)
    assert min(took_s) < 0.010


# What a server that has run out of descriptors, or of disk, meets.


def refuse(*args: object, **kwargs: object) -> Any:
    raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("unreadable", ["process._exit_of", "process_tree.members"])
async def test_an_exit_is_told_even_if_nothing_about_it_can_be_read(
    processes: World, monkeypatch: pytest.MonkeyPatch, unreadable: str
) -> None:
    engine = await processes.open()
    found = await start_healthy(engine, processes.order())
    monkeypatch.setattr(f"orchestrator.drivers.{unreadable}", refuse)
    await asyncio.to_thread(die, found, 5)
    ended = await processes.exits.of(found.attempt)
    assert ended.code == (5 if unreadable == "process_tree.members" else None)
    assert await engine.stop(found.attempt, 1) == ended
    assert [known.exit for known in await engine.list()] == [ended]
    assert engine.roots() == {}


async def test_a_stop_that_can_see_no_process_is_asked_for_again(
    processes: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it raises must be an EngineError, which is retried: everything else ends the server."""
    engine = await processes.open()
    found = await start_healthy(engine, processes.order())
    with monkeypatch.context() as patched:
        patched.setattr(process_tree, "members", refuse)
        with pytest.raises(EngineError):
            await engine.stop(found.attempt, 1)
    async with asyncio.timeout(WAIT_S):
        await engine.stop(found.attempt, 5)
    assert engine.roots() == {}


async def test_a_start_without_a_port_fails(processes: World, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await processes.open()
    order = processes.order()
    with monkeypatch.context() as patched:
        patched.setattr("orchestrator.drivers.process_ports.socket.socket", refuse)
        with pytest.raises(StartFailed, match="No port"):
            await engine.start(order, ignore)
    assert await engine.list() == ()
    await start_healthy(engine, order)


@pytest.mark.parametrize("refused", ["process_folder.Folder.make", "process.subprocess.Popen"])
async def test_a_start_that_cannot_be_spawned_fails(
    processes: World, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    engine = await processes.open()
    order = processes.order()
    with monkeypatch.context() as patched:
        patched.setattr(f"orchestrator.drivers.{refused}", refuse)
        with pytest.raises(StartFailed, match="Too many open files"):
            await engine.start(order, ignore)
    assert await engine.list() == ()
    await start_healthy(engine, order)


async def test_a_start_that_cannot_be_written_down_fails_and_leaves_nothing(
    processes: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its shell is just about to fork: whatever moment the kill meets, the fork is not to escape."""
    engine = await processes.open()
    sleeper = replace(processes.order(), launch=Launch("mimic", command=("sleep", "30")))
    with monkeypatch.context() as patched:
        patched.setattr(Folder, "write", refuse)
        for _ in range(20):
            with pytest.raises(StartFailed, match="Too many open files"):
                await engine.start(replace(sleeper, attempt=uuid.uuid4().hex), ignore)
    await asyncio.to_thread(eventually, lambda: not process_tree.marked_processes(processes.owner), 2)
    assert engine.roots() == {}
    assert await engine.list() == ()
    assert list(os.scandir(tmp_path / "state" / "attempts")) == []


async def test_a_start_that_cannot_be_watched_fails_and_leaves_no_process(
    processes: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await processes.open()
    order = processes.order()
    with monkeypatch.context() as patched:
        patched.setattr(os, "pidfd_open", refuse)
        with pytest.raises(EngineError):
            await engine.start(order, ignore)
    async with asyncio.timeout(WAIT_S):
        await engine.stop(order.attempt, 1)
    assert process_tree.marked_processes(processes.owner) == ()


async def test_what_cannot_be_written_down_at_the_restart_is_adopted_all_the_same(
    processes: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await processes.open()
    found = await start_healthy(engine, processes.order())
    (tmp_path / "state" / "attempts" / found.attempt / "meta.json").unlink()
    monkeypatch.setattr(Folder, "write", refuse)
    engine = await processes.restart(engine)
    assert await engine.list() == (found,)


# ---- containers ----


@pytest.mark.docker
async def test_a_missing_image_fails_with_the_command_that_gets_it(containers: World) -> None:
    engine = await containers.open()
    order = containers.order()
    steps: list[Progress] = []
    nowhere = f"127.0.0.1:{free_port()}/some/model:1"
    with pytest.raises(ImageMissing, match=f"docker pull {nowhere}"):
        await engine.start(replace(order, launch=replace(order.launch, image=nowhere)), steps.append)
    assert steps[0].stage == "pulling image"
    ours = replace(order.launch, image="orchestrator/not-built:1")
    with pytest.raises(ImageMissing, match="docker build -t orchestrator/not-built:1 services/mimic"):
        await engine.start(replace(order, launch=ours), ignore)
    with pytest.raises(StartFailed, match="no `image`"):
        await engine.start(replace(order, launch=Launch("mimic")), ignore)
    assert await engine.list() == ()


@pytest.mark.docker
async def test_a_pull_that_hangs_is_given_up_by_a_stop(containers: World) -> None:
    engine = await containers.open()
    order = containers.order()
    is_pulling = asyncio.Event()
    with socket.create_server(("127.0.0.1", 0)) as registry:  # takes connections, and says nothing
        image = f"127.0.0.1:{registry.getsockname()[1]}/some/model:1"
        order = replace(order, launch=replace(order.launch, image=image))
        start = asyncio.create_task(engine.start(order, lambda progress: is_pulling.set()))
        await is_pulling.wait()
        async with asyncio.timeout(WAIT_S):
            assert await engine.stop(order.attempt, 10) == Exit(None)
            with pytest.raises(Cancelled):
                await start
    assert await engine.list() == ()


@pytest.mark.docker
async def test_a_container_that_was_never_started_is_removed_by_its_stop(containers: World) -> None:
    order = containers.order()
    container = await asyncio.to_thread(create_only, containers, order)
    engine = await containers.open()
    assert [found.is_running for found in await engine.list()] == [False]
    assert await engine.stop(order.attempt, 1) == Exit(None)
    assert status_of(container) is None, "an engine that is late with its start must find nothing"
    assert await engine.list() == ()
    await start_healthy(engine, order)


@pytest.mark.docker
async def test_a_container_that_the_engine_starts_late_is_seen_to_run(containers: World) -> None:
    order = containers.order()
    container = await asyncio.to_thread(create_only, containers, order)
    engine = await containers.open()
    assert [found.is_running for found in await engine.list()] == [False]
    with docker_client() as client:
        client.containers.get(container).start()
    assert [found.is_running for found in await engine.list()] == [True]
    assert engine.roots()[order.attempt].container_id == container
    await engine.stop(order.attempt, 1)
    assert status_of(container) == "exited"
    assert engine.roots() == {}


@pytest.mark.docker
async def test_a_stop_ends_what_the_engine_has_started_late_and_nobody_has_listed(containers: World) -> None:
    order = containers.order()
    container = await asyncio.to_thread(create_only, containers, order)
    engine = await containers.open()
    with docker_client() as client:
        client.containers.get(container).start()
    await engine.stop(order.attempt, 1)
    assert status_of(container) in (None, "exited")
    assert not any(found.is_running for found in await engine.list())


@pytest.mark.docker
async def test_a_fixed_name_is_taken_over_from_our_ended_containers_only(containers: World) -> None:
    engine = await containers.open()
    name = f"{containers.owner}-fixed"
    first, second = containers.order(), containers.order()
    first, second = (replace(o, launch=replace(o.launch, container_name=name)) for o in (first, second))
    await engine.start(first, ignore)
    with pytest.raises(NameTaken, match=f"docker rm -f {name}"):
        await engine.start(second, ignore)
    await engine.stop(first.attempt, 0)
    assert (await engine.start(second, ignore)).is_running
    with docker_client() as client:
        assert client.containers.get(name).labels[docker_spec.ATTEMPT_LABEL] == second.attempt
    stranger = await containers.open(containers.stranger)
    third = replace(containers.order(), launch=second.launch)
    with pytest.raises(NameTaken, match=f"not ours.*docker rm -f {name}"):
        await stranger.start(third, ignore)


@pytest.mark.docker
async def test_a_container_is_shut_off_and_cannot_come_back_by_itself(containers: World) -> None:
    engine = await containers.open()
    order = containers.order()
    order = replace(order, launch=replace(order.launch, shm_bytes=128 * 2**20, port=8123))
    found = await start_healthy(engine, order)
    assert found.port == 8123
    with docker_client() as client:
        attrs = client.containers.get(engine.roots()[order.attempt].container_id or "").attrs
        (network,) = attrs["NetworkSettings"]["Networks"]
        assert client.networks.list(names=[network])[0].attrs["Labels"][docker_spec.OWNER_LABEL]
    host = attrs["HostConfig"]
    assert attrs["NetworkSettings"]["Ports"] in ({}, {"8000/tcp": None})  # nothing is published
    assert host["RestartPolicy"]["Name"] == "no" and not host["Privileged"] and host["Init"]
    assert host["CapDrop"] == ["ALL"] and host["SecurityOpt"] == ["no-new-privileges"]
    assert host["ShmSize"] == 128 * 2**20
    assert attrs["Config"]["Labels"][docker_spec.MODEL_LABEL] == "model"


@pytest.mark.docker
async def test_volumes_and_mounts_are_where_they_are_wanted(containers: World, tmp_path: Path) -> None:
    engine = await containers.open()
    (tmp_path / "weights").write_text("weights")
    volume, cache = f"{containers.owner}-volume", f"{containers.owner}-cache"
    order = containers.order()
    launch = replace(
        order.launch,
        volumes={volume: "/data", str(tmp_path): "/work", cache: "/cache"},
        read_only_volumes=frozenset({cache}),
        mounts=((str(tmp_path), "/models"),),
    )
    await start_healthy(engine, replace(order, launch=launch))
    with docker_client() as client:
        box = client.containers.get(engine.roots()[order.attempt].container_id or "")
        assert box.exec_run(["cat", "/models/weights"], user="0").output == b"weights"
        assert box.exec_run(["touch", "/models/new"], user="0").exit_code != 0
        assert box.exec_run(["touch", "/work/new", "/data/new"], user="0").exit_code == 0
        assert b"Read-only" in box.exec_run(["touch", "/cache/new"], user="0").output
        box.remove(force=True)
        for name in (volume, cache):
            client.volumes.get(name).remove()
    missing = replace(launch, volumes={}, mounts=((str(tmp_path / "missing"), "/models"),))
    with pytest.raises(StartFailed, match="missing"):
        await engine.start(replace(containers.order(), launch=missing), ignore)
    assert not (tmp_path / "missing").exists()


@pytest.mark.docker
async def test_a_container_removed_by_somebody_has_ended(containers: World) -> None:
    engine = await containers.open()
    found = await start_healthy(engine, containers.order())
    with docker_client() as client:
        client.containers.get(engine.roots()[found.attempt].container_id or "").remove(force=True)
    await containers.exits.of(found.attempt)
    assert await engine.stop(found.attempt, 1) == await containers.exits.of(found.attempt)


@pytest.mark.docker
async def test_running_out_of_memory_is_told(containers: World) -> None:
    engine = await containers.open()
    found = await engine.start(containers.order(ram_mib="400", load_s="4"), ignore)
    with docker_client() as client:
        box = client.containers.get(engine.roots()[found.attempt].container_id or "")
        box.update(mem_limit="64m", memswap_limit="64m")
    ended = await containers.exits.of(found.attempt)
    assert (ended.code, ended.oom) == (137, True)


async def test_news_of_containers_that_are_never_known_is_not_kept_for_ever() -> None:
    engine = DockerEngine("owner", "network")
    for number in range(3 * REMEMBERED_ENDS):
        for action in ("oom", "die"):
            attributes = {ATTEMPT_LABEL: f"attempt-{number}"}
            engine._heard({"Action": action, "Actor": {"ID": "gone", "Attributes": attributes}})
    assert len(engine._ran_out) == len(engine._ended_early) == REMEMBERED_ENDS


@pytest.mark.docker
async def test_a_pruned_network_is_made_again(containers: World) -> None:
    engine = await containers.open()
    found = await engine.start(containers.order(), ignore)
    await engine.stop(found.attempt, 0)
    await engine.discard(found.attempt)
    with docker_client() as client:
        for network in client.networks.list(
            filters={"label": f"{docker_spec.OWNER_LABEL}={containers.owner}"}
        ):
            network.remove()
    await start_healthy(engine, containers.order())


@pytest.mark.docker
async def test_two_orchestrators_that_need_the_network_at_once_make_one(containers: World) -> None:
    engines = [await containers.open() for _ in range(4)]
    founds = await asyncio.gather(*(engine.start(containers.order(), ignore) for engine in engines))
    for found in founds:
        await wait_healthy(found)
    with docker_client() as client:
        labelled = {"label": f"{docker_spec.OWNER_LABEL}={containers.owner}"}
        assert len(client.networks.list(filters=labelled)) == 1


@pytest.mark.docker
async def test_an_engine_that_was_away_is_unavailable_and_its_exits_are_not_lost(
    containers: World, tmp_path: Path
) -> None:
    with EngineProxy(tmp_path / "docker.sock") as proxy:
        await be_away(containers, proxy)


async def be_away(containers: World, proxy: EngineProxy) -> None:
    network = f"{containers.owner}-net"
    containers._make = lambda owner: DockerEngine(owner, network, "none", proxy.url)
    engine = await containers.open()
    found = await start_healthy(engine, containers.order())
    await asyncio.to_thread(proxy.leave)
    for call in (engine.list(), engine.stop(found.attempt, 1), engine.start(containers.order(), ignore)):
        with pytest.raises(EngineUnavailable):
            await call
    assert await engine.health() is not None
    assert found.attempt in engine.roots()  # nothing is known, so nothing is given up
    await asyncio.to_thread(die, found, 6)
    assert not containers.exits.has(found.attempt)
    await asyncio.to_thread(proxy.listen)
    assert (await containers.exits.of(found.attempt)).code == 6
    assert await engine.health() is None
    again = await start_healthy(engine, containers.order())
    await asyncio.to_thread(die, again, 8)
    assert (await containers.exits.of(again.attempt)).code == 8
    for known in await engine.list():
        await engine.discard(known.attempt)
    await engine.close()


async def test_no_engine_is_said_with_what_to_do(tmp_path: Path) -> None:
    engine = DockerEngine("me", "net", base_url=f"unix://{tmp_path}/none.sock")
    with pytest.raises(EngineUnavailable, match="systemctl start docker"):
        await engine.open(Exits())
    await engine.close()


async def test_whoever_asks_before_the_engine_has_answered_is_told_so(tmp_path: Path) -> None:
    engine = DockerEngine("me", "net", base_url=f"unix://{tmp_path}/none.sock")
    with pytest.raises(EngineUnavailable, match="not answered yet"):
        await anext(aiter(engine.logs("model", None, tail=1, follow=False)))
    assert "not answered yet" in (await engine.health() or "")
    await engine.close()


async def test_a_container_that_this_engine_does_not_know_has_no_name(world: World) -> None:
    assert await (await world.open()).container_name("0" * 64) is None


@pytest.mark.docker
async def test_a_strangers_container_has_a_name_and_is_left_alone(containers: World) -> None:
    engine = await containers.open()
    with strangers_container(containers) as theirs:
        began_at = theirs.attrs["State"]["StartedAt"]
        assert await engine.container_name(theirs.id) == containers.stranger
        theirs.rename(f"{containers.stranger}-renamed")
        assert await engine.container_name(theirs.id) == f"{containers.stranger}-renamed"
        assert await engine.list() == ()
        theirs.reload()
        assert (theirs.status, theirs.attrs["State"]["StartedAt"]) == ("running", began_at)
        theirs.remove(force=True)
        assert await engine.container_name(theirs.id) is None


@pytest.mark.docker
async def test_two_attempts_at_the_same_thing_have_the_same_spec(containers: World) -> None:
    one, two = containers.order(), containers.order()
    bodies = [docker_spec.container_body(order, "image", "owner", "net") for order in (one, two)]
    other = docker_spec.container_body(one, "image:2", "owner", "net")
    assert bodies[0]["Labels"][docker_spec.SPEC_LABEL] == bodies[1]["Labels"][docker_spec.SPEC_LABEL]
    assert bodies[0]["Labels"][docker_spec.SPEC_LABEL] != other["Labels"][docker_spec.SPEC_LABEL]
    assert f"ORCHESTRATOR_ATTEMPT={one.attempt}" in bodies[0]["Env"]


# ---- the parts ----

GPU = Device("GPU-1234", 1, "", DeviceKind.GPU, 1)


def order_of(**launch: Any) -> StartOrder:
    return StartOrder("0123456789abcdef", "Qwen/Q3 (test)", Launch("mimic", **launch))


def test_a_container_is_named_after_its_model_and_attempt() -> None:
    assert docker_spec.container_name(order_of()) == "orchestrator-Qwen-Q3-test-01234567"
    assert docker_spec.container_name(order_of(container_name="llama-cpp")) == "llama-cpp"


def test_the_port_is_filled_in_everywhere() -> None:
    order = order_of(port=81, container_command=("-p", "{port}"), container_environment={"X": "at {port}"})
    body = docker_spec.container_body(order, "image", "owner", "net")
    assert body["Cmd"] == ["-p", "81"]
    assert {"X=at 81", "PORT=81", "HOST=0.0.0.0"} <= set(body["Env"])
    assert "Cmd" not in docker_spec.container_body(order_of(), "image", "owner", "net")


def test_gpu_access_takes_the_best_there_is(tmp_path: Path) -> None:
    (tmp_path / "cdi").mkdir()
    new = {"ServerVersion": "28.3.1", "CDISpecDirs": [str(tmp_path / "cdi")]}

    def choose(info: dict[str, Any]) -> str:
        return docker_gpu.choose_mode("auto", info, tmp_path)

    assert choose(new) == "none"
    (tmp_path / "nvidiactl").touch()
    assert choose(new) == "devices"
    (tmp_path / "cdi" / "nvidia.yaml").touch()
    assert choose(new) == "cdi"
    assert choose(new | {"ServerVersion": "20.10.24+dfsg1"}) == "devices"
    assert choose(new | {"Runtimes": {"runc": {}, "nvidia": {}}}) == "nvidia"
    assert choose({"ServerVersion": "28", "DiscoveredDevices": [{"ID": "nvidia.com/gpu=all"}]}) == "cdi"
    assert docker_gpu.choose_mode("none", new, tmp_path) == "none"


def test_gpus_are_named_by_uuid(tmp_path: Path) -> None:
    part = docker_gpu.gpu_part(docker_gpu.GpuMode.NVIDIA, (GPU,))
    assert part.device_requests == ({"DeviceIDs": ["GPU-1234"], "Capabilities": [["gpu"]]},)
    part = docker_gpu.gpu_part(docker_gpu.GpuMode.CDI, (GPU,))
    assert part.device_requests == ({"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=GPU-1234"]},)
    (tmp_path / "nvidia-uvm-tools").touch()
    part = docker_gpu.gpu_part(docker_gpu.GpuMode.DEVICES, (GPU,), tmp_path)
    assert [Path(path).name for path in part.devices] == [
        "nvidia1",
        "nvidiactl",
        "nvidia-uvm",
        "nvidia-uvm-tools",
    ]
    assert part.environment["NVIDIA_VISIBLE_DEVICES"] == "GPU-1234"
    none = docker_gpu.gpu_part(docker_gpu.GpuMode.DEVICES, ())
    assert none == docker_gpu.GpuPart(environment={"NVIDIA_VISIBLE_DEVICES": "void"})


def test_the_drivers_libraries_are_found_and_put_on_the_path() -> None:
    listed = """5 libs found in cache `/etc/ld.so.cache'
\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcuda.so.1
\tlibcuda.so.1 (libc6) => /usr/lib/i386-linux-gnu/libcuda.so.1
\tlibcuda.so (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcuda.so
\tlibnvidia-ml.so.1 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1
\tlibcudart.so.12 (libc6,x86-64) => /usr/local/cuda/lib64/libcudart.so.12
"""
    assert list(docker_gpu.driver_libraries(listed)) == ["libcuda.so.1", "libnvidia-ml.so.1"]

    def path(env: dict[str, str], image: list[str]) -> str:
        return docker_gpu.with_libraries(env, image)["LD_LIBRARY_PATH"]

    assert path({}, []) == "/usr/local/nvidia/lib64"
    assert path({}, ["LD_LIBRARY_PATH=/opt"]) == "/usr/local/nvidia/lib64:/opt"
    assert "LD_LIBRARY_PATH" not in docker_gpu.with_libraries(
        {}, ["LD_LIBRARY_PATH=/a:/usr/local/nvidia/lib64"]
    )


def test_pull_progress_counts_both_halves_and_never_goes_back() -> None:
    progress = PullProgress()
    assert progress.fraction is None
    seen: list[float | None] = []
    for status, layer, current in [
        ("Pulling fs layer", "a", 0),
        ("Downloading", "a", 50),
        ("Downloading", "b", 0),
        ("Download complete", "a", 0),
        ("Extracting", "a", 100),
        ("Pull complete", "a", 0),
        ("Download complete", "b", 0),
        ("Pull complete", "b", 0),
    ]:
        detail = {"current": current, "total": 100} if status in ("Downloading", "Extracting") else {}
        progress.add({"status": status, "id": layer, "progressDetail": detail})
        seen.append(progress.fraction)
    assert seen == [None, 0.25, 0.25, 0.25, 0.5, 0.5, 0.75, 1.0]


def test_a_refused_pull_has_the_engines_reason() -> None:
    lines = [{"status": "Pulling from some/model"}, {"error": "manifest unknown"}]
    with pytest.raises(EngineError, match="manifest unknown"):
        follow_pull(lines, "some/model", ignore, lambda: False)
    follow_pull(lines, "some/model", ignore, lambda: True)


def test_a_tail_begins_at_a_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"".join(b"%06d\n" % n for n in range(30_000)) + b"unfinished")
    for lines, begin in [(1, b"unfinished"), (2, b"029999\n"), (20_002, b"009999\n"), (99_999, b"000000\n")]:
        assert log.read_bytes()[BoundedLog(log).tail(lines) :].startswith(begin)
    assert BoundedLog(log).tail(0) == log.stat().st_size
    assert last_lines(b"one\r10%\r20%\n\n\xff" + b"x" * 5000, 2)[0] == "20%"
