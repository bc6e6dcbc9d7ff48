"""The scenarios that every system of this kind must survive, and where each is proven over HTTP.

Each runs on host processes and on containers. Those without a test here were written before, under the name
of what they show:

     1  empty, 20 parallel requests            test_loading: twenty_requests_make_one_start
     2  room for one, another is asked         here: the_first_is_gone_before_the_second_begins
     3  asked while another streams            test_loading: eviction_waits_for_the_end_of_a_stream;
                                               here: a_wait_is_visible
     5  one busy, one idle, three ask          test_loading: a_busy_one_is_spared_while_an_idle_one_goes
     6  order and priority of the queue        test_loading: the_queue_keeps_priority_and_then_age
     8  asked while it stops                   test_unloading: who_comes_while_it_stops_is_served_…
     9  unloaded while it loads                test_unloading: unload_aborts_a_start_and_tells_who_waits
    12  exits at once                          test_failures: a_service_that_exits_at_once_says_why_…;
                                               test_service_faults: each_failure_doubles_the_pause
    13  never healthy                          test_failures: a_service_that_never_gets_healthy_is_killed;
                                               test_service_faults: one_that_never_gets_healthy_gives_…
    14  killed when ready                      test_failures: a_kill_while_idle_is_noticed
    15  ignores SIGTERM                        test_unloading: unload_kills_what_ignores_the_signal;
                                               test_failures: others_are_served_while_one_refuses_to_end
    18  needs more than there is               test_loading: what_can_never_fit_is_refused_and_evicts_nothing
    20  two starts race for the last room      here: of_two_that_race_for_the_last_room_one_waits
    22  idle limit under a long request        test_unloading: a_long_stream_is_not_idle
    24  the container's name is taken          here: a_name_that_is_taken_…
    25  killed with two running                test_restart: what_runs_when_the_server_is_killed_is_adopted
    26  a full queue                           test_fairness: a_full_queue_refuses_the_next_…
    28  two GPUs                               test_two_gpus: two_gpus_load_at_the_same_time
"""

import asyncio
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker.models.containers import Container

from tests.e2e.conftest import docker_client
from tests.e2e.world import Engine, World, mimic, open_house, open_world, until
from tests.server import OWNER_LABEL

GIB = 1024
MODELS = {
    "first": mimic(14 * GIB, release_s=0.5),
    "second": mimic(14 * GIB),
    "half-one": mimic(11 * GIB, load_s=1),
    "half-two": mimic(11 * GIB, load_s=1),
    "half-three": mimic(11 * GIB, load_s=1),
}


async def test_the_first_is_gone_before_the_second_begins(world: World) -> None:
    """2. A ready model that nobody uses makes room, and only when its memory is back the next begins."""
    await world.load("first")
    assert (await world.chat("second")).status_code == 200
    first, second = world.seen.one_run("first"), world.seen.one_run("second")
    assert first.last_s < second.first_s
    view = await world.view("first")
    assert view["status"] == {"value": "unloaded", "exit_code": 0}, "making room is no failure"
    assert len(await world.notes("evicted", "first")) == 1


async def test_a_wait_is_visible(world: World) -> None:
    """3. Who waits, how long already, and for what: in GET /state, and as `loading` in GET /models."""
    stream = await world.busy("first", tokens=20)
    asked = world.ask("second")
    await world.wait_queued("second")
    (entry,) = (await world.get("/state"))["queue"]
    assert (entry["model"], entry["waiting"]) == ("second", 1)
    assert "first" in entry["reason"], "it names who holds the room"
    assert entry["for_s"] >= 0
    listed = {m["id"]: m["status"]["value"] for m in (await world.get("/models"))["data"]}
    assert (listed["first"], listed["second"]) == ("loaded", "loading")
    await world.let_flow("first")
    assert (await asked).status_code == 200
    assert stream.is_complete

    async def nobody_waits() -> bool:
        return not (await world.get("/state"))["queue"]

    await until(nobody_waits)


async def test_of_two_that_race_for_the_last_room_one_waits(world: World) -> None:
    """20. Three of 11 GiB for 23: what was promised to two is not there for the third."""
    answers = await asyncio.gather(*(world.chat(f"half-{n}") for n in ("one", "two", "three")))
    assert [answer.status_code for answer in answers] == [200] * 3
    runs = world.seen.runs()
    assert len(runs) == 3
    early, late = runs[:2], runs[2]
    assert max(run.first_s for run in early) < min(run.grown_s for run in early), "two load at once"
    assert late.first_s > min(run.last_s for run in early)


# ---- a name that is taken ----


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a container; whoever has it at the end is removed."""
    name = f"orchestrator-e2e-{uuid.uuid4().hex[:12]}"
    yield name
    client = docker_client()
    for container in client.containers.list(all=True, ignore_removed=True, filters={"name": name}):
        container.remove(force=True)
    client.close()


def someone_with(name: str, image: str, *, runs: bool) -> Container:
    """A container that is not ours and has this name."""
    client = docker_client()
    made: Container = client.containers.create(image, name=name, environment={"MIMIC_NAME": "stranger"})
    if runs:
        made.start()
    return made


@pytest.mark.docker
@pytest.mark.parametrize("runs", [False, True], ids=["dead", "running"])
async def test_a_name_that_is_taken_by_a_stranger_is_said_and_the_stranger_left_alone(
    mimic_image: str, network: str, tmp_path: Path, name: str, runs: bool
) -> None:
    """24. It is not ours to remove; once it is gone the next try succeeds."""
    models = {"named": mimic(4 * GIB) | {"container_name": name}}
    stranger = await asyncio.to_thread(someone_with, name, mimic_image, runs=runs)
    with open_house(tmp_path, Engine("docker", mimic_image, network), models) as house:
        async with open_world(house) as world:
            answer = await world.post("/models/load", model="named", wait=True)
            assert answer.status_code == 503, answer.text
            assert name in answer.json()["error"]["message"]
            await asyncio.to_thread(stranger.reload)
            assert stranger.status == ("running" if runs else "created")
            assert world.gpus.used_mib(0) == 0
            await asyncio.to_thread(stranger.remove, force=True)
            await world.load("named")
            assert (await world.chat("named")).status_code == 200


@pytest.mark.docker
async def test_a_name_that_our_last_container_has_is_taken_over(
    mimic_image: str, network: str, tmp_path: Path, name: str
) -> None:
    """24. Two loads of one model, and a crash between them: always the same name, never a second one."""
    models = {"named": mimic(4 * GIB) | {"container_name": name}}
    with open_house(tmp_path, Engine("docker", mimic_image, network), models) as house:
        async with open_world(house) as world:
            for _ in range(2):
                await world.load("named")
                assert len(await asyncio.to_thread(ours_with, name)) == 1
                await world.unload("named")
            await world.load("named")
            await world.http.post(f"{await world.address('named')}/control/stream-hold", json={"hold": False})
            (container,) = await asyncio.to_thread(ours_with, name)
            await asyncio.to_thread(container.kill)
            await until(lambda: not world.seen.pids("named"))
            assert (await world.chat("named")).status_code == 200
            assert len(await asyncio.to_thread(ours_with, name)) == 1
            assert len(world.seen.runs("named")) == 4


def ours_with(name: str) -> list[Container]:
    client = docker_client()
    wanted: dict[str, str | list[str] | bool] = {"name": f"^/{name}$", "label": OWNER_LABEL}
    found: list[Container] = client.containers.list(all=True, ignore_removed=True, filters=wanted)
    return found
