"""Two GPUs: loads overlap, and a model may be split."""

import asyncio

from tests.e2e.world import World, mimic

GIB = 1024
GPUS = (("Simulated RTX 3090", 24576, 400), ("Simulated RTX 3090", 24576, 400))
MODELS = {
    "left": mimic(14 * GIB, load_s=0.6),
    "right": mimic(14 * GIB, load_s=0.6),
    "wide": mimic(30 * GIB, gpus=2),
    "wider": mimic(60 * GIB, gpus=2),
}


async def test_two_gpus_load_at_the_same_time(world: World) -> None:
    answers = await asyncio.gather(world.chat("left"), world.chat("right"))
    assert [answer.status_code for answer in answers] == [200, 200]
    left, right = world.seen.one_run("left"), world.seen.one_run("right")
    assert {**left.peak_mib, **right.peak_mib} == {0: 14 * GIB, 1: 14 * GIB}, "each has a GPU of its own"
    assert max(left.first_s, right.first_s) < min(left.grown_s, right.grown_s), "their loads overlap"


async def test_a_model_over_two_gpus_is_on_both(world: World) -> None:
    assert (await world.chat("wide")).status_code == 200
    (pid,) = world.seen.pids("wide")
    assert world.gpus.processes(0) == {pid: 15 * GIB}
    assert world.gpus.processes(1) == {pid: 15 * GIB}
    freed = await world.unload("wide")
    assert freed["freed_mib"] == 30 * GIB
    assert (world.gpus.used_mib(0), world.gpus.used_mib(1)) == (0, 0)


async def test_a_split_model_evicts_on_both(world: World) -> None:
    await asyncio.gather(world.load("left"), world.load("right"))
    assert (await world.chat("wide")).status_code == 200
    left, right, wide = (world.seen.one_run(model) for model in ("left", "right", "wide"))
    assert wide.first_s > max(left.last_s, right.last_s)
    assert wide.peak_mib == {0: 15 * GIB, 1: 15 * GIB}


async def test_what_not_even_two_can_carry_is_refused(world: World) -> None:
    await asyncio.gather(world.load("left"), world.load("right"))
    answer = await world.chat("wider")
    assert answer.status_code == 409, answer.text
    assert answer.json()["error"]["needed_mib"] == 30 * GIB
    assert world.seen.runs("wider") == []
    assert sum(world.seen.holding("left").values()) == 14 * GIB
    assert sum(world.seen.holding("right").values()) == 14 * GIB
