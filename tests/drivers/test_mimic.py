"""The mimic does what other tests rely on: serves as a GPU service would, and fails as it is told."""

import asyncio
import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from websockets.sync.client import connect

from tests.mimic.process import MimicProcess, mimic
from tests.nvml.simulated import SimulatedGpus
from tests.support import eventually

MIB = 1024 * 1024
CHAT = "/v1/chat/completions"
ASKED = {"model": "any", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def running() -> Iterator[MimicProcess]:
    with mimic(name="qwen") as process:
        yield process.wait_ready()


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedGpus:
    return SimulatedGpus.create(tmp_path / "gpus", [("Simulated RTX 3090", 24576, 400)])


@contextmanager
def raw_request(running: MimicProcess, path: str, body: dict) -> Iterator[socket.socket]:
    """A connection on which a request was sent."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: mimic\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", running.port), timeout=10) as connection:
        connection.sendall(head + content)
        yield connection


def read_all(connection: socket.socket) -> bytes:
    """Everything until the other side closes, in whatever way it does."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def open_client(running: MimicProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


# ---- answers ----


def test_the_openai_client_gets_an_answer(running: MimicProcess) -> None:
    with open_client(running) as client:
        answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])
        assert answer.choices[0].message.content == "qwen 1 2 3 4 5 6 7"
        assert answer.usage is not None and answer.usage.completion_tokens == 8
        assert client.completions.create(model="m", prompt="hello", max_tokens=2).choices[0].text == "qwen 1"
        assert [model.id for model in client.models.list()] == ["qwen"]
        embeddings = client.embeddings.create(model="m", input=["a", "b", "a"], encoding_format="float").data
        assert embeddings[0].embedding == embeddings[2].embedding != embeddings[1].embedding
        heard = client.audio.transcriptions.create(model="whisper-1", file=b"\0" * 100_000)
        assert heard.text.startswith("qwen heard 100")
        assert heard.model_extra is not None and heard.model_extra["model"] == "whisper-1"


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_openai_client_gets_a_stream(running: MimicProcess, is_chat: bool) -> None:
    with open_client(running) as client:
        wishes = {"extra_body": {"mimic": {"tokens": 3}}, "stream_options": {"include_usage": True}}
        if is_chat:
            messages = [{"role": "user", "content": "hello"}]
            chunks = list(client.chat.completions.create(model="m", messages=messages, stream=True, **wishes))
            words = [chunk.choices[0].delta.content for chunk in chunks[:3]]
        else:
            chunks = list(client.completions.create(model="m", prompt="hello", stream=True, **wishes))
            words = [chunk.choices[0].text for chunk in chunks[:3]]
        assert words == ["qwen", " 1", " 2"]
        assert chunks[3].choices[0].finish_reason == "stop"
        assert chunks[4].usage is not None and chunks[4].usage.completion_tokens == 3
    assert running.stats()["streams"] == 1


def test_a_stream_keeps_its_pace(running: MimicProcess) -> None:
    began_s = time.monotonic()
    wishes = {"stream": True, "mimic": {"tokens": 11, "tokens_per_s": 50}}
    with httpx.stream("POST", running.url + CHAT, json=ASKED | wishes) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert len(lines) == 13
    assert lines[-1] == "data: [DONE]"
    assert time.monotonic() - began_s >= 0.2


def test_streams_can_be_held(running: MimicProcess) -> None:
    running.post("/control/stream-hold", {"hold": True})
    with httpx.stream("POST", running.url + CHAT, json=ASKED | {"stream": True}) as answer:
        assert answer.status_code == 200
        assert running.stats()["in_flight"] == 1
        running.post("/control/stream-hold", {"hold": False})
        assert answer.read().endswith(b"data: [DONE]\n\n")
    eventually(lambda: running.stats()["in_flight"] == 0)


