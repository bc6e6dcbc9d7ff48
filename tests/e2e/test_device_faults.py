"""Devices that fail: what is unknown is never free, what runs goes on, and service returns with the device.

That no GPU was overbooked meanwhile is asserted on the simulated device, by `open_world`.
"""

import asyncio
import time
from pathlib import Path

import pytest

from tests.e2e.recorder import Run
from tests.e2e.world import USABLE_MIB, Engine, World, mimic, open_house, open_world, until, whole_text
from tests.nvml.simulated import NEVER_S

GIB = 1024
LAG_MS = 600_000
NO_PERMISSION, TIMEOUT, GPU_IS_LOST, RESET_REQUIRED = 4, 10, 15, 16
MODELS = {
    "plain": mimic(8 * GIB),
    "other": mimic(8 * GIB),
    "wide": mimic(14 * GIB),
    "vast": mimic(20 * GIB),
    "tardy": mimic(14 * GIB, late_s=2),
    "fading": mimic(14 * GIB, late_s=2, release_s=1),
    "leaky": mimic(14 * GIB, late_s=NEVER_S),
    "slow-one": mimic(6 * GIB, load_s=0.5),
    "slow-two": mimic(6 * GIB, load_s=0.5),
}


def refused_as_unknown(answer_status: int, error: dict[str, object], uuid: str) -> str:
    """The message of a refusal because of a device that cannot be measured."""
    assert answer_status == 503, error
    assert error["code"] == "device_unknown"
    assert "GPU 0 (Simulated RTX 3090)" in str(error["message"])
    assert uuid in dict(error["devices"])  # type: ignore[call-overload]
    return str(error["message"])


# ---- errors ----


async def test_whatever_the_error_loads_are_refused_and_service_goes_on(world: World) -> None:
    await world.load("plain")
    for code, reason in {
        NO_PERMISSION: "may not use the GPU",
        TIMEOUT: "Timeout",
        GPU_IS_LOST: "fell off the bus",
        RESET_REQUIRED: "must be reset",
    }.items():
        world.gpus.set_fault(0, code)
        assert reason in await world.wait_unknown()
        answer = await world.post("/models/load", model="other", wait=True)
        assert reason in refused_as_unknown(answer.status_code, answer.json()["error"], world.gpus.uuids[0])
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert (await world.http.get("/readyz")).status_code == 503
        assert "free_mib" not in await world.device(), "an error is no number"
        assert (await world.stream("plain", tokens=20).wait_end()).text == whole_text("plain", 20)
        world.gpus.heal()
        assert (await world.wait_known())["used_mib"] == 8 * GIB
    assert (await world.chat("other")).status_code == 200
    assert (await world.http.get("/readyz")).status_code == 200
    world.seen.one_run("plain")
    world.seen.one_run("other")


async def test_one_that_was_starting_when_its_gpu_became_unknown_gets_ready(world: World) -> None:
    asked = world.ask("slow-one")
    await world.wait_holding("slow-one")
    world.gpus.set_fault(0, TIMEOUT)
    answer = await asked
    assert answer.status_code == 200, answer.text
    world.seen.one_run("slow-one")


async def test_a_server_without_its_driver_says_so_and_starts_once_it_is_there(
    engine: Engine, tmp_path: Path
) -> None:
    with open_house(tmp_path, engine, {"plain": mimic(2 * GIB)}, starts=False) as house:
        house.gpus.set_init_fault(9)
        house.server.launch()
        assert house.server.process is not None
        code = await asyncio.to_thread(house.server.process.wait, 30)
        assert code not in (0, None)
        assert "driver is not loaded" in house.server.log()
        assert "Traceback" not in house.server.log()
        house.gpus.heal()
        house.server.start()
        async with open_world(house) as world:
            assert (await world.chat("plain")).status_code == 200


# ---- samples that lag ----


async def lag(world: World) -> str:
    """The driver hangs from now on. Wait until the server no longer believes what it knows; the reason."""
    world.gpus.set_wrong(0, delay_ms=LAG_MS)

    async def reason() -> str:
        await world.unload("other")  # it is not loaded: this only makes the server think
        return str((await world.device()).get("error", ""))

    return await until(reason, what="the GPU should be unknown")


async def test_looking_is_enough_to_see_that_a_sample_is_old(world: World) -> None:
    await world.load("plain")
    world.gpus.set_wrong(0, delay_ms=LAG_MS)

    async def is_old() -> bool:
        return float((await world.get("/state"))["sample_age_s"]) > 3

    await until(is_old, timeout_s=8)
    assert "last measurement is" in (await world.device())["error"]


async def test_a_driver_that_does_not_answer_stops_loads_and_not_service(world: World) -> None:
    await world.load("plain")
    stream = await world.busy("plain", tokens=30)
    assert "last measurement is" in await lag(world)
    before_s = time.monotonic()
    for answer in (await world.chat("wide"), await world.post("/models/load", model="wide", wait=True)):
        message = refused_as_unknown(answer.status_code, answer.json()["error"], world.gpus.uuids[0])
        assert "s old" in message
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert time.monotonic() - before_s < 10, "told at once, not at the deadline"
    assert (await world.get("/state"))["sample_age_s"] > 3
    assert (await world.http.get("/readyz")).status_code == 503
    await world.let_flow("plain")
    assert (await stream.wait_end()).text == whole_text("plain", 30)
    assert (await world.chat("plain")).status_code == 200
    assert world.seen.runs("wide") == []
    world.gpus.heal()
    await world.wait_known()
    assert (await world.chat("wide")).status_code == 200
    assert (await world.http.get("/readyz")).status_code == 200


