"""Which server a command talks to where nobody names one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from orchestrator.cli.address import address_here, is_here
from orchestrator.cli.main import app
from orchestrator.settings import load_settings
from tests.cli.stub import Stub
from tests.server import run_command, running_server
from tests.support import free_port


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_nothing_says_where(folder: Path) -> None:
    assert address_here() is None
    (folder / "orchestrator.yaml").write_text("engine: process\n")
    assert address_here() is None


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("port: 8100", "http://127.0.0.1:8100"),
        ('port: "8100"', "http://127.0.0.1:8100"),
        ("host: 0.0.0.0", "http://127.0.0.1:8000"),
        ("host: '::'\nport: 8100", "http://[::1]:8100"),
        ("host: fd00::5", "http://[fd00::5]:8000"),
        ("host: gpu.lan\nport: 80", "http://gpu.lan:80"),
        ("port: 0", None),
        ("port: big", None),
        ("port: [", None),
        ("- port", None),
    ],
)
def test_the_settings_file_says_where(folder: Path, text: str, url: str | None) -> None:
    (folder / "orchestrator.yaml").write_text(text)
    assert address_here() == url


def test_it_is_read_as_serve_reads_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "orchestrator.yaml").write_text("host: 127.0.0.1\nport: 1\n")
    (folder / "other.yaml").write_text("host: 127.0.0.2\nport: 2\n")

    def listens() -> tuple[str | None, str]:
        settings = load_settings()
        return address_here(), f"http://{settings.host}:{settings.port}"

    for name, value in (("CONFIG", "other.yaml"), ("PORT", "3"), ("HOST", "127.0.0.4")):
        monkeypatch.setenv(f"ORCHESTRATOR_{name}", value)
        found, truth = listens()
        assert found == truth
    monkeypatch.delenv("ORCHESTRATOR_PORT")
    assert address_here(Path("orchestrator.yaml")) == "http://127.0.0.4:1"


def test_commands_go_there_unless_a_server_is_named(folder: Path, stub: Stub) -> None:
    stub.answers["GET /doctor"] = (200, {"ok": True, "version": "0", "checks": []})
    (folder / "orchestrator.yaml").write_text(f"port: {stub.url.rpartition(':')[2]}\n")
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    (folder / "orchestrator.yaml").rename(folder / "mine.yaml")
    assert CliRunner().invoke(app, ["doctor", "--config", "mine.yaml"]).exit_code == 0
    (folder / "orchestrator.yaml").write_text(f"port: {free_port()}\n")
    assert CliRunner().invoke(app, ["doctor", "--url", stub.url]).exit_code == 0
    assert len(stub.asked) == 3
    elsewhere = CliRunner().invoke(app, ["ps"])
    assert elsewhere.exit_code == 2
    assert (folder / "orchestrator.yaml").read_text().split()[1] in elsewhere.stderr


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("127.0.0.3", True),
        ("localhost", True),
        ("203.0.113.77", False),
        ("nobody.invalid", False),
        ("[", False),
    ],
)
def test_only_an_address_of_this_machine_is_where_its_server_listens(host: str, is_ours: bool) -> None:
    assert is_here(f"http://{host}:8100") == is_ours


@pytest.mark.parametrize("command", ["ps", "doctor"])
def test_no_settings_file_sends_a_key_to_another_machine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """A folder's file may be anybody's."""
    monkeypatch.setenv("ORCHESTRATOR_KEY", "secret")
    monkeypatch.setattr("orchestrator.cli.talk.Client", None)  # none is made
    (folder / "orchestrator.yaml").write_text("host: 203.0.113.77\n")
    told = CliRunner().invoke(app, [command])
    assert told.exit_code != 0
    assert "http://203.0.113.77:8000, which is not this machine" in " ".join(told.output.split())


def test_to_this_machine_no_proxy_is_asked_and_its_own_key_is_shown(
    folder: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whatever name the settings call it."""
    monkeypatch.setattr("orchestrator.client.http.is_loopback", lambda _url: False)
    monkeypatch.setattr("orchestrator.cli.talk.find_key", lambda _config: "own-key")
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    (folder / "orchestrator.yaml").write_text(f"port: {stub.url.rpartition(':')[2]}\n")
    stub.answers["GET /doctor"] = [(401, {}), (200, {"ok": True, "version": "0", "checks": []})]
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 0
    assert [asked.get("Authorization") for asked in stub.headers] == [None, "Bearer own-key"]


def test_a_settings_file_of_a_user_that_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRATOR_CONFIG", "~nobody-of-that-name/x.yaml")
    assert address_here() is None


def test_looking_for_the_address_loads_no_settings(folder: Path) -> None:
    (folder / "orchestrator.yaml").write_text("port: 8100\n")
    look = (
        "import sys; from orchestrator.cli.address import address_here; assert address_here();"
        "print([m for m in ('pydantic', 'pydantic_settings', 'orchestrator.settings') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_doctor_knows_its_own_server_on_the_port(folder: Path) -> None:
    with running_server(folder) as server:
        port = int(server.url.rpartition(":")[2])
        server.write_settings(port=port)
        found = run_command("doctor", "--json", url=f"http://127.0.0.1:{free_port()}", cwd=folder)
        checks = {check["name"]: check for check in json.loads(found.stdout)["checks"]}
        mine = checks[f"port {port}"]
        assert mine["status"] == "ok"
        assert f"(PID {server.pid})" in mine["found"]
        assert mine["advice"] == f"Ask it: --url {server.url}"
        assert run_command("ps", cwd=folder).returncode == 0
