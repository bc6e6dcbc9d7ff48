"""Loading on demand: one start, whose turn it is, who has to leave, and what is refused."""

import asyncio
import itertools
from typing import Any

from tests.e2e.world import USABLE_MIB, World, mimic, until, whole_text

GIB = 1024
MODELS = {
    "slow": mimic(4 * GIB, load_s=0.4),
    "first": mimic(14 * GIB),
    "second": mimic(14 * GIB),
    "third": mimic(14 * GIB),
    "fourth": mimic(14 * GIB),
    "busy": mimic(8 * GIB),
    "idle": mimic(8 * GIB),
    "newcomer": mimic(12 * GIB),
    "holder": mimic(20 * GIB),
    "low-one": mimic(20 * GIB, priority=10),
    "low-two": mimic(20 * GIB, priority=10),
    "high": mimic(20 * GIB, priority=90),
    "impossible": mimic(30 * GIB),
    "just-too-big": mimic(USABLE_MIB + 1),
    "exactly-all": mimic(USABLE_MIB),
    "rock": mimic(16 * GIB),
    "pebble": mimic(4 * GIB),
    "lingering": mimic(14 * GIB, release_s=1),
    "sixteen": mimic(16 * GIB),
}


async def test_twenty_requests_make_one_start(world: World) -> None:
    answers = await asyncio.gather(*(world.chat("slow") for _ in range(20)))
    assert [answer.status_code for answer in answers] == [200] * 20
    assert {a.json()["choices"][0]["message"]["content"] for a in answers} == {whole_text("slow", 8)}
    assert world.seen.one_run("slow").peak_mib == {0: 4 * GIB}
    assert len(await world.notes("starting", "slow")) == 1
    assert (await world.stats("slow"))["requests"] == 20


async def test_loads_and_requests_join_the_same_start(world: World) -> None:
    asked = [world.ask("slow"), world.ask("slow")]
    loads = [asyncio.create_task(world.load("slow")) for _ in range(3)]
    streams = [world.stream("slow"), world.stream("slow")]
    assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}
    assert all(answer["success"] for answer in await asyncio.gather(*loads))
    for stream in streams:
        assert (await stream.wait_end()).text == whole_text("slow", 8)
    world.seen.one_run("slow")


async def test_eviction_waits_for_the_end_of_a_stream(world: World) -> None:
    stream = await world.busy("first", tokens=50)
    waiting = world.ask("second")
    await world.wait_queued("second")
    assert (await world.view("first"))["state"] == "ready"
    await world.let_flow("first")
    assert (await waiting).status_code == 200
    assert stream.text == whole_text("first", 50)
    assert stream.is_complete
    first, second = world.seen.one_run("first"), world.seen.one_run("second")
    assert first.last_s > stream.ended_s - 0.1, "it had its memory until its stream had ended"
    assert second.first_s > first.last_s, "the second takes memory only when the first's is back"
    assert world.seen.holding("first") == {}


async def test_a_long_busy_one_is_drained_and_never_cut(world: World) -> None:
    """After 10 s of being ready a busy model lets nobody else in, finishes, and makes room."""
    stream = await world.busy("first", tokens=50)
    waiting = world.ask("second")
    await world.wait_state("first", "draining")
    late = world.ask("first")
    await world.wait_queued("first")
    assert not stream.task.done()
    assert world.seen.holding("first") == {0: 14 * GIB}
    await world.let_flow("first")
    assert (await waiting).status_code == 200
    assert stream.text == whole_text("first", 50)
    assert stream.is_complete
    assert (await late).status_code == 200, "who came while it drained is served by the next attempt"
    old, new = world.seen.runs("first")
    second = world.seen.one_run("second")
    assert old.last_s < second.first_s < second.last_s < new.first_s


async def test_a_busy_one_is_spared_while_an_idle_one_goes(world: World) -> None:
    stream = await world.busy("busy", tokens=20)
    await world.load("idle")
    answers = await asyncio.gather(*(world.chat("newcomer") for _ in range(3)))
    assert [answer.status_code for answer in answers] == [200] * 3
    assert world.seen.holding("idle") == {}
    assert world.seen.holding("busy") == {0: 8 * GIB}
    await world.let_flow("busy")
    assert (await stream.wait_end()).text == whole_text("busy", 20)
    assert stream.is_complete
    for model in ("busy", "idle", "newcomer"):
        world.seen.one_run(model)