def test_echo_tells_what_arrived(running: MimicProcess) -> None:
    body = os.urandom(3 * MIB)
    parts = (body[i : i + 100_000] for i in range(0, len(body), 100_000))
    answer = httpx.put(f"{running.url}/echo/a%20b?c=1&c=2", content=parts, headers={"X-Mark": "yes"}).json()
    assert answer["method"] == "PUT"
    assert answer["path"] == "/echo/a%20b"
    assert answer["query"] == "c=1&c=2"
    assert answer["headers"]["x-mark"] == "yes"
    assert answer["body_bytes"] == len(body)
    assert answer["sha256"] == hashlib.sha256(body).hexdigest()
    assert httpx.head(f"{running.url}/echo/x").headers["content-type"] == "application/json"


def test_websocket_messages_come_back(running: MimicProcess) -> None:
    big = os.urandom(100_000)
    with connect(f"ws://127.0.0.1:{running.port}/ws", max_size=None) as peer:
        for message in ("hello", b"bytes", big):
            peer.send(message)
            assert peer.recv() == message
        assert running.stats()["in_flight"] == 1
        assert peer.ping().wait(5)
    eventually(lambda: running.stats()["in_flight"] == 0)
    assert running.stats()["client_left"] == 0


def test_looking_is_not_counted(running: MimicProcess) -> None:
    for path in ("/health", "/v1/models", "/slots", "/props"):
        assert running.get(path)[0] == 200
    assert "llamacpp:requests_processing 0" in httpx.get(f"{running.url}/metrics").text
    assert running.get("/nowhere")[0] == 404
    assert running.stats() == {"requests": 0, "streams": 0, "client_left": 0, "in_flight": 0}


def test_connections_are_reused(running: MimicProcess) -> None:
    with httpx.Client(base_url=running.url) as client:
        for _ in range(3):
            assert client.post(CHAT, json=ASKED).status_code == 200
        refused = client.post(CHAT, json=ASKED | {"mimic": {"status": 500}})
        assert refused.status_code == refused.json()["error"]["code"] == 500
        assert client.post("/echo/x?mimic=" + json.dumps({"status": 503})).status_code == 503
        with pytest.raises(httpx.RemoteProtocolError):
            client.post(CHAT, json=ASKED | {"mimic": {"cut_if_reused": True}})
        assert client.post(CHAT, json=ASKED | {"mimic": {"cut_if_reused": True}}).status_code == 200


# ---- clients that leave, answers that are cut ----


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_seen_at_once(running: MimicProcess, stream: bool) -> None:
    slow = ASKED | {"stream": stream, "mimic": {"tokens": 1000, "tokens_per_s": 0.1}}
    with raw_request(running, CHAT, slow):
        eventually(lambda: running.stats()["in_flight"] == 1)
    left_s = time.monotonic()
    eventually(lambda: "client left" in running.lines, every_s=0.001)
    assert time.monotonic() - left_s < 1
    stats = running.stats()
    assert (stats["client_left"], stats["in_flight"]) == (1, 0)


def test_a_client_that_leaves_while_waiting_is_seen(running: MimicProcess) -> None:
    with raw_request(running, CHAT, ASKED | {"mimic": {"delay_s": 60}}):
        eventually(lambda: running.stats()["in_flight"] == 1)
    eventually(lambda: running.stats()["client_left"] == 1)


def test_a_stream_can_be_cut_after_some_chunks(running: MimicProcess) -> None:
    with raw_request(running, CHAT, ASKED | {"stream": True, "mimic": {"cut_after": 2}}) as connection:
        received = read_all(connection)
    assert received.count(b"data: ") == 2
    assert b"[DONE]" not in received
    assert running.stats() == {"requests": 1, "streams": 1, "client_left": 0, "in_flight": 0}


def test_an_answer_can_be_cut_before_its_first_byte_and_in_its_middle(running: MimicProcess) -> None:
    with raw_request(running, CHAT, ASKED | {"mimic": {"cut_after": 0}}) as connection:
        assert read_all(connection) == b""
    with pytest.raises(httpx.RemoteProtocolError, match="closed connection"):
        httpx.post(running.url + CHAT, json=ASKED | {"mimic": {"cut_after": 1}})


@pytest.mark.parametrize("stream", [True, False])
def test_it_can_crash_in_the_middle_of_an_answer(stream: bool) -> None:
    with mimic(crash_after=2) as running:
        running.wait_ready()
        assert [running.post(CHAT, ASKED)[0] for _ in range(2)] == [200, 200]
        with pytest.raises(httpx.RemoteProtocolError, match="closed connection"):
            httpx.post(running.url + CHAT, json=ASKED | {"stream": stream})
        assert running.wait_exit() == -signal.SIGKILL


