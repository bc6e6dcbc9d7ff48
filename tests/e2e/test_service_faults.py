"""Services that fail: told with the reason, tried again in time, and nothing left behind."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import docker_client
from tests.e2e.world import Engine, World, mimic, open_house, open_world, until, whole_text

GIB = 1024
OOM_MIB = 64
MODELS = {
    "broken": mimic(4 * GIB, start="exit:7:no weights here"),
    "hopeless": mimic(4 * GIB, start="exit:3:the disk is gone"),
    "greedy": mimic(4 * GIB, ram_mib=400, load_s=4, start_timeout="40s"),
    "starved": mimic(4 * GIB) | {"environment": {"MIMIC_MIB": str(30 * GIB)}},
    "deaf": mimic(4 * GIB, never_healthy=1, start_timeout="1s"),
    "third-time": mimic(4 * GIB, crash_after=2, tokens=20),
    "plain": mimic(4 * GIB),
    "slow": mimic(4 * GIB, load_s=1),
}
SERVICES = {"mimic": {"stop_grace": "1s"}}


async def failure_of(world: World, model: str) -> dict[str, Any]:
    """The reason of a failed model, the same in GET /models/{id}, GET /models and GET /state."""
    view = await world.wait_state(model, "failed")
    listed = {m["id"]: m for m in (await world.get("/models"))["data"]}[model]
    assert listed["status"]["value"] == "unloaded"
    assert listed["status"]["failed"] is True
    assert listed["status"]["exit_code"] != 0
    in_state = {m["id"]: m for m in (await world.get("/state"))["models"]}[model]
    assert in_state["failure"]["message"] == view["failure"]["message"]
    assert in_state["failure"]["log_tail"] == view["failure"]["log_tail"]
    return dict(view["failure"])


async def failures_pause_s(world: World, model: str) -> float:
    """Ask for an explicit load, which fails, and return when the next try is due."""
    answer = await world.post("/models/load", model=model, wait=True)
    assert answer.status_code == 503, answer.text
    return float((await failure_of(world, model))["next_try_in_s"])


# ---- at the start ----


async def test_an_exit_at_start_is_told_with_code_words_and_next_try(world: World) -> None:
    answer = await world.chat("broken")
    assert answer.status_code == 503, answer.text
    failure = await failure_of(world, "broken")
    assert failure["exit_code"] == 7
    assert failure["oom"] is False
    assert failure["log_tail"][-1] == "no weights here"
    assert failure["failures"] == 1
    assert 0 <= failure["next_try_in_s"] <= 1
    log = await world.http.get("/logs/broken")
    assert "no weights here" in log.text, "the log of the last attempt is kept for reading"
    assert world.gpus.used_mib(0) == 0


async def test_each_failure_doubles_the_pause(world: World) -> None:
    """An explicit load tries now, however long the pause would still be."""
    for attempt, longest_s in enumerate((1, 2, 4, 8, 16), start=1):
        left_s = await failures_pause_s(world, "hopeless")
        assert longest_s / 2 < left_s <= longest_s, f"after failure {attempt}"
        assert len(await world.notes("starting", "hopeless")) == attempt
    hurried = await world.chat("hopeless", headers={"X-Deadline-Seconds": "1"})
    assert hurried.status_code == 503, hurried.text
    assert 1 < int(hurried.headers["retry-after"]) <= 16
    assert "The next try is due in" in hurried.json()["error"]["message"]
    assert hurried.json()["error"]["exit_code"] == 3
    assert len(await world.notes("starting", "hopeless")) == 5, "its deadline is before the next try"


async def test_a_request_is_held_until_the_next_try_if_that_is_in_time(world: World) -> None:
    for _ in range(2):
        await failures_pause_s(world, "broken")
    starts = len(await world.notes("starting", "broken"))
    patient = world.ask("broken")
    await world.wait_queued("broken")
    assert "next try is due" in (await world.get("/state"))["queue"][0]["reason"]
    answer = await patient
    assert answer.status_code == 503, answer.text
    assert "no weights here" in answer.json()["error"]["message"]
    assert len(await world.notes("starting", "broken")) == starts + 1


async def test_one_that_takes_more_gpu_memory_than_there_is_says_so_itself(world: World) -> None:
    """It declared 4 GiB and takes 30: CUDA refuses, and nobody else is harmed."""
    await world.load("plain")
    with world.refusals_expected():
        answer = await world.chat("starved")
    assert answer.status_code == 503, answer.text
    failure = await failure_of(world, "starved")
    assert failure["exit_code"] == 1
    assert failure["oom"] is False, "that is said of the machine's RAM only"
    assert "CUDA error: out of memory" in failure["log_tail"]
    assert failure["code"] == "gpu_out_of_memory"
    assert len(await world.notes("starting", "starved")) == 2, "once more, with more"
    assert (await world.chat("plain")).status_code == 200
    world.seen.one_run("plain")


async def test_one_that_never_gets_healthy_gives_its_memory_back(world: World) -> None:
    answer = await world.chat("deaf")
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "start_timeout"
    await world.wait_gone("deaf")
    failure = await failure_of(world, "deaf")
    assert failure["code"] == "start_timeout"
    assert failure["next_try_in_s"] is not None
    assert world.gpus.used_mib(0) == 0


# ---- memory of the machine ----


async def test_a_service_killed_for_memory_is_shown_as_that(world: World) -> None:
    """A container gets a real limit from the engine; of a process only the signal is seen."""
    asked = world.ask("greedy")
    await world.wait_holding("greedy")
    if world.engine == "docker":
        await asyncio.to_thread(limit_memory, await container_of(world, "greedy"), OOM_MIB)
    else:
        os.kill(world.seen.pids("greedy")[0], signal.SIGKILL)
    answer = await asked
    assert answer.status_code == 503, answer.text
    failure = await failure_of(world, "greedy")
    assert failure["exit_code"] == 137
    assert failure["oom"] is (world.engine == "docker")
    if failure["oom"]:
        assert "out of memory" in failure["message"]
        assert answer.json()["error"]["oom"] is True
    else:
        assert "137" in failure["message"]
    assert world.gpus.used_mib(0) == 0


async def container_of(world: World, model: str) -> str:
    return f"ai.orchestrator.attempt={(await world.view(model))['instance']['attempt']}"


def limit_memory(label: str, mib: int) -> None:
    client = docker_client()
    (container,) = client.containers.list(ignore_removed=True, filters={"label": label})
    container.update(mem_limit=f"{mib}m", memswap_limit=f"{mib}m")
    client.close()


# ---- later ----


async def test_healthy_and_then_dead_is_a_failure_with_a_reason(world: World) -> None:
    await world.load("plain")
    address = await world.address("plain")
    with pytest.raises(httpx.TransportError):
        await world.http.post(f"{address}/die", json={"code": 9})
    failure = await failure_of(world, "plain")
    assert failure["exit_code"] == 9
    assert "ready" in failure["log_tail"]
    assert world.gpus.used_mib(0) == 0
    assert (await world.chat("plain")).status_code == 200
    assert (await world.view("plain"))["status"] == {"value": "loaded"}


async def test_a_crash_on_the_third_request_costs_that_answer_only(world: World) -> None:
    for _ in range(2):
        assert (await world.chat("third-time", tokens=20)).status_code == 200
    with suppress(httpx.TransportError):  # cut in the middle: what was cut is never passed off as whole
        cut = await world.chat("third-time", tokens=20)
        assert (cut.status_code, cut.json()["error"]["code"]) == (502, "upstream_failed")
    answers = [await world.chat("third-time", tokens=20) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert len(world.seen.runs("third-time")) == 2


async def test_all_streams_of_one_that_dies_end_visibly(world: World) -> None:
    await world.load("plain")
    await world.hold("plain")
    streams = [world.stream("plain", tokens=40) for _ in range(5)]
    for stream in streams:
        await stream.wait_begun()
    os.kill(world.seen.pids("plain")[0], signal.SIGKILL)
    for stream in streams:
        await stream.wait_end()
        assert not stream.is_complete
        assert stream.errors or stream.was_cut, "never a silent end"
        assert whole_text("plain", 40).startswith(stream.text)
    await world.wait_state("plain", "failed", "stopped")
    assert (await world.chat("plain")).status_code == 200
    assert (await world.view("plain"))["instance"]["in_flight"] == 0


# ---- a stranger at its port ----


@contextmanager
def stranger(port: int) -> Iterator[list[str]]:
    """Another program that answers 200 to everything at this port. Gives the requests it got."""
    asked: list[str] = []
    listener = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                asked.append(client.recv(65536).decode(errors="replace").split("\r\n")[0])
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)


def port_given(world: World) -> int:
    """The port of the one mimic that the server has started, listening or not; 0 if there is none yet."""
    for pid, line in world.server.model_processes().items():
        if "mimic.py" in line and not line.startswith("/bin/sh"):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            return next(int(v.removeprefix(b"PORT=")) for v in variables if v.startswith(b"PORT="))
    return 0


async def test_a_stranger_at_its_port_does_not_make_it_ready(tmp_path: Path) -> None:
    """Between the choice of a port and its use anybody may take it. Only host processes share ports."""
    models = {"late": mimic(4 * GIB, bind_s=3)}
    with open_house(tmp_path, Engine("process"), models) as house:
        async with open_world(house) as world:
            asked = world.ask("late")
            port = await until(lambda: port_given(world))
            with stranger(port) as seen:
                await until(lambda: any("/health" in line for line in seen) or asked.done())
                assert (await world.view("late"))["state"] != "ready"
                answer = await asked
                assert answer.status_code == 503, f"the stranger's words: {answer.text}"
                assert not any("chat" in line for line in seen), "it saw nobody's request"
            view = await world.view("late")
            assert view["failure"]["exit_code"] == 1
            assert "address already in use" in "\n".join(view["failure"]["log_tail"])
            assert (await world.chat("late")).status_code == 200, "the next try has another port"