async def test_an_unload_in_the_dark_ends_when_the_memory_is_seen_free(world: World) -> None:
    await world.load("plain")
    await world.wait_sample()
    await lag(world)
    unloading = asyncio.create_task(world.unload("plain"))
    await world.wait_gone("plain")
    await world.wait_state("plain", "reclaiming")
    waiting = await world.chat("wide")
    refused_as_unknown(waiting.status_code, waiting.json()["error"], world.gpus.uuids[0])
    assert not unloading.done()
    world.gpus.heal()
    assert (await unloading)["freed_mib"] == 8 * GIB
    assert (await world.chat("wide")).status_code == 200


# ---- memory that is late, and memory that is lost ----


async def test_the_next_start_waits_for_memory_that_returns_seconds_after_the_exit(world: World) -> None:
    await world.load("tardy")
    assert (await world.chat("wide")).status_code == 200
    tardy, wide = world.seen.runs("tardy")[-1], world.seen.one_run("wide")
    assert wide.first_s - tardy.last_s > 1.5, "it had left two seconds before its memory came back"
    assert len(await world.notes("starting", "wide")) == 1
    assert await world.notes("leak", "tardy") == []


async def test_one_that_is_no_longer_listed_and_has_not_ended_yet_is_counted_once(world: World) -> None:
    """The driver forgets a process before its memory is back, and that before its exit is known."""
    await world.load("fading")
    answer = await world.chat("wide")
    assert answer.status_code == 200, answer.text


async def test_memory_that_never_returns_is_reported_and_counted_out(world: World) -> None:
    await world.load("leaky")
    await world.wait_sample()
    asked_s = time.monotonic()
    answer = await world.unload("leaky")
    assert 4 < time.monotonic() - asked_s < 15, "it is waited for, and not for ever"
    assert answer["freed_mib"] == 0
    assert world.gpus.late_mib(0) == 14 * GIB
    (line,) = await until(lambda: world.notes("leak", "leaky"), what="the event log follows the answer")
    assert "14336 MiB" in line
    operation = await world.get(f"/operations/{answer['operation']['id']}")
    assert operation["state"] == "succeeded"
    assert "0 MiB came back, 14336 MiB did not." in operation["message"]

    refused = await world.chat("wide")
    assert refused.status_code == 503, refused.text
    error = refused.json()["error"]
    assert error["code"] == "no_room_now", "it would fit if the memory came back"
    assert (error["needed_mib"], error["available_mib"]) == (14 * GIB, USABLE_MIB - 14 * GIB)
    assert (await world.chat("plain")).status_code == 200, "what fits beside the leak is loaded"
    assert (await world.device())["unexplained_mib"] == 14 * GIB
    world.gpus.give_back_late()
    await world.unload("plain")
    await world.wait_served("wide")


# ---- other programs ----


async def test_nobody_leaves_for_room_that_another_program_has(world: World) -> None:
    await world.load("plain")
    with world.gpus.hold_foreign(0, 12 * GIB) as pid:

        async def is_noticed() -> bool:
            return bool((await world.device())["foreign_mib"] == 12 * GIB)

        await until(is_noticed)
        answer = await world.chat("vast")
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["available_mib"] == USABLE_MIB - 12 * GIB
        assert str(pid) in answer.json()["error"]["message"]
        assert world.seen.holding("plain") == {0: 8 * GIB}
        assert (await world.chat("plain")).status_code == 200
        world.seen.one_run("plain")
    await until(lambda: not world.gpus.processes(0).get(pid))
    await world.wait_served("vast")
    assert world.seen.one_run("plain").last_s < world.seen.one_run("vast").first_s


async def test_programs_that_come_and_go_never_lead_to_overbooking(world: World) -> None:
    """One takes what it can get for a moment, again and again, while models swap."""
    served = asyncio.create_task(swap_until_served(world, times=4))
    while not served.done():
        with world.gpus.hold_foreign(0, 1 * GIB):
            await world.wait_sample()
        await world.wait_sample()
    await served
    assert len(world.seen.runs("wide")) == len(world.seen.runs("tardy")) == 4


async def swap_until_served(world: World, times: int) -> None:
    for _ in range(times):
        await world.wait_served("wide")
        await world.wait_served("tardy")


# ---- processes that cannot be seen ----


@pytest.mark.parametrize("blindness", ["hide_processes", "hide_usage", "pid_offset"])
async def test_without_attribution_starts_are_one_at_a_time_and_memory_still_counts(
    engine: Engine, tmp_path: Path, blindness: str
) -> None:
    with open_house(tmp_path, engine, MODELS, starts=False) as house:
        house.gpus.set_wrong(0, **{blindness: 1 << 23})
        house.server.start()
        async with open_world(house) as world:
            answers = await asyncio.gather(*(world.chat(model) for model in ("slow-one", "slow-two")))
            assert [answer.status_code for answer in answers] == [200, 200]
            first, second = sorted(map(world.seen.one_run, ("slow-one", "slow-two")), key=began)
            assert first.grown_s < second.first_s, "growth could not be told apart otherwise"
            await world.wait_sample()
            device = await world.device()
            assert device["attributed"] is False
            assert (device["used_mib"], device["foreign_mib"]) == (12 * GIB, 0)
            rest_mib = USABLE_MIB - 12 * GIB
            assert rest_mib - 1 * GIB < device["available_mib"] <= rest_mib, "counted once, not twice"
            doctor = await asyncio.to_thread(house.server.run, "doctor")
            assert "attribut" in doctor.stdout + doctor.stderr
            assert (await world.chat("wide")).status_code == 200, "room is made as ever"
            assert (await world.unload("wide"))["freed_mib"] == 14 * GIB
            house.gpus.set_wrong(0, **{blindness: 1 << 23})


def began(run: Run) -> float:
    return run.first_s