# ---- starting and ending ----


def test_a_failing_start_tells_why() -> None:
    with mimic(start="exit:3:no such file: model.gguf") as running:
        assert running.wait_exit() == 3
    assert running.errors == ["no such file: model.gguf"]


def test_a_slow_load_is_unhealthy_and_grows(gpus: SimulatedGpus) -> None:
    settings = {"mib": 1000, "load_s": 0.6, "cuda_visible_devices": gpus.uuids[0]}
    with gpus.watch_overbooking() as seen, mimic(gpus.env, **settings) as running:
        assert running.get("/health") == (
            503,
            {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}},
        )
        assert running.post(CHAT, ASKED)[0] == 503
        eventually(lambda: 0 < gpus.used_mib(0) < 1000)
        running.wait_ready()
        assert running.get("/health") == (200, {"status": "ok"})
        assert gpus.used_mib(0) == 1000
        eventually(lambda: seen.max_used_mib[0] == 1000)  # sampled in a thread of its own


def test_it_can_stay_unhealthy(gpus: SimulatedGpus) -> None:
    with mimic(gpus.env, mib=700, never_healthy=1, cuda_visible_devices="0") as running:
        eventually(lambda: gpus.used_mib(0) == 700)
        assert running.get("/health")[0] == 503


def test_without_a_visible_gpu_it_fails(gpus: SimulatedGpus) -> None:
    with mimic(gpus.env, mib=700, cuda_visible_devices="GPU-unknown") as running:
        assert running.wait_exit() == 1
    assert running.errors == ["CUDA error: no CUDA-capable device is detected"]
    assert gpus.overbooked() == []


def test_real_memory_is_taken_and_touched() -> None:
    with mimic(ram_mib=200) as running:
        running.wait_ready()
        status = Path(f"/proc/{running.pid}/status").read_text()
        anonymous_kib = next(int(line.split()[1]) for line in status.splitlines() if "RssAnon" in line)
        assert anonymous_kib > 200 * 1024


def test_sigterm_ends_it_within_moments(gpus: SimulatedGpus) -> None:
    with mimic(gpus.env, mib=500, cuda_visible_devices="0") as running:
        running.wait_ready()
        with raw_request(running, CHAT, ASKED | {"stream": True, "mimic": {"tokens_per_s": 0.1}}):
            eventually(lambda: running.stats()["in_flight"] == 1)
            told_s = time.monotonic()
            running.process.terminate()
            assert running.wait_exit() == 0
            assert time.monotonic() - told_s < 0.5
    assert gpus.used_mib(0) == 0


def test_sigterm_can_be_ignored() -> None:
    with mimic(ignore_sigterm=1) as running:
        running.wait_ready()
        running.process.terminate()
        assert running.get("/health")[0] == 200
        assert running.process.poll() is None


def test_memory_can_be_released_late(gpus: SimulatedGpus) -> None:
    with mimic(gpus.env, mib=500, release_s=0.5, cuda_visible_devices="0") as running:
        running.wait_ready()
        running.process.terminate()
        eventually(lambda: "stopping" in running.lines)
        with pytest.raises(OSError):
            running.get("/health")
        assert gpus.used_mib(0) == 500
        assert running.wait_exit() == 0
    assert gpus.used_mib(0) == 0


def test_it_exits_as_told(running: MimicProcess) -> None:
    with pytest.raises(OSError):
        running.post("/die", {"code": 42})
    assert running.wait_exit() == 42


async def test_many_clients_at_once(running: MimicProcess) -> None:
    async with httpx.AsyncClient(base_url=running.url) as client:
        asked = ASKED | {"stream": True, "mimic": {"tokens": 20, "tokens_per_s": 200}}
        answers = await asyncio.gather(*(client.post(CHAT, json=asked) for _ in range(32)))
    assert all(answer.text.endswith("data: [DONE]\n\n") for answer in answers)
    assert running.stats() == {"requests": 32, "streams": 32, "client_left": 0, "in_flight": 0}
