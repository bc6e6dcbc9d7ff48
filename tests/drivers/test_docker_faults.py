"""Containers under a bad engine: hung, late, refusing, silent, and people who help themselves meanwhile."""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.ports import Engine, Exit, Found, StartOrder
from orchestrator.core.errors import EngineUnavailable, ImageMissing, NameTaken, NoLog, StartFailed
from orchestrator.drivers import docker_calls, docker_names, docker_spec
from orchestrator.drivers.docker import DockerEngine
from orchestrator.drivers.docker_calls import Limits
from tests.crash.engine_proxy import ANY, CREATE, EVENTS, INSPECT, LIST, REMOVE, START, STOP, EngineProxy
from tests.drivers.engines import (
    WAIT_S,
    World,
    create_only,
    die,
    docker_client,
    docker_world,
    ignore,
    lives,
    opened,
    read_all,
    read_until,
    start_healthy,
    status_of,
    wait_healthy,
)
from tests.support import eventually

pytestmark = pytest.mark.docker

PATIENT = Limits(look_s=10, change_s=30, health_s=1, events_s=1, pull_s=1)
# So short that a busy machine may need longer for a start: it is asked again then, as it always is.
HASTY = replace(PATIENT, look_s=1.5, change_s=1.5)
LOGS = r"^GET /containers/[^/]+/logs"
RENAME = r"^POST /containers/[^/]+/rename"


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[EngineProxy]:
    with EngineProxy(tmp_path / "engine.sock") as proxy:
        yield proxy


@pytest.fixture
async def world(request: pytest.FixtureRequest, proxy: EngineProxy) -> AsyncIterator[World]:
    """Its engines reach Docker through the proxy; `hasty` ones wait for no answer long."""
    world = docker_world()
    network = f"{world.owner}-net"
    limits = HASTY if "hasty" in request.fixturenames else PATIENT

    def make(owner: str) -> DockerEngine:
        engine = DockerEngine(owner, network, "none", proxy.url, limits)
        engine._calls._raises_limits = False  # some engines may not: then a start is two, which confuses
        return engine

    world._make = make
    async with opened(world):
        try:
            yield world
        finally:
            proxy.clear()


@pytest.fixture
def hasty() -> None:
    """Asked for with `usefixtures`; see `world`."""


async def start_at_last(engine: Engine, order: StartOrder) -> Found:
    """As the server does: an engine that does not answer is asked again."""
    async with asyncio.timeout(WAIT_S):
        while True:
            with suppress(EngineUnavailable):
                return await start_healthy(engine, order)


def named(order: StartOrder, name: str) -> StartOrder:
    return replace(order, launch=replace(order.launch, container_name=name))


def containers_of(world: World) -> list[Any]:
    """The owner's containers, asked of the engine itself."""
    with docker_client() as client:
        label = f"{docker_spec.OWNER_LABEL}={world.owner}"
        return list(client.containers.list(all=True, filters={"label": [label]}, ignore_removed=True))


def began_at(container: Any) -> str:
    container.reload()
    return str(container.attrs["State"]["StartedAt"])


async def until(condition: Any) -> Any:
    return await asyncio.to_thread(eventually, condition, WAIT_S)


# ---- no answer ----


@pytest.mark.usefixtures("hasty")
async def test_a_hung_engine_is_unavailable_in_time_and_nothing_is_assumed(
    world: World, proxy: EngineProxy
) -> None:
    engine = await world.open()
    found = await start_at_last(engine, world.order())
    hung = proxy.hold_requests(ANY)
    begun_s = time.monotonic()
    name = engine.container_name(engine.roots()[found.attempt].container_id or "")
    calls = (engine.list(), engine.start(world.order(), ignore), engine.stop(found.attempt, 0), name)
    errors = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), WAIT_S)
    assert [type(error) for error in errors] == [EngineUnavailable] * 4
    assert time.monotonic() - begun_s < 2 * HASTY.look_s + 3  # the stop asks twice
    assert await engine.health() is not None
    assert found.attempt in engine.roots() and not world.exits.has(found.attempt)
    hung.end()  # and now it does all that it was told
    assert (await world.exits.of(found.attempt)).code == 137
    assert (await engine.stop(found.attempt, WAIT_S)).code == 137
    assert await engine.health() is None
    assert [known.attempt for known in await engine.list()] == [found.attempt]


