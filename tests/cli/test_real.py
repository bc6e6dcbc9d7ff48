"""The installed command and a real server, each a process of its own; the models are mimics."""

import contextlib
import json
import os
import pty
import resource
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nvml.simulated import SimulatedGpus
from tests.server import ORCHESTRATOR, RunningServer, mimic_model, run_command, running_server
from tests.support import eventually, free_port

MODELS = {
    "alpha": {"memory": "120MiB", "environment": {"MIMIC_RAM_MIB": "80"}, "aliases": ["al"]},
    "slow": {"memory": "64MiB", "environment": {"MIMIC_RAM_MIB": "40", "MIMIC_LOAD_S": "1.5"}},
    "broken": {"environment": {"MIMIC_START": "exit:3:boom"}},
    "huge": {"memory": "9GiB"},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tmp_path_factory.mktemp("house"), MODELS) as running:
        yield running


@contextlib.contextmanager
def command(server: RunningServer, *arguments: str, **more: Any) -> "Iterator[subprocess.Popen[bytes]]":
    """The command as a process that still runs."""
    env = server.env | {"ORCHESTRATOR_URL": server.url}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
    with subprocess.Popen([str(ORCHESTRATOR), *arguments], env=env, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def test_load_and_unload(server: RunningServer) -> None:
    loaded = server.run("load", "slow")
    assert loaded.returncode == 0, loaded.stderr
    assert "slow: loading 50 %" in loaded.stderr.splitlines()
    assert loaded.stdout.startswith("slow is ready after ")
    assert "on RAM (" in loaded.stdout
    assert "of 64 MiB reserved)" in loaded.stdout
    unloaded = server.run("unload", "slow")
    assert unloaded.returncode == 0
    words = unloaded.stdout.split()
    assert words[:3] == ["slow", "is", "unloaded,"]
    assert 40 <= int(words[3]) <= 64
    assert words[4:] == ["MiB", "freed."]


def test_load_by_alias_and_ps(server: RunningServer) -> None:
    assert server.run("load", "al", "--pin").returncode == 0
    text = server.run("ps").stdout
    line = next(line for line in text.splitlines() if line.startswith("alpha"))
    assert "ready" in line
    assert "RAM" in line
    assert line.endswith("pinned")
    assert "huge" in next(line for line in text.splitlines() if line.startswith("Not loaded: "))
    state = json.loads(server.run("ps", "--json").stdout)
    assert {model["id"] for model in state["models"]} == MODELS.keys()
    assert json.loads(server.run("unload", "alpha", "--json").stdout)["freed_mib"] >= 80


def test_a_model_that_fails_says_why_and_its_log_stays(server: RunningServer) -> None:
    failed = server.run("load", "broken")
    assert failed.returncode == 1
    assert "exited with code 3" in failed.stderr
    assert "boom" in failed.stderr
    assert failed.stdout == ""
    printed = server.run("logs", "broken")
    assert (printed.returncode, printed.stdout) == (0, "boom\n")
    assert "✗ broken failed" in server.run("ps").stdout


def test_refusals(server: RunningServer) -> None:
    never = server.run("load", "huge")
    assert never.returncode == 1
    assert "9216 MiB" in never.stderr
    unknown = server.run("load", "nobody")
    assert unknown.returncode == 1
    assert "There is no model 'nobody'" in unknown.stderr
    silent = server.run("logs", "huge")
    assert silent.returncode == 1
    assert "no log" in silent.stderr


def test_a_terminal_shows_a_bar(server: RunningServer) -> None:
    reader, writer = pty.openpty()
    with command(server, "load", "slow", stderr=writer) as process:
        os.close(writer)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the other side is closed
            while chunk := os.read(reader, 65536):
                shown += chunk
        assert process.wait(20) == 0
        assert process.stdout is not None
        assert process.stdout.read().startswith(b"slow is ready after ")
    os.close(reader)
    assert "━".encode() in shown
    assert b"slow" in shown
    assert b"loading" in shown
    server.unload("slow")


def test_ctrl_c_ends_the_wait_and_not_the_load(server: RunningServer) -> None:
    with command(server, "load", "slow") as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"slow: ")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        said = process.stderr.read().decode()
    assert "'slow' goes on loading" in said
    assert "Traceback" not in said
    server.wait_state("slow", "ready")
    server.unload("slow")


def test_following_a_log_ends_quietly(server: RunningServer) -> None:
    server.load("alpha")
    with command(server, "logs", "alpha", "-f") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"listening on ")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr.read() == b""
    server.unload("alpha")


def test_a_log_whose_reader_leaves(server: RunningServer) -> None:
    server.load("alpha")
    with command(server, "logs", "alpha", "-f") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        server.unload("alpha")  # its last lines find nobody
        assert process.wait(20) in (0, 1)
        assert process.stderr.read() == b""


def test_doctor_with_a_server(server: RunningServer) -> None:
    found = server.run("doctor")
    assert found.returncode == 0, found.stdout
    assert "engine process" in found.stdout
    diagnosis = json.loads(server.run("doctor", "--json").stdout)
    assert diagnosis["ok"] is True


def test_doctor_without_a_server(tmp_path: Path) -> None:
    with running_server(tmp_path, settings={"port": free_port()}, starts=False) as server:
        url = f"http://127.0.0.1:{server.settings['port']}"
        found = run_command("doctor", url=url, cwd=tmp_path)
        assert found.returncode == 2, found.stdout
        assert f"No orchestrator answers at {url}" in found.stdout
        for check in ("settings", "catalogue", f"port {server.settings['port']}", "docker", "GPUs", "RAM"):
            assert check in found.stdout
        assert "free on 127.0.0.1" in found.stdout
        assert not server.state_dir.exists()  # looking changes nothing


