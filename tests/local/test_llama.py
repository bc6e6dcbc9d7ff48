"""Real llama.cpp in a process of its own: it chats, says why it cannot start, and ends when asked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator.local.demo import make_demo
from orchestrator.local.llama import BAD_FILE, BAD_VARIABLE, NOT_LOADED, Unusable, read_options
from tests.support import eventually, free_port

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_demo(path, 7)
    return path


Server = tuple[subprocess.Popen[bytes], str]
Start = Callable[..., Server]


@pytest.fixture
def start(model: Path, tmp_path: Path) -> Iterator[Start]:
    running: list[subprocess.Popen[bytes]] = []

    def run(cwd: Path = REPOSITORY, **environment: str) -> Server:
        port = free_port()
        given = {"MODEL_PATH": str(model), "PORT": str(port), "MODEL_NAME": "tiny", "CONTEXT_SIZE": "2048"}
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator.local.llama"],
                env={"PATH": os.environ["PATH"], **given, **environment},
                cwd=cwd,
                stdout=log,
                stderr=log,
            )
        running.append(process)
        return process, f"http://127.0.0.1:{port}"

    yield run
    for process in running:
        process.kill()
        process.wait()


def is_ready(server: Server) -> bool:
    process, url = server
    assert process.poll() is None, "it ended"
    try:
        return httpx.get(url + "/health", timeout=1).status_code == 200
    except httpx.TransportError:
        return False


def post(server: Server, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(server[1] + path, json=body, timeout=30)
    answer.raise_for_status()
    return dict(answer.json())


@pytest.mark.llama
def test_it_chats_under_its_name_and_shows_what_it_does(start: Start) -> None:
    server = start()
    eventually(lambda: is_ready(server))
    answer = post(
        server, "/v1/chat/completions", messages=[{"role": "user", "content": "hello"}], max_tokens=8
    )
    assert answer["usage"]["completion_tokens"] > 0
    assert len(answer["choices"][0]["message"]["content"].split()) > 3, "readable words"
    models = httpx.get(server[1] + "/v1/models", headers={"Origin": "http://elsewhere.example"})
    assert models.json()["data"][0]["id"] == "tiny"
    assert not models.headers.get("access-control-allow-origin"), "no web page may read this"
    assert "llamacpp:prompt_tokens_total" in httpx.get(server[1] + "/metrics").text
    slots = httpx.get(server[1] + "/slots").json()
    assert len(slots) == 4
    assert {slot["n_ctx"] for slot in slots} == {2048}, "slots share one cache"


@pytest.mark.llama
def test_it_calls_tools(start: Start) -> None:
    server = start()
    eventually(lambda: is_ready(server))

    def token(text: str) -> str:
        return str(post(server, "/tokenize", content=text, parse_special=True)["tokens"][0])

    city = {"type": "object", "properties": {"city": {"enum": ["Bern", "Basel"]}}, "required": ["city"]}
    answer = post(
        server,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "weather?"}],
        tools=[{"type": "function", "function": {"name": "weather", "parameters": city}}],
        tool_choice="required",
        logit_bias={token("<tool_call>"): 20, token("<|end|>"): 40},
        max_tokens=200,
        temperature=0,
    )
    assert answer["choices"][0]["finish_reason"] == "tool_calls"
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "weather"
    assert json.loads(call["arguments"])["city"] in ("Bern", "Basel")


@pytest.mark.llama
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_at_once_and_well_also_with_an_open_stream(start: Start, ending: signal.Signals) -> None:
    server = start()
    eventually(lambda: is_ready(server))
    # the bias keeps it from ever ending by itself
    body = {"prompt": "a", "stream": True, "n_predict": 2_000_000, "ignore_eos": True}
    with httpx.stream("POST", server[1] + "/completion", json=body, timeout=30) as stream:
        next(stream.iter_bytes())
        began = time.monotonic()
        server[0].send_signal(ending)
        assert server[0].wait(timeout=5) == 0
        assert time.monotonic() - began < 1


@pytest.mark.llama
def test_no_signal_is_lost_however_early_it_comes(start: Start, tmp_path: Path) -> None:
    """Before its mask is set SIGTERM kills the interpreter, later it ends with 0: it always ends."""
    codes = set()
    for delay_s in (0.0, 0.02, 0.05, 0.08, 0.12, 0.2, 0.4):
        process, _ = start()
        time.sleep(delay_s)
        process.terminate()
        codes.add(process.wait(timeout=5))
    assert codes <= {0, -signal.SIGTERM}
    assert 0 in codes


@pytest.mark.llama
def test_the_one_file_is_enough_and_imports_little(start: Start, tmp_path: Path) -> None:
    """As an image carries it: the package with this module alone."""
    package = tmp_path / "alone" / "orchestrator"
    (package / "local").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "local" / "__init__.py").touch()
    shutil.copy(REPOSITORY / "orchestrator" / "local" / "llama.py", package / "local")
    began = time.monotonic()
    server = start(cwd=package.parent, PYTHONPATH=str(package.parent))
    eventually(lambda: is_ready(server), every_s=0.005)
    assert time.monotonic() - began < 5

    code = "import sys, orchestrator.local.llama as m; print(m.__file__, 'pydantic' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert out.stdout.strip().endswith("local/llama.py False")


@pytest.mark.llama
def test_files_that_cannot_be_loaded_end_it_with_the_reason(
    start: Start, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "cut.gguf").write_bytes(model.read_bytes()[:100_000])
    process, _ = start(MODEL_PATH=str(tmp_path / "cut.gguf"))
    assert process.wait(timeout=10) == NOT_LOADED
    assert f"llama.cpp cannot serve {tmp_path}/cut.gguf" in (tmp_path / "log").read_text()

    process, _ = start(MODEL_PATH="/nowhere.gguf")
    assert process.wait(timeout=10) == BAD_FILE
    assert "cannot start: cannot read /nowhere.gguf: No such file" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("environment", "code", "says"),
    [
        ({"MODEL_PATH": ""}, BAD_VARIABLE, "MODEL_PATH is not set"),
        ({"PORT": "x"}, BAD_VARIABLE, "PORT is 'x', expected a whole number from 0 to 65535"),
        ({"PARALLEL": "0"}, BAD_VARIABLE, "PARALLEL is '0', expected a whole number from 1 to 256"),
        ({"CONTEXT_SIZE": "-1"}, BAD_VARIABLE, "CONTEXT_SIZE is '-1'"),
        ({"CACHE_TYPE_V": "q3"}, BAD_VARIABLE, "CACHE_TYPE_V is 'q3', expected one of f32, f16"),
        ({"MODEL_PATH": "/nowhere.gguf"}, BAD_FILE, "cannot read /nowhere.gguf: No such file"),
        ({"MODEL_PATH": __file__}, BAD_FILE, 'is not a GGUF file: it begins with b\'"""R\''),
        ({"MMPROJ_PATH": "/nowhere.gguf"}, BAD_FILE, "cannot read /nowhere.gguf"),
    ],
)
def test_what_cannot_work_is_refused_before_loading(
    model: Path, environment: dict[str, str], code: int, says: str
) -> None:
    with pytest.raises(Unusable) as caught:
        read_options({"MODEL_PATH": str(model), **environment})
    assert caught.value.code == code
    assert says in str(caught.value)


def test_defaults(model: Path) -> None:
    options = read_options({"MODEL_PATH": str(model), "MMPROJ_PATH": "", "PORT": "", "N_GPU_LAYERS": "3"})
    assert (options.host, options.port, options.name, options.mmproj) == ("127.0.0.1", 8000, "tiny", None)
    assert (options.context_size, options.parallel, options.cache_type_k) == (8192, 4, "f16")
    assert (options.gpu_layers, options.cache_ram_mib) == (3, 0)