@pytest.mark.parametrize("lost", ["muted", "hung"])
async def test_exits_are_seen_although_the_events_are_lost_without_an_error(
    world: World, proxy: EngineProxy, lost: str
) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    if lost == "muted":
        proxy.mute(EVENTS)
    else:
        proxy.hold_requests(EVENTS)  # no new stream can be had either
        proxy.cut()
    await asyncio.to_thread(die, found, 6)
    begun_s = time.monotonic()
    assert (await world.exits.of(found.attempt)).code == 6
    assert time.monotonic() - begun_s < PATIENT.events_s + 6  # some seconds for a busy machine


async def test_a_stream_that_was_silent_for_long_still_tells(world: World, proxy: EngineProxy) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    seen = len(proxy.done)
    await asyncio.to_thread(proxy.wait_done, EVENTS, seen)
    await asyncio.to_thread(die, found, 6)
    assert (await world.exits.of(found.attempt)).code == 6


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("question", [CREATE, START])
@pytest.mark.parametrize("is_done", [True, False])
async def test_a_start_that_gets_no_answer_is_made_once(
    world: World, proxy: EngineProxy, question: str, is_done: bool
) -> None:
    """The engine is slow and acts before the answer is given up, or long after it was asked again."""
    engine = await world.open()
    order = world.order()
    late = (proxy.hold_answers if is_done else proxy.hold_requests)(question, times=1)
    with pytest.raises(EngineUnavailable):
        await engine.start(order, ignore)
    found = await start_at_last(engine, order)
    (container,) = await asyncio.to_thread(containers_of, world)
    began = await asyncio.to_thread(began_at, container)
    pid, seen = engine.roots()[order.attempt].pid, len(proxy.done)
    late.end()
    await asyncio.to_thread(proxy.wait_done, question, 0 if is_done else seen)
    assert await asyncio.to_thread(began_at, container) == began and lives(pid)
    assert await engine.list() == (found,)
    assert len(await asyncio.to_thread(containers_of, world)) == 1


@pytest.mark.usefixtures("hasty")
async def test_what_ended_before_the_answer_came_is_not_run_again(world: World, proxy: EngineProxy) -> None:
    engine = await world.open()
    order = world.order(start="exit:3:no such file")
    proxy.hold_answers(START, times=1)
    with pytest.raises(EngineUnavailable):
        await engine.start(order, ignore)
    (container,) = await asyncio.to_thread(containers_of, world)
    await until(lambda: status_of(container.id) == "exited")
    found = await engine.start(order, ignore)
    assert found.exit is not None and found.exit.code == 3
    assert (await asyncio.to_thread(container.logs)).count(b"no such file") == 1


@pytest.mark.usefixtures("hasty")
async def test_a_create_that_outlives_its_caller_leaves_nothing_for_long(
    world: World, proxy: EngineProxy
) -> None:
    engine = await world.open()
    order = world.order()
    late = proxy.hold_requests(CREATE, times=1)
    with pytest.raises(EngineUnavailable):  # it hears no more of it, as if it were dead
        await engine.start(order, ignore)
    engine = await world.restart(engine)
    assert await engine.list() == ()
    late.end()
    await until(lambda: containers_of(world))
    assert [(known.attempt, known.is_running) for known in await engine.list()] == [(order.attempt, False)]
    async with asyncio.timeout(2 * WAIT_S):  # nobody ever stops it: a later start of its model tidies up
        while order.attempt in {known.attempt for known in await engine.list()}:
            found = await start_at_last(engine, world.order())
            await engine.stop(found.attempt, 0)
    assert len(await asyncio.to_thread(containers_of, world)) <= 2


