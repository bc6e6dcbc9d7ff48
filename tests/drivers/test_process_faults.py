"""Processes that will not end, or leave others behind; a machine that has run out of things; long logs."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from orchestrator.control.ports import Engine, Exit, Found, StartOrder
from orchestrator.core.errors import EngineError, EngineUnavailable, StartFailed
from orchestrator.drivers import log_tail, process, process_tree
from orchestrator.drivers.log_tail import BoundedLog
from orchestrator.drivers.process import ProcessEngine
from orchestrator.drivers.process_folder import Folder, Meta
from orchestrator.drivers.process_tree import Process, boot_id, read_process, send
from tests.drivers.engines import (
    WAIT_S,
    World,
    answers,
    die,
    ignore,
    lives,
    read_all,
    read_until,
    start_healthy,
    with_script,
)
from tests.support import eventually

# A daemon as the books have it: a session of its own, an orphan, every descriptor closed.
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        os.closerange(0, 1024)
        time.sleep(600)
    os._exit(0)
"""
SLEEP = "import time; time.sleep(600)"
SMALL = 64 * 1024


async def until(condition: object) -> None:
    assert callable(condition)
    await asyncio.to_thread(eventually, condition, WAIT_S)


async def first_line(engine: Engine, found: Found) -> bytes:
    stream = engine.logs(found.model, found.attempt, tail=10, follow=True)
    return (await read_until(stream, b"\n")).splitlines()[0]


# ---- processes that stay ----


async def test_a_daemon_ends_with_its_attempt(processes: World) -> None:
    engine = await processes.open()
    found = await engine.start(with_script(processes.order(), DAEMON + SLEEP), ignore)
    daemon = int(await first_line(engine, found))
    assert lives(daemon)
    await engine.stop(found.attempt, 1)
    assert not lives(daemon)


async def test_a_daemon_whose_attempt_ended_unseen_ends_at_the_restart(processes: World) -> None:
    engine = await processes.open()
    found = await engine.start(with_script(processes.order(), DAEMON + SLEEP), ignore)
    daemon, root = int(await first_line(engine, found)), engine.roots()[found.attempt].pid
    await engine.close()
    os.killpg(root, signal.SIGKILL)
    await until(lambda: not lives(root))
    assert lives(daemon)
    engine = await processes.open()
    assert [known.is_running for known in await engine.list()] == [False]
    assert not lives(daemon)


async def test_a_killed_wrapper_takes_its_service_along(processes: World) -> None:
    engine = await processes.open()
    found = await start_healthy(engine, processes.order())
    os.kill(engine.roots()[found.attempt].pid, signal.SIGKILL)
    assert (await processes.exits.of(found.attempt)).code == 137
    assert not await asyncio.to_thread(answers, found)


async def test_a_suspended_process_is_killed_after_the_grace(processes: World) -> None:
    engine = await processes.open()
    found = await start_healthy(engine, processes.order())
    root = engine.roots()[found.attempt].pid
    os.killpg(root, signal.SIGSTOP)
    await asyncio.wait_for(engine.stop(found.attempt, 0.2), WAIT_S)
    assert engine.roots() == {} and not lives(root)