async def test_the_queue_keeps_priority_and_then_age(world: World) -> None:
    stream = await world.busy("holder")
    waiting = []
    for model in ("low-one", "low-two", "high"):
        waiting.append(world.ask(model))
        await world.wait_queued(model)
    await world.let_flow("holder")
    answers = await asyncio.gather(*waiting)
    assert [answer.status_code for answer in answers] == [200] * 3, [answer.text for answer in answers]
    assert stream.is_complete
    assert [run.model for run in world.seen.runs()] == ["holder", "high", "low-one", "low-two"]


async def test_many_models_for_one_room_are_all_served(world: World) -> None:
    models = ("first", "second", "third", "fourth")
    answers = await asyncio.gather(*(world.chat(model) for model in models for _ in range(3)))
    assert [answer.status_code for answer in answers] == [200] * 12
    texts = [answer.json()["choices"][0]["message"]["content"] for answer in answers]
    assert texts == [whole_text(model, 8) for model in models for _ in range(3)]
    runs = world.seen.runs()
    assert {run.model for run in runs} == set(models)
    for before, after in itertools.pairwise(runs):
        assert before.last_s < after.first_s, "there is room for one at a time"


async def test_what_can_never_fit_is_refused_and_evicts_nothing(world: World) -> None:
    await world.load("idle")
    for answer in (
        await world.chat("impossible"),
        await world.post("/models/load", model="impossible"),
        await world.post("/models/load", model="impossible", wait=True),
    ):
        assert answer.status_code == 409, answer.text
        assert answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
        assert error["code"] == "cannot_ever_fit"
        assert error["needed_mib"] == 30 * GIB
        assert error["capacity_mib"] == USABLE_MIB
        assert str(30 * GIB) in error["message"]
        assert str(USABLE_MIB) in error["message"]
    stream = await world.stream("impossible").wait_end()
    assert (stream.status, stream.refusal["code"]) == (409, "cannot_ever_fit")
    assert world.seen.holding("idle") == {0: 8 * GIB}
    world.seen.one_run("idle")


async def test_the_last_mebibyte_decides(world: World) -> None:
    answer = await world.chat("just-too-big")
    assert answer.status_code == 409, answer.text
    assert (await world.chat("exactly-all")).status_code == 200
    assert world.gpus.used_mib(0) == USABLE_MIB


async def test_what_pinned_ones_leave_no_room_for_is_refused_and_evicts_nothing(world: World) -> None:
    await world.load("rock", pin=True)
    await world.load("pebble")
    answer = await world.chat("newcomer")
    assert answer.status_code == 503, answer.text
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    error = answer.json()["error"]
    assert error["code"] == "no_room_now"
    assert error["needed_mib"] == 12 * GIB
    assert error["available_mib"] == USABLE_MIB - 16 * GIB
    assert [(h["holder"], h["held_mib"]) for h in error["holders"]] == [("rock", 16 * GIB)]
    assert "rock" in error["message"]
    assert world.seen.holding("rock") == {0: 16 * GIB}
    assert world.seen.holding("pebble") == {0: 4 * GIB}
    world.seen.one_run("pebble")


async def test_foreign_memory_counts(world: World) -> None:
    with world.gpus.hold_foreign(0, 12 * GIB) as pid:

        async def is_noticed() -> bool:
            device = (await world.get("/devices"))["devices"][0]
            return [process["pid"] for process in device["foreign"]] == [pid]

        await until(is_noticed)
        answer = await world.chat("first")
        assert answer.status_code == 503, answer.text
        error = answer.json()["error"]
        assert error["available_mib"] == USABLE_MIB - 12 * GIB
        assert [h["held_mib"] for h in error["holders"]] == [12 * GIB]
        assert str(pid) in error["message"]
        assert (await world.chat("idle")).status_code == 200, "what fits beside it is loaded"
        assert world.gpus.processes(0)[pid] == 12 * GIB
    await until(lambda: not world.gpus.processes(0).get(pid))

    async def is_served() -> bool:
        return (await world.chat("first")).status_code == 200

    await until(is_served)


async def test_memory_that_is_taken_between_claim_and_start_is_not_used_twice(world: World) -> None:
    await world.load("lingering")
    waiting = world.ask("sixteen")
    await world.wait_state("sixteen", "claimed")
    with world.gpus.hold_foreign(0, 9 * GIB) as pid:
        answer = await waiting
        assert answer.status_code == 503, answer.text
        assert str(pid) in answer.json()["error"]["message"]
        assert world.seen.runs("sixteen") == [], "it never took a byte"
    await until(lambda: not world.gpus.processes(0).get(pid))

    async def is_served() -> bool:
        return (await world.chat("sixteen")).status_code == 200

    await until(is_served)
    world.seen.one_run("sixteen")