@pytest.mark.usefixtures("hasty")
async def test_a_stop_whose_answer_does_not_come_kills(world: World, proxy: EngineProxy) -> None:
    engine = await world.open()
    found = await start_at_last(engine, world.order(ignore_sigterm="1"))
    proxy.hold_requests(STOP, times=1)
    ended = await asyncio.wait_for(engine.stop(found.attempt, 1), WAIT_S)
    assert ended.code == 137
    assert engine.roots() == {}


async def test_a_pull_that_breaks_off_is_no_missing_image(world: World, proxy: EngineProxy) -> None:
    engine = await world.open()
    is_pulling = asyncio.Event()
    with socket.create_server(("127.0.0.1", 0)) as registry:  # takes connections, and says nothing
        image = f"127.0.0.1:{registry.getsockname()[1]}/some/model:1"
        order = world.order()
        order = replace(order, launch=replace(order.launch, image=image))
        start = asyncio.create_task(engine.start(order, lambda progress: is_pulling.set()))
        await is_pulling.wait()
        await asyncio.to_thread(proxy.wait_request, r"^POST /images/create")
        proxy.cut()
        with pytest.raises(EngineUnavailable):
            await asyncio.wait_for(start, WAIT_S)
        with pytest.raises(EngineUnavailable, match="no progress"):  # asked again, it is silent
            await asyncio.wait_for(engine.start(order, ignore), WAIT_S)


# ---- refusals ----


async def test_an_error_of_the_engine_is_no_answer(world: World, proxy: EngineProxy) -> None:
    engine = await world.open()
    proxy.refuse(LIST, 500, "database is locked", times=1)
    with pytest.raises(EngineUnavailable, match="database is locked"):
        await engine.list()
    order = world.order()
    proxy.refuse(INSPECT, 500, "database is locked", times=1)
    with pytest.raises(EngineUnavailable):
        await engine.start(order, ignore)  # it runs, and that is not to be forgotten
    found = await start_healthy(engine, order)
    assert len(await asyncio.to_thread(containers_of, world)) == 1
    proxy.refuse(INSPECT, 500, "database is locked", times=1)
    await asyncio.to_thread(die, found, 6)
    assert (await world.exits.of(found.attempt)).code == 6
    proxy.refuse(ANY, 500, "starting up")
    with pytest.raises(EngineUnavailable, match="starting up"):
        await world.open()


async def test_a_refused_start_has_the_engines_reason_and_leaves_nothing(
    world: World, proxy: EngineProxy
) -> None:
    engine = await world.open()
    proxy.refuse(START, 500, "OCI runtime create failed: it does not like it", times=2)
    with pytest.raises(StartFailed, match="it does not like it"):
        await engine.start(world.order(), ignore)
    assert await asyncio.to_thread(containers_of, world) == []
    # As long as the container cannot be removed it could still be started: nothing is known.
    order = world.order()
    proxy.refuse(REMOVE, 500, "device or resource busy", times=1)
    with pytest.raises(EngineUnavailable, match="device or resource busy"):
        await engine.start(order, ignore)
    await start_healthy(engine, order)
    proxy.refuse(CREATE, 500, "mkdir /var/lib/docker/x: no space left on device", times=1)
    with pytest.raises(StartFailed, match=r"no space left on device.*docker system prune"):
        await engine.start(world.order("other"), ignore)


@pytest.mark.parametrize(
    "text",
    [
        "failed to start shim: mkdir /run/containerd/io.containerd.runtime.v2.task/moby/d47a: file exists",
        "OCI runtime create failed: container with id exists: a43c: unknown",
    ],
)
async def test_what_a_killed_engine_left_of_a_start_is_evaded_by_another_container(
    world: World, proxy: EngineProxy, text: str
) -> None:
    engine = await world.open()
    refusals = proxy.refuse(START, 500, text, times=1)
    found = await start_healthy(engine, world.order())
    (container,) = await asyncio.to_thread(containers_of, world)
    assert container.id not in refusals.hits[0]
    assert found.is_running
    refusals = proxy.refuse(START, 500, text, times=3)
    with pytest.raises(StartFailed, match="could not be started"):
        await engine.start(world.order("other"), ignore)
    assert len(refusals.hits) == 2, "it is tried once more, and then told"


