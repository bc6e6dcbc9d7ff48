"""What GPUs report while models run on them: shown, put down to whom it can be, and acted upon."""

from tests.e2e.world import World, mimic, until, whole_text

GIB = 1024
GPUS = (("Simulated RTX 3090", 24576, 400), ("Simulated RTX 3090", 24576, 400))
MODELS = {"left": mimic(20 * GIB), "right": mimic(16 * GIB)}
PAGE_FAULT, STOPPED, SYSTEM_PROCESSOR = 31, 43, 119
RESET = 1
HOT = 0x40


async def reported(world: World, xid: int, index: int = 0) -> bool:
    return xid in [incident["xid"] for incident in (await world.device(index))["incidents"]]


async def test_it_is_shown_how_a_gpu_is(world: World) -> None:
    world.gpus.set_readings(0, temperature_c=83, power_mw=341_500, utilization=98, ecc_uncorrected=2)
    world.gpus.set_readings(0, clocks_event_reasons=HOT)

    async def is_shown() -> bool:
        return bool((await world.device())["telemetry"]["temperature_c"] == 83)

    await until(is_shown)
    assert (await world.device())["telemetry"] == {
        "utilization_percent": 98,
        "memory_utilization_percent": 49,
        "temperature_c": 83,
        "power_w": 341.5,
        "power_limit_w": 350.0,
        "ecc_corrected": 0,
        "ecc_uncorrected": 2,
        "throttled_by": ["temperature (hardware)"],
    }
    doctor = await world.get("/doctor")
    (check,) = (c for c in doctor["checks"] if "uncorrected memory errors" in c["found"])
    assert check["status"] == "warning"
    assert "slowed down now: temperature (hardware)" in check["found"]
    world.gpus.set_readings(0, temperature_c=40, utilization=0, ecc_uncorrected=0, clocks_event_reasons=0)


async def test_a_fault_of_the_only_program_on_a_gpu_restarts_it(world: World) -> None:
    await world.load("left")
    world.gpus.raise_xid(0, PAGE_FAULT)
    await until(lambda: reported(world, PAGE_FAULT))
    await world.wait_gone("left")
    (line,) = await world.notes("gpu_error", "left")
    assert "'left' alone was on it" in line
    model = await world.view("left")
    assert model["failure"]["code"] == "gpu_fault"
    assert "XID 31" in model["failure"]["message"]
    await world.wait_served("left")
    assert len(world.seen.runs("left")) == 2


async def test_what_is_nobodys_fault_restarts_nobody(world: World) -> None:
    await world.load("left")
    world.gpus.raise_xid(0, STOPPED)
    await until(lambda: reported(world, STOPPED))
    assert (await world.stream("left", tokens=20).wait_end()).text == whole_text("left", 20)
    world.seen.one_run("left")


async def test_a_gpu_that_must_be_reset_loses_its_models_to_the_other(world: World) -> None:
    await world.load("left")
    assert world.seen.holding("left") == {0: 20 * GIB}
    world.gpus.set_recovery_action(0, RESET)
    world.gpus.raise_xid(0, SYSTEM_PROCESSOR)
    reason = await world.wait_unknown(0)
    assert "must be reset after XID 119" in reason
    assert (await world.chat("right")).status_code == 200
    assert world.seen.holding("right") == {1: 16 * GIB}, "nothing is placed on what must not be used"
    await world.wait_gone("left")
    assert (await world.view("left"))["failure"]["code"] == "gpu_broken"
    assert (await world.chat("left")).status_code == 200
    assert world.seen.holding("left") == {1: 20 * GIB}
    world.gpus.set_recovery_action(0, 0)
    await world.wait_known(0)
    assert (await world.chat("right")).status_code == 200
    assert world.seen.holding("right") == {0: 16 * GIB}
