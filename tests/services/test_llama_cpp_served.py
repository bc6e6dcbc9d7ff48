"""What services/llama-cpp/README.md says of asking and unloading, tried through the orchestrator.

And the same of services/llama-cpp-upstream, whose image is set up by llama.cpp's own variables.
"""

import base64
import contextlib
import json
import re
import struct
import sysconfig
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

from tests.images.llama_cpp import SERVICE, build_bare_llama_cpp
from tests.server import RunningServer, running_server
from tests.services.conftest import MODEL, PROJECTOR, REPO
from tests.services.containers import README, commands, curl_body, docker, in_volume, readme_section, run
from tests.services.projector import IMAGE, TOKENS

pytestmark = [pytest.mark.docker, pytest.mark.llama]

NAME = "qwen3-vl-30b"
CONTAINER = f"llama-cpp-{uuid.uuid4().hex[:8]}"
"""In place of the README's `llama-cpp`, which somebody on this machine may have."""
SHORT = {"max_tokens": 16, "ignore_eos": True}
"""The README's questions, but for answers of a thousand random words."""


def service(name: str, image: str, volume: str, hub_url: str) -> dict[str, Any]:
    """The repository's own service.yaml, with the CPU image and a volume of this test's."""
    entry = dict(yaml.safe_load((SERVICE.parent / name / "service.yaml").read_text()))
    entry["image"] = image
    (inside,) = entry["volumes"].values()
    entry["volumes"] = {volume: inside}
    entry["container_environment"]["HF_ENDPOINT"] = hub_url
    return entry


@pytest.fixture(scope="module")
def cache_volume() -> Iterator[str]:
    name = f"hf-cache-test-{uuid.uuid4().hex[:8]}"
    yield name
    docker("volume", "rm", "--force", name)