@pytest.mark.parametrize("status", [404, 500])
async def test_a_stop_goes_on_until_it_is_seen_to_have_ended(
    world: World, proxy: EngineProxy, status: int
) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    refusals = proxy.refuse(STOP, status, "cannot kill container", times=3)
    pid = engine.roots()[found.attempt].pid
    assert (await asyncio.wait_for(engine.stop(found.attempt, 1), WAIT_S)).code in (0, 137, 143)
    assert len(refusals.hits) == 3 and not lives(pid)


async def test_an_exit_is_told_although_its_log_cannot_be_had(world: World, proxy: EngineProxy) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    proxy.refuse(LOGS, 409, "can not get logs from container which is dead or marked for removal")
    await asyncio.to_thread(die, found, 6)
    assert await world.exits.of(found.attempt) == Exit(6)


# ---- removed behind our back ----


def remove_by_hand(world: World) -> None:
    for container in containers_of(world):
        container.remove(force=True)


async def test_a_container_removed_while_it_starts_is_a_failed_start(
    world: World, proxy: EngineProxy
) -> None:
    engine = await world.open()
    order = world.order()
    late = proxy.hold_requests(START, times=1)
    start = asyncio.create_task(engine.start(order, ignore))
    await asyncio.to_thread(late.wait_hit)
    await asyncio.to_thread(remove_by_hand, world)
    late.end()
    with pytest.raises(StartFailed, match="removed or disconnected by somebody"):
        await start
    assert await engine.list() == () and engine.roots() == {}
    late = proxy.hold_requests(INSPECT, times=1)  # it has been started
    start = asyncio.create_task(engine.start(order, ignore))
    await asyncio.to_thread(late.wait_hit)
    await asyncio.to_thread(remove_by_hand, world)
    late.end()
    with pytest.raises(StartFailed, match="removed or disconnected by somebody"):
        await start
    await start_healthy(engine, order)


async def test_a_container_removed_while_it_stops_has_ended(world: World, proxy: EngineProxy) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order(ignore_sigterm="1"))
    stream = engine.logs("model", found.attempt, tail=1, follow=True)
    await read_until(stream, b"\n")
    stop = asyncio.create_task(engine.stop(found.attempt, 600))
    await asyncio.to_thread(proxy.wait_request, STOP)
    await asyncio.to_thread(remove_by_hand, world)
    await asyncio.wait_for(stop, WAIT_S)
    await read_all(stream)  # ends
    assert await engine.list() == () and engine.roots() == {}
    with pytest.raises(NoLog):
        await read_all(engine.logs("model", found.attempt, tail=1, follow=False))
    await engine.discard(found.attempt)


async def test_an_image_deleted_under_a_running_container_matters_at_the_next_start_only(
    world: World,
) -> None:
    engine = await world.open()
    order = world.order()
    image = f"orchestrator/{world.owner}:1"
    with docker_client() as client:
        client.images.get(order.launch.image or "").tag(image)
        order = replace(order, launch=replace(order.launch, image=image))
        found = await start_healthy(engine, order)
        client.images.remove(image, force=True)
    assert await engine.list() == (found,)
    await asyncio.to_thread(die, found, 6)
    assert (await world.exits.of(found.attempt)).code == 6
    with pytest.raises(ImageMissing, match="docker build"):
        await engine.start(replace(order, attempt=uuid.uuid4().hex), ignore)


# ---- states that we do not make ----


