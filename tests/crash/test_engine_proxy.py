"""The proxy itself, in front of the real engine: what passes, and what each fault does to its callers."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
import requests

from tests.crash.engine_proxy import ANY, CREATE, EVENTS, LIST, EngineProxy
from tests.images.build import build_mimic
from tests.support import eventually

pytestmark = pytest.mark.docker
MARK = "tests.engine-proxy"


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[EngineProxy]:
    with EngineProxy(tmp_path / "engine.sock") as proxy:
        yield proxy


@pytest.fixture
def mark() -> Iterator[str]:
    """A label value; containers that carry it are removed at the end."""
    value = uuid.uuid4().hex
    yield value
    with contextlib.closing(docker.from_env()) as direct:
        for container in with_mark(direct, value):
            container.remove(force=True)


def client(proxy: EngineProxy, timeout_s: int = 30) -> docker.DockerClient:
    return docker.DockerClient(base_url=proxy.url, timeout=timeout_s, version="1.41")


def with_mark(direct: docker.DockerClient, mark: str) -> list[Any]:
    return list(direct.containers.list(all=True, ignore_removed=True, filters={"label": f"{MARK}={mark}"}))


def create(engine: docker.DockerClient, mark: str) -> Any:
    return engine.containers.create(build_mimic(), labels={MARK: mark})


def test_what_has_no_fault_passes(proxy: EngineProxy, mark: str) -> None:
    with contextlib.closing(client(proxy)) as engine:
        container = create(engine, mark)
        container.start()
        eventually(lambda: b"listening" in container.logs())
        assert [found.id for found in with_mark(engine, mark)] == [container.id]
        container.remove(force=True)
        assert with_mark(engine, mark) == []
    assert any(line.startswith("DELETE /containers/") for line in proxy.done)


def test_an_engine_does_late_what_a_dead_caller_asked(proxy: EngineProxy, mark: str) -> None:
    held = proxy.hold_requests(CREATE)
    with (
        contextlib.closing(client(proxy, timeout_s=1)) as engine,
        contextlib.closing(docker.from_env()) as direct,
    ):
        with pytest.raises(requests.exceptions.ReadTimeout):
            create(engine, mark)
        assert with_mark(direct, mark) == []
        held.end()
        eventually(lambda: with_mark(direct, mark))


def test_an_answer_may_be_lost_after_the_deed(proxy: EngineProxy, mark: str) -> None:
    proxy.cut_answers(CREATE, times=1)
    with contextlib.closing(client(proxy)) as engine:
        with pytest.raises(requests.exceptions.ConnectionError):
            create(engine, mark)
        assert len(with_mark(engine, mark)) == 1


def test_a_refusal_reaches_the_caller_and_not_the_engine(proxy: EngineProxy, mark: str) -> None:
    fault = proxy.refuse(CREATE, 409, "somebody is here")
    with contextlib.closing(client(proxy)) as engine:
        with pytest.raises(docker.errors.APIError, match="somebody is here") as refused:
            create(engine, mark)
        assert refused.value.status_code == 409
        assert with_mark(engine, mark) == []
    assert len(fault.hits) == 1


def test_a_hung_engine_answers_when_it_goes_on(proxy: EngineProxy) -> None:
    hung = proxy.hold_requests(ANY)
    answered = threading.Event()
    with contextlib.closing(client(proxy)) as engine:

        def ask() -> None:
            engine.ping()
            answered.set()

        caller = threading.Thread(target=ask)
        caller.start()
        hung.wait_hit()
        assert not answered.is_set()
        hung.end()
        caller.join(20)
    assert answered.is_set()


def test_an_engine_that_is_gone_refuses_and_comes_back(proxy: EngineProxy) -> None:
    with contextlib.closing(client(proxy)) as engine:
        assert engine.ping()
        proxy.leave()
        with pytest.raises(requests.exceptions.ConnectionError):
            engine.ping()
        proxy.listen()
        assert engine.ping()


def test_a_muted_stream_stays_open_and_tells_nothing(proxy: EngineProxy, mark: str) -> None:
    heard: list[str] = []
    with contextlib.closing(client(proxy, timeout_s=60)) as engine:
        stream = engine.events(decode=True, filters={"label": f"{MARK}={mark}"})
        reader = threading.Thread(
            target=lambda: heard.extend(event["Action"] for event in stream), daemon=True
        )
        reader.start()
        proxy.wait_request(EVENTS)
        create(engine, mark)
        eventually(lambda: heard == ["create"])
        muted = proxy.mute()
        create(engine, mark).remove()
        assert len(with_mark(engine, mark)) == 1, "other calls pass"
        muted.end()
        create(engine, mark)
        eventually(lambda: heard == ["create", "create"])
        assert reader.is_alive()
        stream.close()


def test_a_delay_delays_what_matches(proxy: EngineProxy) -> None:
    slow = proxy.delay(0.5, LIST, times=1)
    with contextlib.closing(client(proxy)) as engine:
        lists = threading.Thread(target=engine.containers.list)
        lists.start()
        slow.wait_hit()
        assert engine.ping()
        assert not any("GET /containers/json" in line for line in proxy.done)
        lists.join(20)
    assert any("GET /containers/json" in line for line in proxy.done)
