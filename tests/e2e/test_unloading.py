"""Unloading: the memory is seen free before the answer, streams end first, and idle ones expire."""

import asyncio
import time

from tests.e2e.world import World, mimic, until, whole_text

GIB = 1024
NVML_TIMEOUT = 10
MODELS = {
    "plain": mimic(8 * GIB),
    "lingering": mimic(8 * GIB, release_s=0.6),
    "stubborn": mimic(8 * GIB, ignore_sigterm=1),
    "loading": mimic(8 * GIB, load_s=10),
    "short-lived": mimic(6 * GIB, idle_after="1s"),
    "limited": mimic(8 * GIB, drain_limit="500ms"),
}


async def test_unload_answers_when_the_device_shows_the_memory_free(world: World) -> None:
    await world.load("lingering")
    answer = await world.unload("lingering")
    assert world.gpus.used_mib(0) == 0
    assert answer["success"] is True
    assert answer["freed_mib"] == 8 * GIB
    assert world.seen.pids("lingering") == []


async def test_a_model_unloaded_right_after_its_load_gives_back_all_it_held(world: World) -> None:
    for _ in range(4):
        await world.load("plain")
        assert (await world.unload("plain"))["freed_mib"] == 8 * GIB
        assert world.gpus.used_mib(0) == 0


async def test_unload_waits_for_bytes_that_return_after_the_exit(world: World) -> None:
    await world.load("lingering")
    await world.wait_sample()
    unloading = asyncio.create_task(world.unload("lingering"))
    await world.wait_state("lingering", "stopping")
    world.gpus.set_fault(0, NVML_TIMEOUT)  # so that the exit and what stays behind are seen at once
    await world.wait_state("lingering", "reclaiming")
    await world.wait_gone("lingering")
    world.gpus.set_extra_used(0, 8 * GIB)  # what the driver has not yet given back
    world.gpus.set_fault(0, 0)
    await world.wait_sample()
    assert (await world.view("lingering"))["state"] == "reclaiming"
    assert not unloading.done()
    given_back_s = time.monotonic()
    world.gpus.set_extra_used(0, 0)
    assert (await unloading)["freed_mib"] == 8 * GIB
    assert time.monotonic() - given_back_s < 2


async def test_unload_kills_what_ignores_the_signal(world: World) -> None:
    await world.load("stubborn")
    assert (await world.unload("stubborn"))["freed_mib"] == 8 * GIB
    assert world.gpus.used_mib(0) == 0


async def test_unload_lets_a_stream_end(world: World) -> None:
    stream = await world.busy("plain", tokens=30)
    unloading = asyncio.create_task(world.unload("plain"))
    await world.wait_state("plain", "draining")
    assert world.seen.holding("plain") == {0: 8 * GIB}
    assert not unloading.done()
    await world.let_flow("plain")
    answer = await unloading
    assert world.gpus.used_mib(0) == 0
    assert answer["freed_mib"] == 8 * GIB
    await stream.wait_end()
    assert stream.text == whole_text("plain", 30)
    assert stream.is_complete


async def test_force_cuts_a_stream_and_its_client_sees_it(world: World) -> None:
    stream = await world.busy("plain", tokens=30)
    answer = await world.unload("plain", force=True)
    assert world.gpus.used_mib(0) == 0
    assert answer["freed_mib"] == 8 * GIB
    await stream.wait_end()
    assert not stream.is_complete
    (error,) = stream.errors
    assert "was stopped before its answer ended: unloaded by request." in error["message"]


async def test_force_ends_a_drain_that_goes_on(world: World) -> None:
    stream = await world.busy("plain", tokens=30)
    patient = asyncio.create_task(world.unload("plain"))
    await world.wait_state("plain", "draining")
    await world.unload("plain", force=True)
    assert world.gpus.used_mib(0) == 0
    assert (await patient)["success"] is True
    assert not (await stream.wait_end()).is_complete


async def test_a_drain_ends_at_its_limit(world: World) -> None:
    stream = await world.busy("limited", tokens=30)
    answer = await world.unload("limited")
    assert answer["freed_mib"] == 8 * GIB
    assert world.gpus.used_mib(0) == 0
    await stream.wait_end()
    assert not stream.is_complete
    assert stream.errors or stream.was_cut


async def test_unload_aborts_a_start_and_tells_who_waits(world: World) -> None:
    asked = [world.ask("loading"), world.ask("loading")]
    load = asyncio.create_task(world.post("/models/load", model="loading", wait=True))
    streamed = world.stream("loading")
    await world.wait_holding("loading")
    await world.unload("loading")
    assert world.gpus.used_mib(0) == 0
    for answer in [*await asyncio.gather(*asked), await load]:
        assert answer.status_code == 503, answer.text
        error = answer.json()["error"]
        assert error["code"] == "model_unloaded"
        assert "'loading' was unloaded" in error["message"]
    assert (await streamed.wait_end()).refusal["code"] == "model_unloaded"
    world.seen.one_run("loading")
    view = await world.view("loading")
    assert view["status"] == {"value": "unloaded", "exit_code": 0}, "a wanted stop is no failure"


async def test_who_comes_while_it_stops_is_served_by_the_next_attempt(world: World) -> None:
    await world.load("lingering")
    unloading = asyncio.create_task(world.unload("lingering"))
    await world.wait_state("lingering", "stopping")
    late = world.ask("lingering")
    await world.wait_queued("lingering")
    assert (await unloading)["success"] is True
    assert (await late).status_code == 200
    old, new = world.seen.runs("lingering")
    assert old.last_s < new.first_s


async def test_a_model_on_hold_stays_out(world: World) -> None:
    await world.load("plain")
    await world.unload("plain", hold="10m")
    answer = await world.chat("plain")
    assert answer.status_code == 503, answer.text
    error = answer.json()["error"]
    assert error["code"] == "model_held"
    assert 590 < error["held_for_s"] <= 600
    assert world.gpus.used_mib(0) == 0
    await world.load("plain")
    assert (await world.chat("plain")).status_code == 200


async def test_unloading_what_is_not_loaded_is_a_success_that_says_so(world: World) -> None:
    for _ in range(2):
        answer = await world.unload("plain")
        assert answer["success"] is True
        assert answer["freed_mib"] == 0
        assert "was not loaded" in answer["message"]
    unknown = await world.post("/models/unload", model="no-such-model")
    assert unknown.status_code == 404
    assert "no-such-model" in unknown.json()["error"]["message"]


async def test_an_idle_model_expires_although_somebody_looks(world: World) -> None:
    await world.load("short-lived")
    since_s = time.monotonic()

    async def is_gone() -> bool:
        await world.get("/v1/models")
        await world.get("/models")
        await world.view("short-lived")
        assert (await world.http.get("/props?model=short-lived")).status_code in (200, 400)
        return world.gpus.used_mib(0) == 0

    await until(is_gone, timeout_s=15)
    assert time.monotonic() - since_s > 0.8
    view = await world.wait_state("short-lived", "stopped")
    assert view["status"] == {"value": "unloaded", "exit_code": 0}
    world.seen.one_run("short-lived")


async def test_a_long_stream_is_not_idle(world: World) -> None:
    stream = world.stream("short-lived", tokens=25, tokens_per_s=10)
    await stream.wait_end()
    assert stream.text == whole_text("short-lived", 25)
    assert stream.is_complete
    assert world.seen.holding("short-lived") == {0: 6 * GIB}, "its idle time begins only now"
    await world.wait_gone("short-lived")
    assert world.seen.one_run("short-lived").last_s - stream.ended_s > 0.8