async def test_a_paused_container_is_running_and_can_be_stopped(world: World) -> None:
    engine = await world.open()
    found = await start_healthy(engine, world.order())
    (container,) = await asyncio.to_thread(containers_of, world)
    await asyncio.to_thread(container.pause)
    assert [known.is_running for known in await engine.list()] == [True]
    await asyncio.wait_for(engine.stop(found.attempt, 1), WAIT_S)
    assert status_of(container.id) == "exited"


async def test_a_container_that_somebody_lets_restart_is_stopped_for_good(
    world: World,
) -> None:
    order = world.order(start="exit:3")
    made = await asyncio.to_thread(create_only, world, order)
    with docker_client() as client:
        container = client.containers.get(made)
        container.update(restart_policy={"Name": "always"})
        container.start()
        await until(lambda: status_of(made) == "restarting")
        engine = await world.open()
        await asyncio.wait_for(engine.stop(order.attempt, 0), WAIT_S)
        began = await asyncio.to_thread(began_at, container)
        assert [known.is_running for known in await engine.list()] == [False]
        assert status_of(made) == "exited" and began_at(container) == began


@pytest.mark.parametrize(
    ("status", "runs", "has_run"),
    [
        ("created", False, False),
        ("running", True, True),
        ("paused", True, True),
        ("restarting", True, True),
        ("removing", False, True),
        ("exited", False, True),
        ("dead", False, True),
    ],
)
def test_every_word_of_the_engine_is_known(status: str, runs: bool, has_run: bool) -> None:
    box = docker_calls.Box("id", "attempt", "model", status, 0, "", 0, 0, False)
    assert (box.is_running, box.has_run) == (runs, has_run)


# ---- names ----


def foreign(name: str, image: str, **options: Any) -> Any:
    with docker_client() as client:
        return client.containers.create(image, name=name, **options)


async def test_a_name_that_others_have_is_theirs_unless_they_say_so(world: World) -> None:
    engine = await world.open()
    name = f"{world.owner}-fixed"
    order = named(world.order(), name)
    image = order.launch.image or ""
    theirs = await asyncio.to_thread(foreign, name, image)
    try:
        with pytest.raises(NameTaken, match=f"not ours and does not run.*`docker rm {name}`"):
            await engine.start(order, ignore)
        await asyncio.to_thread(theirs.start)
        with pytest.raises(NameTaken, match=f"running.*not ours.*`docker rm -f {name}`.*adopt=true"):
            await engine.start(order, ignore)
        assert status_of(theirs.id) == "running"
    finally:
        await asyncio.to_thread(theirs.remove, force=True)
    labels = {docker_spec.ADOPT_LABEL: "true"}
    theirs = await asyncio.to_thread(foreign, name, image, labels=labels, stop_signal="SIGKILL")
    await asyncio.to_thread(theirs.start)
    await start_healthy(engine, order)
    assert status_of(theirs.id) is None
    assert [box.name for box in await asyncio.to_thread(containers_of, world)] == [name]


async def test_the_previous_container_of_a_fixed_name_keeps_its_log_under_a_name_that_says_so(
    world: World,
) -> None:
    engine = await world.open()
    name = f"{world.owner}-fixed"
    for number in (1, 2):
        order = named(world.order(start=f"exit:1:failed {number}"), name)
        await engine.start(order, ignore)
        await world.exits.of(order.attempt)
    await start_healthy(engine, named(world.order(), name))
    await until(lambda: len(containers_of(world)) == 2)
    with docker_client() as client:
        assert b"failed 2" in client.containers.get(f"{name}-previous").logs()
        assert b"listening" in client.containers.get(name).logs()


async def test_models_that_share_a_name_do_not_cost_each_other_their_logs(world: World) -> None:
    engine = await world.open()
    name = f"{world.owner}-fixed"
    for model in ("one", "other", "one"):
        order = named(world.order(model, start=f"exit:1:{model} failed"), name)
        await engine.start(order, ignore)
        await world.exits.of(order.attempt)
    for model, previous in (("one", False), ("one", True), ("other", False)):
        stream = engine.logs(model, None, tail=10, follow=False, previous=previous)
        assert f"{model} failed".encode() in await read_all(stream)
    assert len(await asyncio.to_thread(containers_of, world)) <= 4