def test_doctor_finds_what_keeps_a_server_from_starting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running_server(tmp_path, settings={"port": port}, starts=False) as server:
            server.write_models("models:\n  a:\n    service: mimic\n    memorie: 1GiB\n")
            url = f"http://127.0.0.1:{free_port()}"
            found = run_command("doctor", "--json", url=url, cwd=tmp_path)
    assert found.returncode == 1
    bad = {
        check["name"]: check["found"]
        for check in json.loads(found.stdout)["checks"]
        if check["status"] == "bad"
    }
    assert bad.keys() == {"catalogue", f"port {port}"}
    assert "models.yaml, line 4" in bad["catalogue"]
    assert f"(PID {os.getpid()})" in bad[f"port {port}"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("models:\n  a:\n    service: mimic\n    memory: lots\n", "models.yaml, line 4: models.a.memory"),
        ("models:\n  a: {service: nobody}\n", "models.yaml, line 2"),
        ("models: [\n", "not valid YAML"),
    ],
)
def test_serve_with_a_broken_catalogue(tmp_path: Path, text: str, told: str) -> None:
    with running_server(tmp_path, text, starts=False) as server:
        ended = run_command("serve", "--config", str(server.config), cwd=tmp_path)
    assert ended.returncode == 2
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr


def test_serve_with_a_wrong_setting(tmp_path: Path) -> None:
    (tmp_path / "orchestrator.yaml").write_text("prot: 8000\n")
    ended = run_command("serve", cwd=tmp_path)
    assert ended.returncode == 2
    assert "orchestrator.yaml, line 1" in ended.stderr
    assert "'port'" in ended.stderr


def test_serve_on_a_used_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, running_server(tmp_path, starts=False) as server:
        port = str(taken.getsockname()[1])
        ended = run_command("serve", "--config", str(server.config), "--port", port, cwd=tmp_path)
    assert ended.returncode == 2
    assert f"Port {port} on 127.0.0.1 is in use" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_serve_twice_on_one_database(server: RunningServer) -> None:
    ended = run_command("serve", "--config", str(server.config), "--port", "0", cwd=server.folder)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


def test_serve_ends_quietly(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        assert server.process is not None
        server.load("alpha")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log()
        assert not server.model_processes()


def test_a_killed_server_comes_back_to_its_models(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        server.load("alpha")
        url, before = server.url, server.model("alpha")["instance"]["attempt"]
        server.kill()
        assert server.model_processes()
        server.restart()
        assert server.url == url
        assert server.wait_state("alpha", "ready")["instance"]["attempt"] == before
    assert not server.model_processes()


def test_simulated_gpus(tmp_path: Path) -> None:
    gpus = SimulatedGpus.create(tmp_path / "gpus", [("Test GPU", 4096, 100)])
    models = {"alpha": mimic_model("500MiB", environment={"MIMIC_MIB": "450"})}
    with running_server(tmp_path, models, settings={"devices": "nvml"}, env=gpus.env) as server:
        loaded = server.run("load", "alpha")
        assert loaded.returncode == 0, loaded.stderr
        assert "on GPU 0 (450 of 500 MiB reserved)" in loaded.stdout
        assert gpus.used_mib(0) == 450
        assert "Test GPU" in server.run("ps").stdout
        assert "450 MiB freed" in server.run("unload", "alpha").stdout
        eventually(lambda: gpus.used_mib(0) == 0)


def test_help_is_fast() -> None:
    """Under 300 ms on an idle machine; CPU time, so that a busy one does not matter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run_command("--help").returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


@pytest.mark.parametrize(("engine", "status"), [("docker", "bad"), ("auto", "warning"), ("process", "ok")])
def test_doctor_minds_docker_as_far_as_it_is_needed(tmp_path: Path, engine: str, status: str) -> None:
    env = {"DOCKER_HOST": f"unix://{tmp_path}/none.sock"}
    with running_server(tmp_path, settings={"engine": engine, "port": 0}, starts=False):
        url = f"http://127.0.0.1:{free_port()}"
        found = run_command("doctor", "--json", url=url, cwd=tmp_path, env=env)
    checks = {check["name"]: check for check in json.loads(found.stdout)["checks"]}
    assert checks["docker"]["status"] == status
    if engine != "process":
        assert checks["docker"]["found"].endswith("none.sock: no such file or directory")


def test_a_gpu_that_came_after_the_first_start_is_a_warning(tmp_path: Path) -> None:
    """The first start had none, chose the RAM, and stays with it."""
    gpus = SimulatedGpus.create(tmp_path / "gpus", [("Test GPU", 4096, 100)])
    empty = {"LD_LIBRARY_PATH": str(tmp_path)}

    def gpus_of(found: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
        checks = {check["name"]: check for check in json.loads(found.stdout)["checks"]}
        return dict(checks.get("GPUs", {}))

    port = free_port()
    with running_server(tmp_path, settings={"devices": "auto", "port": port}, env=empty) as server:
        assert gpus_of(server.run("doctor", "--json")) == {}
        server.stop()
        server.env |= gpus.env
        alone = run_command("doctor", "--json", cwd=tmp_path, env=gpus.env)
        server.start()
        for found in (alone, server.run("doctor", "--json")):
            told = gpus_of(found)
            assert told["status"] == "warning"
            assert told["found"] == "not used: GPU 0 (Test GPU); models have the RAM alone"
            assert "`--devices nvml`" in told["advice"]
        server.write_settings(devices="host")
        server.restart()
        assert gpus_of(server.run("doctor", "--json")) == {}
        server.write_settings(devices="nvml")
        server.restart()
        assert gpus_of(server.run("doctor", "--json")) == {}
