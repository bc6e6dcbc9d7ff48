"""`orchestrator pull` and `rm` against a real server and a local hub."""

import contextlib
import json
import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from orchestrator.local.demo import make_demo
from tests.hub.server import Hub, hub_server
from tests.server import ORCHESTRATOR, RunningServer, running_server
from tests.support import eventually

SERVICE = Path(__file__).parents[2] / "services" / "llama-cpp" / "service.yaml"
REPO = "acme/tiny-GGUF"
NAME = f"{REPO}:Q4_K_M"
HALF = 200_000
MODELS = f"""
models:
  named: {{service: llama-cpp, memory: 64MiB, source: {{repo: {REPO}, file: "*q8_0*", mmproj: "mmproj*"}}}}
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    demo = tmp_path_factory.mktemp("demo") / "demo.gguf"
    make_demo(demo, 7)
    weights = demo.read_bytes()
    with hub_server() as hub:
        hub.add(
            REPO,
            {
                "tiny-Q4_K_M.gguf": weights,
                "tiny-Q8_0.gguf": os.urandom(9000),
                "f/mmproj-F16.gguf": b"x" * 400,
            },
        )
        yield hub


@pytest.fixture(scope="module")
def server(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    services = {"llama-cpp": yaml.safe_load(SERVICE.read_text())}
    with running_server(tmp_path_factory.mktemp("house"), MODELS, services, env=hub.env) as server:
        yield server


def test_pull_and_rm(server: RunningServer, hub: Hub) -> None:
    pulled = server.run("pull", REPO)
    assert pulled.returncode == 0, pulled.stderr
    assert pulled.stdout == f"'{NAME}' is downloaded (468 KiB) and can be loaded.\n"
    assert server.run("pull", NAME).stdout == f"'{NAME}' is here already and can be loaded.\n"
    assert len(hub.asked("tiny-Q4_K_M.gguf")) == 1
    removed = server.run("rm", NAME, "--json")
    assert removed.returncode == 0, removed.stderr
    assert json.loads(removed.stdout)["operation"]["kind"] == "remove"
    assert not list((server.folder / "huggingface").rglob("blobs/*"))
    gone = server.run("rm", NAME)
    assert gone.returncode == 1
    assert f"There is no model '{NAME}'" in gone.stderr


def test_pull_what_models_yaml_names(server: RunningServer, hub: Hub) -> None:
    problem = server.model("named")["problem"]
    assert problem.endswith("get it with: orchestrator pull named.")
    pulled = server.run(*problem.rpartition("orchestrator ")[2].rstrip(".").split())
    assert pulled.returncode == 0, pulled.stderr
    assert "is downloaded (10 KiB) and cannot be loaded: " in pulled.stdout
    assert [len(hub.asked(name)) for name in ("tiny-Q8_0.gguf", "mmproj-F16.gguf")] == [1, 1]
    assert "is not a GGUF file" in server.model("named")["problem"], "it was read at once"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("acme/absent", "has no repository 'acme/absent'"),
        (f"{REPO}:Q2_K", "has no 'Q2_K'. It has: Q4_K_M, Q8_0."),
    ],
)
def test_what_cannot_be_pulled(server: RunningServer, model: str, says: str) -> None:
    failed = server.run("pull", model)
    assert failed.returncode == 1
    assert says in failed.stderr
    assert failed.stdout == ""


def test_ctrl_c_leaves_it_running_and_says_how_to_go_on(server: RunningServer, hub: Hub) -> None:
    pause = hub.pause_after(HALF)
    with pulling(server) as process:
        assert process.stderr is not None
        pause.wait_hit()
        assert process.stderr.readline().startswith(NAME.encode() + b": ")
        assert "downloading" in server.run("ps").stdout
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        said = process.stderr.read().decode()
    assert f"'{REPO}' goes on downloading; `orchestrator pull {REPO}` shows how far it is" in said
    assert f"`orchestrator rm {REPO}` cancels it" in said
    unwaited = server.run("pull", REPO, "--no-wait")
    assert "is being downloaded: 1 file" in unwaited.stdout
    cancelled = server.run("rm", REPO)
    assert cancelled.returncode == 0, cancelled.stderr
    pause.end()


def test_a_terminal_shows_a_bar(server: RunningServer, hub: Hub) -> None:
    pause = hub.pause_after(HALF)
    outside, inside = pty.openpty()
    with pulling(server, stderr=inside) as process:
        os.close(inside)
        pause.wait_hit()
        shown = b""
        while b"of 0.5 MiB" not in shown:
            shown += os.read(outside, 4096)
        pause.end()
        with contextlib.suppress(OSError):  # how a terminal tells its end
            while chunk := os.read(outside, 4096):
                shown += chunk
        assert process.wait(20) == 0
    os.close(outside)
    assert "━".encode() in shown
    eventually(lambda: server.run("rm", REPO).returncode == 0)


@contextlib.contextmanager
def pulling(server: RunningServer, **more: int) -> "Iterator[subprocess.Popen[bytes]]":
    env = server.env | {"ORCHESTRATOR_URL": server.url, "COLUMNS": "120", "TERM": "xterm"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    with subprocess.Popen([str(ORCHESTRATOR), "pull", REPO], env=env, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()