async def test_a_name_without_a_fixed_one_is_kept_as_the_models_previous(world: World) -> None:
    engine = await world.open()
    model = world.owner
    crashed = world.order(model, start="exit:1:it failed")
    await engine.start(crashed, ignore)
    await world.exits.of(crashed.attempt)
    await start_healthy(engine, world.order(model))
    previous = f"orchestrator-{model}-previous"
    await until(lambda: previous in [box.name for box in containers_of(world)])


async def test_a_name_whose_holder_is_being_removed_is_waited_for(
    world: World, proxy: EngineProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await world.open()
    first, second = (named(world.order(), f"{world.owner}-fixed") for _ in range(2))
    await engine.start(first, ignore)
    await engine.stop(first.attempt, 0)
    proxy.refuse(RENAME, 409, "container is marked for removal", times=4)
    removal = proxy.refuse(REMOVE, 409, "removal of container is already in progress", times=2)
    await start_healthy(engine, second)
    assert len(removal.hits) == 2
    await engine.stop(second.attempt, 0)
    monkeypatch.setattr(docker_calls, "NAME_TRIES", 3)
    for what in (RENAME, REMOVE):  # and a zombie, whose removal never ends
        proxy.refuse(what, 409, "removal of container is already in progress")
    with pytest.raises(NameTaken, match="still removing its holder"):
        await engine.start(named(world.order(), f"{world.owner}-fixed"), ignore)
    assert docker_names.NAME_TRIES > 3


async def test_a_name_that_is_free_again_after_conflicts_is_taken(world: World, proxy: EngineProxy) -> None:
    engine = await world.open()
    conflicts = proxy.refuse(CREATE, 409, "The container name is already in use", times=2)
    await start_healthy(engine, world.order())
    assert len(conflicts.hits) == 2


# ---- what somebody else has started and lends ----


@pytest.fixture
async def lent(world: World) -> AsyncIterator[tuple[Engine, Any]]:
    """An engine that may take over a container, which runs on the models' network."""
    name = f"{world.owner}-lent"
    make = world._make

    def make_with_name(owner: str) -> Engine:
        engine = make(owner)
        engine._calls._named = lambda: {name: ("model", 8000)}  # type: ignore[attr-defined]
        return engine

    world._make = make_with_name
    engine = await world.open()
    labels = {docker_spec.ADOPT_LABEL: "true"}
    with docker_client() as client:
        container = client.containers.run(
            world.launch.image, name=name, labels=labels, init=True, detach=True
        )
        try:
            yield engine, container
        finally:
            container.remove(force=True)


async def test_what_is_lent_and_was_started_again_is_another_life_of_it(
    world: World, lent: tuple[Engine, Any]
) -> None:
    """Its address may be another now, and it has nothing loaded."""
    engine, container = lent
    found = await until_running(engine)
    await asyncio.to_thread(container.restart, timeout=0)
    await world.exits.of(found.attempt)
    again = await until_running(engine)
    assert again.attempt == found.attempt
    await wait_healthy(again)


async def test_a_restart_policy_does_not_bring_back_what_we_stop(
    world: World, lent: tuple[Engine, Any]
) -> None:
    engine, container = lent
    await asyncio.to_thread(container.update, restart_policy={"Name": "always"})
    found = await until_running(engine)
    await wait_healthy(found)
    die(found, 3)
    await world.exits.of(found.attempt)  # although the engine starts it again at once
    again = await until_running(engine)
    await wait_healthy(again)
    await engine.stop(again.attempt, 1)
    assert [one for one in await engine.list() if one.is_running] == []
    await asyncio.to_thread(container.reload)
    assert container.status == "exited"


async def until_running(engine: Engine) -> Found:
    async with asyncio.timeout(WAIT_S):
        while True:
            for found in await engine.list():
                if found.is_running:
                    return found
