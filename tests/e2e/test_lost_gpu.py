"""A GPU that falls off the bus beside one that works, and comes back, perhaps in another place."""

import asyncio
import os
import signal

from tests.e2e.world import World, mimic, until, whole_text

GIB = 1024
GPUS = (("Simulated RTX 3090", 24576, 400), ("Simulated RTX 3090", 24576, 400))
MODELS = {
    "left": mimic(20 * GIB),
    "right": mimic(16 * GIB),
    "small": mimic(4 * GIB),
    "both": mimic(30 * GIB, gpus=2),
}


async def one_on_each(world: World) -> None:
    await world.load("left")
    await world.load("right")
    assert (world.seen.holding("left"), world.seen.holding("right")) == ({0: 20 * GIB}, {1: 16 * GIB})


async def test_the_other_gpu_goes_on_loading_and_serving(world: World) -> None:
    await one_on_each(world)
    world.gpus.set_wrong(0, lost=1)
    assert "fell off the bus" in await world.wait_unknown(0)
    assert (await world.chat("right")).status_code == 200
    assert (await world.chat("small")).status_code == 200
    assert world.seen.holding("small") == {1: 4 * GIB}, "nothing is placed on what cannot be measured"
    answer = await world.chat("both")
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "device_unknown", "it is no 409: the GPU may come back"
    assert world.gpus.uuids[0] in answer.json()["error"]["devices"]
    assert world.seen.holding("right") == {1: 16 * GIB}, "nobody left for what could not be started"


async def test_models_on_a_lost_gpu_fail_and_are_served_again_when_it_is_back(world: World) -> None:
    await one_on_each(world)
    world.gpus.set_wrong(0, lost=1)
    (pid,) = world.seen.pids("left")
    await world.wait_unknown(0)
    os.kill(pid, signal.SIGKILL)  # as CUDA would end it
    await world.wait_gone("left")
    assert (await world.stream("right", tokens=20).wait_end()).text == whole_text("right", 20)
    hurried = await world.chat("left", headers={"X-Deadline-Seconds": "2"})
    assert hurried.status_code == 503, hurried.text
    world.gpus.heal()
    await world.wait_known(0)
    await world.wait_served("left")
    old, new = world.seen.runs("left")
    assert old.last_s < new.first_s
    world.seen.one_run("right")


async def test_a_gpu_that_comes_back_in_another_place_is_the_same_gpu(world: World) -> None:
    await one_on_each(world)
    first, second = world.gpus.uuids
    world.gpus.set_wrong(0, lost=1)
    await world.wait_unknown(0)
    world.gpus.swap(0, 1)
    world.gpus.heal()
    assert world.gpus.uuids == [second, first]
    assert (await world.wait_known(1))["used_mib"] == 20 * GIB, "by its UUID, wherever it is"
    assert (await world.wait_known(0))["used_mib"] == 16 * GIB
    answers = await asyncio.gather(world.chat("left"), world.chat("right"), world.chat("small"))
    assert [answer.status_code for answer in answers] == [200] * 3
    assert sum(world.seen.holding("small").values()) == 4 * GIB
    assert (await world.unload("left"))["freed_mib"] == 20 * GIB
    for model in ("left", "right", "small"):
        world.seen.one_run(model)
    world.gpus.swap(0, 1)
    await look_again(world)


async def look_again(world: World) -> None:
    """Let the server find its GPUs anew, so that the next test begins with indices as they are."""
    before = world.gpus.inits
    world.gpus.set_wrong(0, lost=1)
    await world.wait_unknown(0)
    world.gpus.heal()
    await world.wait_known(0)
    assert world.gpus.inits > before


async def test_a_gpu_that_is_taken_out_is_not_forgotten(world: World) -> None:
    await one_on_each(world)
    uuid = world.gpus.uuids[0]
    gone = world.gpus.unplug(0)

    async def error() -> str:
        (view,) = (d for d in (await world.get("/devices"))["devices"] if d["id"] == uuid)
        return str(view.get("error", ""))

    assert (await until(error)).startswith("it cannot be read: ")
    assert (await world.chat("right")).status_code == 200
    world.gpus.plug(gone)
    await world.wait_known(1)
    assert (await world.chat("left")).status_code == 200
    world.gpus.swap(0, 1)
    await look_again(world)
    world.seen.one_run("left")
    world.seen.one_run("right")
