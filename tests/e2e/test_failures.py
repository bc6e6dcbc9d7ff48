"""Services that fail, and clients that leave: who waits learns why, and nothing stays behind."""

import asyncio
import os
import signal
import time

from tests.e2e.world import World, mimic, until, whole_text

GIB = 1024
MODELS = {
    "broken": mimic(4 * GIB, start="exit:3:the weights are corrupt"),
    "never-healthy": mimic(4 * GIB, never_healthy=1, ignore_sigterm=1, start_timeout="2s"),
    "deaf": mimic(4 * GIB, service="patient", never_healthy=1, ignore_sigterm=1),
    "crashing": mimic(4 * GIB, crash_after=1, tokens=20),
    "plain": mimic(4 * GIB),
    "slow": mimic(4 * GIB, load_s=0.6),
}
SERVICES = {"mimic": {"stop_grace": "1s"}, "patient": {"stop_grace": "4s"}}


async def test_a_service_that_exits_at_once_says_why_and_backs_off(world: World) -> None:
    answer = await world.chat("broken")
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert "exited with code 3" in error["message"]
    assert "the weights are corrupt" in error["message"]
    assert error["exit_code"] == 3
    assert error["log_tail"][-1] == "the weights are corrupt"
    view = await world.wait_state("broken", "failed")
    assert view["status"] == {"value": "unloaded", "failed": True, "exit_code": 3}
    assert view["failure"]["failures"] == 1
    assert 0 <= view["failure"]["next_try_in_s"] <= 1

    for _ in range(2):  # an explicit load tries at once
        load = await world.post("/models/load", model="broken", wait=True)
        assert load.status_code == 503, load.text
        assert "the weights are corrupt" in load.json()["error"]["message"]
    view = await world.wait_state("broken", "failed")
    assert view["failure"]["failures"] == 3
    assert 1 < view["failure"]["next_try_in_s"] <= 4, "the third pause is 4 s"
    assert len(await world.notes("starting", "broken")) == 3

    hurried = await world.chat("broken", headers={"X-Deadline-Seconds": "0.5"})
    assert hurried.status_code == 503, hurried.text
    assert 1 <= int(hurried.headers["retry-after"]) <= 4, "it says when the next try is due"
    assert "the weights are corrupt" in hurried.json()["error"]["message"]
    assert len(await world.notes("starting", "broken")) == 3, "its deadline is before the next try"

    patient = await world.chat("broken")
    assert patient.status_code == 503, patient.text
    assert len(await world.notes("starting", "broken")) == 4, "this one was held until then"
    await world.unload("broken")
    assert "failure" not in await world.view("broken"), "unloading clears what failed"


async def test_a_service_that_never_gets_healthy_is_killed(world: World) -> None:
    answer = await world.chat("never-healthy")
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert error["code"] == "start_timeout"
    assert "did not become healthy within 2 s" in error["message"]
    assert "never answered 2xx; at last: HTTP 503)" in error["message"]
    await world.wait_gone("never-healthy")
    view = await world.wait_state("never-healthy", "failed")
    assert view["status"]["failed"] is True
    assert world.gpus.used_mib(0) == 0
    run = world.seen.one_run("never-healthy")
    assert 1.5 < run.last_s - run.first_s < 10


async def test_others_are_served_while_one_refuses_to_end(world: World) -> None:
    asked = world.ask("deaf")
    await world.wait_holding("deaf")
    unloading = asyncio.create_task(world.unload("deaf"))
    await world.wait_state("deaf", "stopping")
    assert (await world.chat("plain")).status_code == 200
    assert not unloading.done()
    await unloading
    assert world.seen.holding("deaf") == {}
    assert (await asked).status_code == 503


async def test_a_crash_in_a_stream_is_seen_and_the_next_request_loads_anew(world: World) -> None:
    assert (await world.chat("crashing", tokens=20)).status_code == 200
    (pid,) = world.seen.pids("crashing")
    stream = await world.stream("crashing", tokens=20).wait_end()
    assert stream.status == 200
    assert not stream.is_complete
    assert stream.errors or stream.was_cut, "never a silent end"
    assert whole_text("crashing", 20).startswith(stream.text)
    again = await world.chat("crashing", tokens=20)
    assert again.status_code == 200, again.text
    assert again.json()["choices"][0]["message"]["content"] == whole_text("crashing", 20)
    old, new = world.seen.runs("crashing")
    assert old.pid == pid
    assert old.last_s < new.first_s
    assert world.gpus.used_mib(0) == 4 * GIB


async def test_a_crash_before_the_first_byte_of_an_answer_is_asked_once_more(world: World) -> None:
    await world.load("plain")
    (pid,) = world.seen.pids("plain")
    asked = world.ask("plain", delay_s=0.5)
    await until(lambda: in_flight(world, "plain", 1))
    os.kill(pid, signal.SIGKILL)
    answer = await asked
    assert answer.status_code == 200, answer.text
    assert [run.pid == pid for run in world.seen.runs("plain")] == [True, False]


async def test_a_kill_while_idle_is_noticed(world: World) -> None:
    await world.load("plain")
    (pid,) = world.seen.pids("plain")
    os.kill(pid, signal.SIGKILL)
    view = await world.wait_state("plain", "failed")
    assert view["status"]["failed"] is True
    assert view["failure"]["exit_code"] == 137
    assert world.gpus.used_mib(0) == 0
    assert (await world.chat("plain")).status_code == 200
    assert [run.pid == pid for run in world.seen.runs("plain")] == [True, False]
    assert "failure" not in await world.view("plain") or (await world.view("plain"))["state"] == "ready"


async def test_a_client_that_leaves_while_it_waits_does_not_stop_the_load(world: World) -> None:
    stream = world.stream("slow")
    await world.wait_holding("slow")
    await stream.leave()
    asked = world.ask("slow")
    await world.wait_queued("slow", waiting=1)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    view = await world.wait_state("slow", "ready")
    assert view["instance"]["in_flight"] == 0
    assert (await world.stats("slow"))["requests"] == 0, "nobody is left to be served"
    assert (await world.chat("slow")).status_code == 200
    world.seen.one_run("slow")


async def test_a_client_that_leaves_its_stream_is_seen_by_the_service(world: World) -> None:
    stream = await world.busy("plain")
    await until(lambda: in_flight(world, "plain", 1))
    left_s = time.monotonic()
    await stream.leave()

    async def is_seen() -> bool:
        return (await world.stats("plain"))["client_left"] == 1

    await until(is_seen)
    assert time.monotonic() - left_s < 2
    assert (await world.stats("plain"))["in_flight"] == 0
    await until(lambda: in_flight(world, "plain", 0))
    await world.let_flow("plain")
    assert (await world.chat("plain")).status_code == 200
    world.seen.one_run("plain")


async def in_flight(world: World, model: str, count: int) -> bool:
    """Whether the orchestrator counts so many requests; the mimic has its own count."""
    view = await world.view(model)
    return view["state"] == "ready" and view["instance"]["in_flight"] == count