async def test_what_survives_sigkill_is_running_until_it_is_gone(
    processes: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that hangs in the kernel does. The stop goes on, and never says that it has ended."""
    engine = await processes.open()
    found = await start_healthy(engine, processes.order(ignore_sigterm="1"))
    kills: list[int] = []

    def send_in_vain(targets: Iterable[Process], number: signal.Signals) -> None:
        kills.extend(target.pid for target in targets)

    with monkeypatch.context() as patched:
        patched.setattr(process_tree, "send", send_in_vain)
        stop = asyncio.create_task(engine.stop(found.attempt, 0))
        await until(lambda: len(kills) > 6)
        assert not stop.done() and not processes.exits.has(found.attempt)
        assert await engine.list() == (found,) and found.attempt in engine.roots()
    assert (await asyncio.wait_for(stop, WAIT_S)).code == 137
    assert engine.roots() == {}


# ---- whose number is it? ----


def stranger() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "600"], start_new_session=True)


def test_a_signal_meets_the_process_that_was_seen_and_no_later_one_of_its_number() -> None:
    with stranger() as other:
        seen = read_process(other.pid)
        assert seen is not None
        earlier = replace(seen, started_ticks=seen.started_ticks - 1)
        send([earlier], signal.SIGKILL)
        assert lives(other.pid)
        send([replace(seen, pid=2**22 - 1), seen], signal.SIGKILL)  # one that has ended is no obstacle
        assert other.wait(WAIT_S) == -signal.SIGKILL


async def test_a_strangers_session_under_the_number_of_an_ended_attempt_is_not_touched(
    processes: World, tmp_path: Path
) -> None:
    """A shell that got the number later, has left a job in the background, and has ended."""
    shell = subprocess.Popen(  # noqa: ASYNC220 - it is gone at once
        ["/bin/sh", "-c", "sleep 600 >/dev/null & echo $!"], stdout=subprocess.PIPE, start_new_session=True
    )
    job = int((await asyncio.to_thread(shell.communicate))[0])
    try:
        folder = Folder(tmp_path / "state" / "attempts" / "old")
        await asyncio.to_thread(folder.make)
        meta = Meta("old", "model", processes.owner, shell.pid, 1, boot_id(), 1, 1.0)
        await asyncio.to_thread(folder.write, meta)
        engine = await processes.open()
        assert [known.exit for known in await engine.list()] == [Exit(None)]
        await engine.stop("old", 0)
        assert lives(job)
    finally:
        os.kill(job, signal.SIGKILL)


@contextmanager
def answering_stranger() -> Iterator[int]:
    """A server of somebody else's that says 200 to everything; its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


async def test_a_stranger_that_answers_at_the_port_is_not_taken_for_the_attempt(
    processes: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await processes.open()
    assert isinstance(engine, ProcessEngine)
    with answering_stranger() as port:
        monkeypatch.setattr(process, "free_port", lambda taken: port)
        found = await engine.start(with_script(processes.order(), SLEEP), ignore)
        assert found.port == port and await asyncio.to_thread(answers, found)
        assert not await engine.serves(found.attempt)
    assert not await engine.serves("never-heard-of")


LISTENER = """
import os, socket, time
kind = socket.AF_INET6 if ":" in ADDRESS else socket.AF_INET
server = socket.socket(kind)
server.bind((ADDRESS, int(os.environ["PORT"])))
server.listen()
if os.fork() == 0:
    os.setsid()
    print("listens", flush=True)
    time.sleep(600)
server.close()
time.sleep(600)
"""


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::", "::ffff:127.0.0.1"])
async def test_whatever_process_of_the_attempt_listens_is_the_attempt(processes: World, address: str) -> None:
    engine = await processes.open()
    assert isinstance(engine, ProcessEngine)
    order = with_script(processes.order(), LISTENER.replace("ADDRESS", repr(address)))
    found = await engine.start(order, ignore)
    assert await first_line(engine, found) == b"listens"
    assert await engine.serves(found.attempt)


# ---- a machine that has run out ----


@contextmanager
def no_descriptors() -> Iterator[None]:
    """What is open stays open; nothing else can be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_without_descriptors_nothing_is_known_and_nothing_is_lost(
    processes: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_LOOKS", 3)
    engine = await processes.open()
    found, doomed = [await start_healthy(engine, processes.order(name)) for name in ("one", "other")]
    with no_descriptors():
        for call in (
            engine.list(),
            engine.stop("never-heard-of", 0),
            engine.logs("one", None, tail=1, follow=False),
        ):
            with pytest.raises(EngineUnavailable):
                await (call if asyncio.iscoroutine(call) else read_all(call))
        with pytest.raises(StartFailed):
            await engine.start(processes.order(), ignore)
        with pytest.raises(EngineError):
            await engine.stop(doomed.attempt, 0)
        os.killpg(engine.roots()[doomed.attempt].pid, signal.SIGKILL)
        await processes.exits.of(doomed.attempt)
    assert [known.attempt for known in await engine.list() if known.is_running] == [found.attempt]
    assert (await engine.stop(found.attempt, WAIT_S)).code == 0


async def test_a_log_that_cannot_be_read_on_is_an_error_of_the_engine(processes: World) -> None:
    """Any other error would end whoever reads it: the server itself, where it reads what a start has said."""
    engine = await processes.open()
    found = await engine.start(with_script(processes.order(), f"print('one', flush=True); {SLEEP}"), ignore)
    chunks = aiter(engine.logs("model", found.attempt, tail=10, follow=True))
    assert await anext(chunks) == b"one\n"
    with no_descriptors(), pytest.raises(EngineUnavailable, match="Too many open files"):
        await anext(chunks)


async def test_a_process_that_could_not_be_read_after_its_spawn_leaves_nothing(
    processes: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await processes.open()

    def refuse(pid: int) -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(process_tree, "started_ticks", refuse)
        with pytest.raises(StartFailed, match="Too many open files"):
            await engine.start(processes.order(), ignore)
    await until(lambda: not process_tree.marked_processes(processes.owner))


async def test_what_a_process_left_ends_as_soon_as_it_can_be_seen(
    processes: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await processes.open()
    found = await engine.start(with_script(processes.order(), DAEMON + SLEEP), ignore)
    daemon = int(await first_line(engine, found))
    with monkeypatch.context() as patched:

        def refuse(*args: object, **kwargs: object) -> tuple[Process, ...]:
            raise OSError(24, "Too many open files")

        patched.setattr(process_tree, "members", refuse)
        os.killpg(engine.roots()[found.attempt].pid, signal.SIGKILL)
        await processes.exits.of(found.attempt)
        assert lives(daemon)
    await until(lambda: not lives(daemon))


async def test_a_program_that_may_not_be_executed_is_named(processes: World, tmp_path: Path) -> None:
    engine = await processes.open()
    program = tmp_path / "server"
    program.write_text("#!/no/such/interpreter\n")
    order = processes.order()
    order = replace(order, launch=replace(order.launch, command=(str(program),)))
    with pytest.raises(StartFailed, match=rf"may not execute.*chmod \+x {program}"):
        await engine.start(order, ignore)
    program.chmod(0o755)
    order = replace(order, attempt=uuid.uuid4().hex)
    await engine.start(order, ignore)
    ended = await processes.exits.of(order.attempt)
    assert ended.code in (126, 127) and "not found" in "\n".join(ended.log_tail)


async def test_an_attempt_whose_folder_cannot_be_made_is_not_started(
    processes: World, tmp_path: Path
) -> None:
    engine = await processes.open()
    order = processes.order()
    attempts = tmp_path / "state" / "attempts"
    (attempts / order.attempt).touch()
    with pytest.raises(StartFailed, match="could not be started"):
        await engine.start(order, ignore)
    assert process_tree.marked_processes(processes.owner) == ()


async def test_the_exit_code_is_known_although_it_could_not_be_written_down(
    processes: World, tmp_path: Path
) -> None:
    engine = await processes.open()
    order = processes.order()
    await asyncio.to_thread((tmp_path / "state" / "attempts" / order.attempt / "exit").mkdir, parents=True)
    found = await start_healthy(engine, order)
    await asyncio.to_thread(die, found, 5)
    assert (await processes.exits.of(found.attempt)).code == 5


# ---- long logs ----


@pytest.fixture
def short_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    bounded = partial(BoundedLog, limit_bytes=SMALL)
    monkeypatch.setattr("orchestrator.drivers.process_folder.BoundedLog", bounded)
    monkeypatch.setattr(process, "_CUT_EVERY_S", 0.02)


def size_on_disk(folder: Path) -> int:
    return 512 * (folder / "log").stat().st_blocks


BLOCKS = 24
TALKER = f"""
import os, time
for block in range({BLOCKS}):
    while os.path.getsize(os.environ["MIMIC_GO"]) < block:
        time.sleep(0.002)
    print(*(f"{{block:04d}}.{{line:04d}} {{'x' * 20}}" for line in range(1000)), sep="\\n", flush=True)
time.sleep(600)
"""


@pytest.mark.usefixtures("short_logs")
async def test_a_long_log_is_followed_without_a_gap_while_it_is_cut(processes: World, tmp_path: Path) -> None:
    engine = await processes.open()
    go, seen, want = tmp_path / "go", b"", BLOCKS * 1000
    go.touch()
    order = with_script(processes.order(go=str(go)), TALKER)
    await engine.start(order, ignore)
    folder = tmp_path / "state" / "attempts" / order.attempt
    stream = engine.logs("model", None, tail=100_000, follow=True)
    async with asyncio.timeout(2 * WAIT_S):
        while seen.count(b"\n") < want:
            seen += await anext(stream)
            blocks = seen.count(b"\n") // 1000
            await asyncio.to_thread(go.write_bytes, b"." * blocks)
    assert len(seen) > 8 * SMALL
    numbers = [line.split()[0] for line in seen.splitlines()]
    assert numbers == [f"{n // 1000:04d}.{n % 1000:04d}".encode() for n in range(want)]
    await until(lambda: size_on_disk(folder) <= SMALL + 8192)
    last = await read_all(engine.logs("model", None, tail=2000, follow=False))
    assert [line.split()[0] for line in last.splitlines()] == numbers[-2000:]
    engine = await processes.restart(engine)
    assert await read_all(engine.logs("model", None, tail=2000, follow=False)) == last


@pytest.mark.usefixtures("short_logs")
async def test_a_flood_of_output_stays_small_and_ends_with_its_last_lines(
    processes: World, tmp_path: Path
) -> None:
    engine = await processes.open()
    script = "import sys; [print('y' * 99) for _ in range(200_000)]; print('the end'); sys.exit(4)"
    order = with_script(processes.order(), script)
    await engine.start(order, ignore)
    ended = await processes.exits.of(order.attempt)
    assert ended.code == 4 and ended.log_tail[-1] == "the end" and len(ended.log_tail) == 20
    assert size_on_disk(tmp_path / "state" / "attempts" / order.attempt) <= SMALL + 8192
    assert (await read_all(engine.logs("model", None, tail=1, follow=False))) == b"the end\n"


async def test_binary_output_without_lines_is_kept_and_shown_in_short(processes: World) -> None:
    engine = await processes.open()
    script = "import os, sys; sys.stdout.buffer.write(bytes(range(128, 256)) * 3000)"
    order = with_script(processes.order(), script)
    await engine.start(order, ignore)
    ended = await processes.exits.of(order.attempt)
    assert ended.code == 0 and all(len(line) <= 1000 for line in ended.log_tail)
    assert len(await read_all(engine.logs("model", None, tail=5, follow=False))) == 128 * 3000


def test_positions_in_a_log_stay_true_when_it_is_cut(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", SMALL)
    assert not log.cut() and log.read(0) == (b"", 0) and log.last_lines() == ()
    written, read, position = b"", b"", 0
    with (tmp_path / "log").open("ab", buffering=0) as writer:
        for number in range(4000):
            line = b"%d %s\n" % (number, b"z" * (number % 90))
            writer.write(line)
            written += line
            if number % 70 == 0:
                log.cut()
                assert size_on_disk(tmp_path) <= SMALL + 8192
            if number % 50 == 0:
                while (step := log.read(position))[0]:
                    read, position = read + step[0], step[1]
    log.cut()
    while (step := log.read(position))[0]:
        read, position = read + step[0], step[1]
    assert read == written and len(written) > 2 * SMALL
    assert written[log.tail(20) :].count(b"\n") == 20
    assert log.tail(0) == len(written)
    oldest = log.tail(10_000)
    assert len(written) - SMALL - 4096 <= oldest <= len(written) - SMALL
    assert log.read(0)[0] == written[oldest:][: 64 * 1024]  # what was cut off is skipped
    assert log.last_lines(1) == (written.splitlines()[-1].decode(),)


def test_a_log_that_cannot_be_shortened_is_emptied_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(log_tail, "_punch", refuse)
    log = BoundedLog(tmp_path / "log", 1000)
    with (tmp_path / "log").open("ab", buffering=0) as writer:
        writer.write(b"1\n" * 3000)
        position = log.tail(0)
        assert log.cut()
        writer.write(b"goes on\n")
    assert log.read(position)[0] == log.read(0)[0] == b"goes on\n"


def ended_order(world: World, number: int) -> StartOrder:
    return with_script(world.order(), f"print('failed {number}'); raise SystemExit(1)")


async def test_the_log_of_the_crash_before_is_read_beside_the_running_one(processes: World) -> None:
    engine = await processes.open()
    for number in (1, 2):
        order = ended_order(processes, number)
        await engine.start(order, ignore)
        await processes.exits.of(order.attempt)
    await start_healthy(engine, processes.order())
    assert isinstance(engine, ProcessEngine)
    before = engine.logs("model", None, tail=10, follow=True, previous=True)
    assert await read_all(before) == b"failed 2\n"
