"""OpenAI's own client, unmodified, chats with real llama.cpp: as a host process and as a container."""

import base64
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from orchestrator.local.demo import make_demo
from tests.images.build import build_llama
from tests.server import RunningServer, running_server

pytestmark = pytest.mark.llama

REPOSITORY = Path(__file__).parents[2]
SERVICE = REPOSITORY / "services" / "llama-cpp" / "service.yaml"
IN_IMAGE = ("orchestrator/__init__.py", "orchestrator/local/__init__.py", "orchestrator/local/llama.py")
HELLO = [{"role": "user", "content": "hello"}]
NEVER_ENDING = {"ignore_eos": True}  # random weights may end after a word or two


@pytest.fixture(scope="module", params=["process", pytest.param("docker", marks=pytest.mark.docker)])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server with the repository's own llama-cpp service, and two demo models in a folder."""
    folder = tmp_path_factory.mktemp(f"llama-{request.param}")
    service = yaml.safe_load(SERVICE.read_text())
    del service["volumes"]  # a named volume would outlive the test
    settings: dict[str, Any] = {"engine": request.param}
    if request.param == "docker":
        service["image"] = build_llama({name: REPOSITORY / name for name in IN_IMAGE})
        settings |= {"gpu_access": "none", "docker_network": request.getfixturevalue("network")}
    models = {}
    for name, seed in (("salad", 7), ("soup", 8)):
        make_demo(folder / "ggufs" / f"{name}.gguf", seed)
        entry = {"service": "llama-cpp", "path": f"ggufs/{name}.gguf", "context_size": 2048}
        models[name] = {**entry, "memory": "64MiB", "aliases": [f"{name}-latest"]}
    settings["host_memory_mib"] = 96  # room for one
    with running_server(
        folder, yaml.safe_dump({"models": models}), {"llama-cpp": service}, settings
    ) as server:
        yield server


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with contextlib.closing(openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60)) as client:
        yield client


def test_it_chats(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.chat.completions.create(
        model="salad", messages=HELLO, max_tokens=16, extra_body=NEVER_ENDING
    )
    assert answer.model == "salad"
    assert len((answer.choices[0].message.content or "").split()) > 2, "readable words"
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 16
    assert server.model("salad")["state"] == "ready"


def test_it_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="salad",
        messages=HELLO,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=NEVER_ENDING,
    )
    chunks = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len([text for text in texts if text]) > 2, "word by word"
    finished = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finished[-1] in ("stop", "length")
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 2


def test_an_alias_works_too(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="salad-latest", messages=HELLO, max_tokens=4)
    assert answer.choices[0].message.content


def test_it_calls_tools_and_takes_their_results(client: openai.OpenAI, server: RunningServer) -> None:
    bias = {token_id(server, "<tool_call>"): 20, token_id(server, "<|end|>"): 40}
    city = {"type": "object", "properties": {"city": {"enum": ["Bern", "Basel"]}}, "required": ["city"]}
    answer = client.chat.completions.create(
        model="salad",
        messages=[{"role": "user", "content": "weather?"}],
        tools=[{"type": "function", "function": {"name": "weather", "parameters": city}}],
        tool_choice="required",
        logit_bias=bias,
        max_tokens=200,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    said = answer.choices[0].message
    assert said.tool_calls
    call = said.tool_calls[0]
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Bern", "Basel")

    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [*HELLO, said.model_dump(exclude_none=True), result]
    after = client.chat.completions.create(model="salad", messages=messages, max_tokens=16)
    assert after.choices[0].message.content


@pytest.mark.parametrize("size", [100, 400_000])
def test_images_in_the_short_form_reach_llama_cpp_as_parts(client: openai.OpenAI, size: int) -> None:
    """These models see nothing: llama.cpp's own refusal shows that an image arrived."""
    image = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(size)).decode()
    message: Any = {"role": "user", "content": "What is in this image?", "images": [image]}
    with pytest.raises(openai.APIStatusError, match="image input is not supported"):
        client.chat.completions.create(model="salad", messages=[message], max_tokens=4)


def test_it_lists_models(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"salad", "soup"}
    assert listed["salad"].object == "model"


def test_it_tells_of_one_model(client: openai.OpenAI) -> None:
    assert client.models.retrieve("soup").id == "soup"


def test_one_model_makes_room_for_the_other(client: openai.OpenAI, server: RunningServer) -> None:
    for model, other in (("soup", "salad"), ("salad", "soup")):
        answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=8)
        assert answer.model == model
        assert answer.choices[0].message.content
        assert server.model(model)["status"] == {"value": "loaded"}
        assert server.model(other)["status"]["value"] == "unloaded"


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="no-such-model", messages=HELLO)
    assert "There is no model 'no-such-model'" in raised.value.message
    assert "salad" in raised.value.message, "it says what there is"
    assert raised.value.code == "model_not_found"
    assert raised.value.param == "model"


def token_id(server: RunningServer, text: str) -> str:
    """The id of a token, as llama.cpp says through the server."""
    body = {"model": "salad", "content": text, "parse_special": True}
    answer = httpx.post(f"{server.url}/tokenize", json=body, timeout=30, trust_env=False)
    assert answer.status_code == 200, answer.text
    (token,) = answer.json()["tokens"]
    return str(token)