async def test_an_unreadable_gpu_stops_loads_and_not_service(world: World) -> None:
    await world.load("idle")
    world.gpus.set_fault(0, 999)

    async def is_noticed() -> bool:
        return "error" in (await world.get("/devices"))["devices"][0]

    await until(is_noticed)
    for answer in (await world.chat("busy"), await world.post("/models/load", model="busy", wait=True)):
        assert answer.status_code == 503, answer.text
        error = answer.json()["error"]
        assert error["code"] == "device_unknown"
        assert "memory" in error["message"]
        assert "unknown" in error["message"]
        assert world.gpus.uuids[0] in error["devices"]
        assert int(answer.headers["retry-after"]) <= 60
    assert (await world.http.get("/readyz")).status_code == 503
    assert (await world.http.get("/healthz")).status_code == 200
    assert (await world.chat("idle")).status_code == 200
    stream = await world.stream("idle", tokens=20).wait_end()
    assert stream.text == whole_text("idle", 20)
    assert world.seen.runs("busy") == []
    world.gpus.set_fault(0, 0)

    async def is_served() -> bool:
        return (await world.chat("busy")).status_code == 200

    await until(is_served)
    world.seen.one_run("idle")
    world.seen.one_run("busy")


async def planned(world: World, model: str) -> dict[str, Any]:
    answer = await world.post("/plan", load=model)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def test_what_is_planned_is_what_happens(world: World) -> None:
    await world.load("idle")
    await world.busy("busy")
    used_mib = world.gpus.used_mib(0)
    found = await planned(world, "newcomer")
    assert (found["outcome"], [e["model"] for e in found["evictions"]]) == ("waits", ["idle"])
    gpu = next(device for device in found["devices"] if device["kind"] == "gpu")
    assert gpu["id"] == world.gpus.uuids[0]
    assert (gpu["available_mib"], gpu["takes_mib"]) == (USABLE_MIB - used_mib, 12 * GIB)
    assert gpu["available_after_mib"] == USABLE_MIB - 20 * GIB
    assert world.gpus.used_mib(0) == used_mib, "looking moved somebody"
    await world.load("newcomer")
    assert world.gpus.used_mib(0) == 20 * GIB == USABLE_MIB - gpu["available_after_mib"]
    assert (await world.view("busy"))["state"] == "ready"
    world.seen.one_run("idle")


async def test_somebody_takes_the_memory_between_the_plan_and_the_load(world: World) -> None:
    assert (await planned(world, "sixteen"))["outcome"] == "starts"
    with world.gpus.hold_foreign(0, 10 * GIB) as pid:
        await world.wait_sample()
        answer = await world.post("/models/load", model="sixteen", wait=True)
        assert answer.status_code == 503
        error = answer.json()["error"]
        assert (error["code"], error["needed_mib"]) == ("no_room_now", 16 * GIB)
        assert error["available_mib"] == USABLE_MIB - 10 * GIB
        (holder,) = error["holders"]
        assert (str(pid) in holder["holder"], holder["held_mib"]) == (True, 10 * GIB)
        found = await planned(world, "sixteen")
        assert found["outcome"] == "refused"
        assert {key: error[key] for key in ("message", "code", "holders")}.items() <= found["refusal"].items()
        assert (await planned(world, "slow"))["outcome"] == "starts"
    await world.wait_sample()
    assert (await planned(world, "sixteen"))["outcome"] == "starts"
    assert world.gpus.used_mib(0) == 0


async def test_what_is_planned_anew_because_somebody_took_memory_still_starts(world: World) -> None:
    """Beside the stranger it would still fit, but only with somebody else gone."""
    await world.load("slow")
    assert (await planned(world, "newcomer"))["evictions"] == []
    with world.gpus.hold_foreign(0, 10 * GIB):
        await world.wait_sample()
        (eviction,) = (await planned(world, "newcomer"))["evictions"]
        assert (eviction["model"], eviction["why"].startswith("idle for")) == ("slow", True)
        await world.load("newcomer")
        assert world.gpus.used_mib(0) == 22 * GIB
    world.seen.one_run("slow")


async def test_planning_the_impossible_evicts_nobody(world: World) -> None:
    await world.load("first")
    found = await planned(world, "impossible")
    assert (found["refusal"]["status"], found["refusal"]["code"]) == (409, "cannot_ever_fit")
    assert found["evictions"] == []
    assert (await world.post("/models/load", model="impossible", wait=True)).status_code == 409
    assert (await world.view("first"))["state"] == "ready"
    world.seen.one_run("first")
