"""The commands in this process, against a server that answers what it is told to."""

import json
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from orchestrator.cli.main import app
from tests.cli.stub import Stub, error
from tests.cli.test_show import device, running, state
from tests.support import free_port

HEAVY = ("httpx", "rich", "fastapi", "pydantic", "sqlalchemy", "docker", "uvicorn", "structlog", "yaml")


def operation(**changed: Any) -> dict[str, Any]:
    view = {"id": "op-1", "kind": "load", "model": "alpha", "state": "running", "message": "", "freed_mib": 0}
    return view | changed


def run(stub: Stub | None, *arguments: str) -> Result:
    url = stub.url if stub else f"http://127.0.0.1:{free_port()}"
    return CliRunner().invoke(app, list(arguments), env={"ORCHESTRATOR_URL": url})


def loads(stub: Stub, *steps: dict[str, Any]) -> None:
    """A load that is accepted and then goes through these steps."""
    stub.answers["POST /models/load"] = (200, {"success": True, "message": "", "operation": operation()})
    stub.answers["GET /operations/op-1"] = [(200, step) for step in steps]
    stub.answers["GET /state"] = (200, state(running()))


def test_help_loads_nothing_heavy() -> None:
    look = f"import sys; import orchestrator.cli.main; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_help_names_every_command() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    for name in (
        "serve",
        "ps",
        "load",
        "unload",
        "plan",
        "estimate",
        "logs",
        "doctor",
        "database",
        "version",
    ):
        assert f"\n  {name} " in text
    assert "..." not in text.partition("Models:")[2]  # no description is cut short


def test_load_follows_its_operation(stub: Stub) -> None:
    loads(
        stub,
        operation(phase="queued", message="beta is busy"),
        operation(phase="starting", progress={"stage": "loading", "value": 0.6}),
        operation(state="succeeded"),
    )
    result = run(stub, "load", "alpha", "--pin")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "alpha: waiting",
        "alpha: waiting: beta is busy",
        "alpha: loading 50 %",
    ]
    assert result.stdout.startswith("alpha is ready after 0.")
    assert "on GPU 0 (500 of 600 MiB reserved)" in result.stdout
    assert stub.asked[0][2]["pin"] is True


def test_load_that_fails_says_why(stub: Stub) -> None:
    loads(
        stub,
        operation(state="failed", message="'alpha' failed: it exited with code 3.", code="service_failed"),
    )
    result = run(stub, "load", "alpha")
    assert result.exit_code == 1
    assert "it exited with code 3" in result.stderr
    assert result.stdout == ""


def test_load_of_what_is_loaded(stub: Stub) -> None:
    loads(stub)
    stub.answers["POST /models/load"] = (200, {"success": True, "operation": operation(state="succeeded")})
    assert "alpha was loaded already on GPU 0" in run(stub, "load", "alpha").stdout


def test_load_without_waiting(stub: Stub) -> None:
    loads(stub)
    result = run(stub, "load", "alpha", "--no-wait")
    assert result.exit_code == 0
    assert "is being loaded" in result.stdout
    assert len(stub.asked) == 1


@pytest.mark.parametrize(("end", "code"), [("succeeded", 0), ("failed", 1)])
def test_load_as_json(stub: Stub, end: str, code: int) -> None:
    loads(stub, operation(state=end, message="so it is"))
    result = run(stub, "load", "alpha", "--json")
    body = json.loads(result.stdout)
    assert (body["success"], body["operation"]["state"]) == (end == "succeeded", end)
    assert (result.exit_code, result.stderr) == (code, "")


def test_a_refusal_is_a_message_and_in_json_the_body(stub: Stub) -> None:
    stub.answers["POST /models/load"] = (503, error("no room now", "no_room_now", needed_mib=9))
    result = run(stub, "load", "alpha")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "no room now\n")
    result = run(stub, "load", "alpha", "--json")
    assert json.loads(result.stdout)["error"]["needed_mib"] == 9
    assert result.exit_code == 1


def test_unload_follows_and_says_what_came_back(stub: Stub) -> None:
    begun = operation(kind="unload", phase="draining")
    stub.answers["POST /models/unload"] = (200, {"success": True, "message": "", "operation": begun})
    done = operation(kind="unload", state="succeeded", freed_mib=1234)
    stub.answers["GET /operations/op-1"] = (200, done)
    result = run(stub, "unload", "alpha", "--hold", "10m", "--force")
    assert result.stdout == "alpha is unloaded, 1234 MiB freed. It is kept out for 10m.\n"
    assert result.stderr == "alpha: its requests in flight end; --force would cut them\n"
    assert stub.asked[0][2] == {"model": "alpha", "wait": False, "force": True, "hold": "10m"}
    body = json.loads(run(stub, "unload", "alpha", "--json").stdout)
    assert body == {"success": True, "message": "", "operation": done, "freed_mib": 1234}


def test_unload_without_waiting(stub: Stub) -> None:
    begun = operation(kind="unload", phase="stopping")
    stub.answers["POST /models/unload"] = (200, {"success": True, "message": "", "operation": begun})
    assert "is being unloaded" in run(stub, "unload", "alpha", "--no-wait").stdout
    assert len(stub.asked) == 1


def test_unload_of_what_is_not_loaded(stub: Stub) -> None:
    done = operation(kind="unload", state="succeeded", message="'alpha' was not loaded.")
    stub.answers["POST /models/unload"] = (200, {"success": True, "operation": done, "freed_mib": 0})
    result = run(stub, "unload", "alpha")
    assert (result.exit_code, result.stdout) == (0, "'alpha' was not loaded.\n")


def test_ps_shows_state_and_json_repeats_it(stub: Stub) -> None:
    told = state(running(), devices=[device()])
    stub.answers["GET /state"] = (200, told)
    text = run(stub, "ps").stdout
    assert "alpha" in text
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert json.loads(run(stub, "ps", "--json").stdout) == told


def test_logs_are_passed_as_they_are(stub: Stub) -> None:
    stub.answers["GET /logs/alpha"] = (200, b"one\n\xff\xfe two\n")
    result = run(stub, "logs", "alpha", "-n", "5")
    assert result.stdout_bytes == b"one\n\xff\xfe two\n"
    assert stub.asked[0][1] == "/logs/alpha?follow=false&tail=5"


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_doctor_ends_by_what_it_found(stub: Stub, ok: bool, code: int) -> None:
    check = {"name": "store", "status": "ok" if ok else "bad", "found": "here", "advice": "Do that."}
    diagnosis = {"ok": ok, "version": "0", "checks": [check]}
    stub.answers["GET /doctor"] = (200, diagnosis)
    result = run(stub, "doctor")
    assert result.exit_code == code
    assert "→ Do that." in result.stdout
    assert json.loads(run(stub, "doctor", "--json").stdout) == diagnosis


@pytest.mark.parametrize("command", [("ps",), ("load", "a"), ("unload", "a"), ("logs", "a")])
def test_without_a_server(command: tuple[str, ...]) -> None:
    result = run(None, *command)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "No orchestrator answers at http://127.0.0.1:" in result.stderr
    assert "`orchestrator serve`" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command", [("load",), ("nonsense",), ("logs", "a", "--tail", "-1"), ("serve", "--engine", "x")]
)
def test_wrong_usage(command: tuple[str, ...]) -> None:
    assert run(None, *command).exit_code == 2