@pytest.fixture(scope="module")
def server(
    image: str,
    ggufs: Path,
    hub_url: str,
    network: str,
    cache_volume: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    files = {"path": str(ggufs / MODEL), "mmproj": str(ggufs / PROJECTOR), "memory": "64MiB"}
    upstream = {
        "service": "llama-cpp-upstream",
        **files,
        "context_size": 4096,
        "parallel": 2,
        "cache_type_k": "bf16",
    }
    models = {
        NAME: {"service": "llama-cpp", **files, "container_name": CONTAINER},
        "upstream": upstream,
        "upstream-text": {key: value for key, value in upstream.items() if key != "mmproj"},
    }
    services = {
        "llama-cpp": service("llama-cpp", image, cache_volume, hub_url),
        "llama-cpp-upstream": service("llama-cpp-upstream", build_bare_llama_cpp(), cache_volume, hub_url),
    }
    settings = {"engine": "docker", "gpu_access": "none", "docker_network": network, "host_memory_mib": 1024}
    folder = tmp_path_factory.mktemp("served")
    with running_server(folder, yaml.safe_dump({"models": models}), services, settings) as server:
        yield server


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
        yield client


def ask(http: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    answer = http.post("/v1/chat/completions", json=body | SHORT)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def picture() -> str:
    """A PNG in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + b"".join(bytes([4 * x, 4 * y, 90]) for x in range(IMAGE)) for y in range(IMAGE))
    head = struct.pack(">IIBBBBB", IMAGE, IMAGE, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return base64.b64encode(png).decode()


def test_chat_loads_the_model(http: httpx.Client, server: RunningServer) -> None:
    answer = ask(http, curl_body("Asking it"))
    assert answer["model"] == NAME
    assert answer["choices"][0]["message"]["content"]
    assert server.model(NAME)["state"] == "ready"


def test_streaming(http: httpx.Client) -> None:
    body = curl_body("Asking it") | SHORT | {"stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    words = [json.loads(line[6:])["choices"][0]["delta"].get("content") for line in lines[:-1]]
    assert len([word for word in words if word]) > 2, "word by word"


def test_about_an_image(http: httpx.Client) -> None:
    body = json.dumps(curl_body("About an image"))
    seen = ask(http, json.loads(body.replace("base64_image_data", picture())))
    asked = json.loads(body)
    del asked["messages"][0]["content"][1]
    blind = ask(http, asked)
    assert seen["usage"]["prompt_tokens"] - blind["usage"]["prompt_tokens"] >= TOKENS, (
        "the image was looked at"
    )


def test_about_what_is_no_image_llama_cpp_itself_says_so(http: httpx.Client) -> None:
    body = json.loads(json.dumps(curl_body("About an image")).replace("base64_image_data", "AAAA"))
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert "Failed to load image or audio file" in answer.json()["error"]["message"]


def test_with_tools(http: httpx.Client, server: RunningServer) -> None:
    """The README's request is taken; and OpenAI's client gets a call where random weights are led to one."""
    body = curl_body("With tools")
    assert ask(http, body)["choices"]
    tools = body["tools"]
    tools[0]["function"]["parameters"]["properties"]["location"] = {"enum": ["San Francisco", "Bern"]}
    bias = {token_id(http, "<tool_call>"): 20, token_id(http, "<|end|>"): 40}
    with contextlib.closing(openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=60)) as client:
        answer = client.chat.completions.create(
            model=body["model"],
            messages=body["messages"],
            tools=tools,
            tool_choice="required",
            logit_bias=bias,
            max_tokens=200,
            temperature=0,
        )
    assert answer.choices[0].finish_reason == "tool_calls"
    (call, *_) = answer.choices[0].message.tool_calls or []
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["location"] in ("San Francisco", "Bern")


def token_id(http: httpx.Client, text: str) -> str:
    answer = http.post("/tokenize", json={"model": NAME, "content": text, "parse_special": True})
    (token,) = answer.json()["tokens"]
    return str(token)


@pytest.mark.parametrize(
    ("path", "says"), [("/health", '"ok"'), ("/metrics", "llamacpp:"), ("/v1/models", NAME)]
)
def test_watching_it(http: httpx.Client, path: str, says: str) -> None:
    http.post("/models/load", json={"model": NAME, "wait": True})
    assert re.search(r"https://llama\.lan" + re.escape(path), README)
    assert says in http.get(f"/upstream/{NAME}{path}").text


def test_docker_logs_exec_ls_and_download(http: httpx.Client, image: str, cache_volume: str) -> None:
    http.post("/models/load", json={"model": NAME, "wait": True})
    (download,) = (c for c in commands(readme_section("Downloading a model")) if c[:2] == ["docker", "exec"])
    (listing, *_) = (
        c for c in commands(readme_section("When something is wrong")) if c[:2] == ["docker", "exec"]
    )
    for words in (download, listing):
        done = run(*(CONTAINER if word == "llama-cpp" else word for word in words))
        assert done.returncode == 0, done.stderr
    assert "snapshots" in done.stdout
    assert "flash_attn" in run("docker", "logs", CONTAINER).stderr
    inside = "stat -c '%u %a' /data/.huggingface/hub/models--*/blobs/* | sort -u"
    assert in_volume(image, cache_volume, inside) == "1000 664\n"
    assert REPO in download


def test_unloading_from_a_second_container_with_requests(
    http: httpx.Client, server: RunningServer, image: str
) -> None:
    http.post("/models/load", json={"model": NAME, "wait": True})
    (code,) = re.findall(r"```python\n(.*?)```", readme_section("Freeing the VRAM"), re.DOTALL)
    port = server.url.rpartition(":")[2]
    code = code.replace("orchestrator.lan/", f"orchestrator.lan:{port}/").replace(
        "requests.post(", "print(requests.post("
    )
    packages = sysconfig.get_path("purelib")
    said = docker(
        *("run", "--rm", "--network", "host", "--add-host", "orchestrator.lan:127.0.0.1"),
        *("-v", f"{packages}:/site:ro", "--env", "PYTHONPATH=/site", image),
        *("python3", "-c", code.rstrip().removesuffix(")") + ").json())"),
    )
    assert f"'{NAME}' was unloaded" in said
    assert server.model(NAME)["state"] == "stopped"


def test_a_forced_unload_ends_it_in_the_midst_of_an_answer(http: httpx.Client, server: RunningServer) -> None:
    body = curl_body("Asking it") | {"stream": True, "max_tokens": 1_000_000, "ignore_eos": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data:")
        done = httpx.post(f"{server.url}/models/unload", json={"model": NAME, "force": True}, timeout=60)
        assert done.status_code == 200, done.text
        assert server.model(NAME)["state"] == "stopped"
        assert "data: [DONE]" not in list(lines), "it was cut"
    assert docker("inspect", "-f", "{{.State.Running}}", CONTAINER).strip() == "false"


def test_upstreams_image_is_set_up_the_same(http: httpx.Client) -> None:
    for name, seeing in (("upstream", True), ("upstream-text", False)):
        answer = ask(http, curl_body("Asking it") | {"model": name})
        assert answer["model"] == name
        props = http.get(f"/upstream/{name}/props").json()
        assert props["modalities"]["vision"] is seeing
        slots = http.get(f"/upstream/{name}/slots").json()
        assert [slot["n_ctx"] for slot in slots] == [4096] * 2, "one cache that both share"
        assert "llamacpp:" in http.get(f"/upstream/{name}/metrics").text
        log = http.get(f"/logs/{name}").text
        assert re.search(r"flash_attn += enabled", log)
        assert "K (bf16)" in log
        assert "prompt cache is enabled" not in log
