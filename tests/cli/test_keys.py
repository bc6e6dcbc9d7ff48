"""`orchestrator key` through a server and without one, and how commands come by their key."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from orchestrator.cli.main import app
from orchestrator.core.keys import TOKEN
from tests.cli.stub import Stub, error
from tests.server import RunningServer, run_command, running_server
from tests.support import free_port

MISSING = (401, error("needs an API key", "missing_key"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Others can reach it, so it has made the first key."""
    with running_server(tmp_path_factory.mktemp("house"), settings={"host": "0.0.0.0"}) as running:
        running.url = running.url.replace("0.0.0.0", "127.0.0.1")
        running.key = (running.state_dir / "admin.key").read_text().strip()
        yield running


def run_at(server: RunningServer, *arguments: str, key: str | None = None) -> Result:
    """The command in this process, with the key in its variable."""
    env = {"ORCHESTRATOR_URL": server.url, "ORCHESTRATOR_KEY": key}
    return CliRunner().invoke(app, list(arguments), env=env)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which is no server's."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_make_use_list_and_revoke(server: RunningServer) -> None:
    key = server.key
    scopes = ("--scope", "inference", "-s", "lease")
    made = run_at(server, "key", "create", "web", *scopes, "--expires", "90d", key=key)
    assert made.exit_code == 0, made.stderr
    assert TOKEN.fullmatch(made.stdout.strip())  # it alone, so that a script can keep it
    assert made.stderr == "The key 'web' may: inference, lease, for 90d. It is not shown again:\n"
    token = made.stdout.strip()
    listed = run_at(server, "key", "list", key=key)
    (line,) = [line for line in listed.stdout.splitlines() if line.startswith("web ")]
    assert "inference, lease" in line
    assert "in 90 d" in line
    assert line.endswith(token[:12])
    assert token not in listed.stdout
    lesser = run_at(server, "key", "list", key=token)
    assert lesser.exit_code == 1
    assert "needs the scope 'admin', and the key 'web' has: inference, lease." in lesser.stderr
    assert run_at(server, "key", "revoke", "web", key=key).stdout == "The key 'web' counts no more.\n"
    again = run_at(server, "key", "revoke", "web", key=key)
    assert (again.exit_code, again.stderr) == (1, "There is no key 'web'. There are: admin.\n")
    as_json = json.loads(run_at(server, "key", "list", "--json", key=key).stdout)
    assert [known["name"] for known in as_json["keys"]] == ["admin"]


COMMANDS = [["ps"], ["load", "alpha"], ["logs", "alpha"], ["doctor"], ["unload", "alpha"]]


def test_every_command_takes_a_key_in_three_ways(server: RunningServer, elsewhere: Path) -> None:
    assert server.key is not None
    file = elsewhere / "key"
    file.write_text(f"  {server.key}\n")
    for command in COMMANDS:
        for shown in (["--key", server.key], ["--key-file", str(file)]):
            done = run_at(server, *command, *shown)
            assert done.exit_code == 0, done.stderr
        assert run_at(server, *command, key=server.key).exit_code == 0
        refused = run_at(server, *command)
        assert refused.exit_code == 1
        assert "needs an API key with the scope 'admin'" in refused.stderr
        assert "ORCHESTRATOR_KEY" in refused.stderr
    wrong = run_at(server, "ps", "--key", "not a\nkey é")
    assert "not one of this server's" in wrong.stderr
    absent = run_at(server, "ps", "--key-file", "nowhere")
    assert absent.exit_code == 2
    assert absent.stderr == "The key file nowhere cannot be read: No such file or directory.\n"


def test_on_the_servers_own_machine_its_key_file_is_found(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the state folder that the settings here name."""
    monkeypatch.chdir(server.folder)
    for command in COMMANDS:
        done = run_at(server, *command)
        assert done.exit_code == 0, done.stderr


def test_a_lost_key_is_replaced_with_the_server_stopped(tmp_path: Path) -> None:
    with running_server(tmp_path) as server:
        with server.client() as client:
            client.create_key("lost", ["admin"])
        database = ("--database", server.settings["database"])
        busy = server.run("key", "create", "me", "--scope", "admin", *database)
        assert busy.returncode == 1
        assert "belongs to a server that runs already" in busy.stderr
        assert "--url" in busy.stderr
        server.stop()
        unreachable = server.run("key", "list")
        assert unreachable.returncode == 2  # a server was named: its database may be another's
        made = run_command("key", "create", "me", "--scope", "admin", cwd=tmp_path)
        assert made.returncode == 0, made.stderr
        assert f"straight in {server.settings['database']}" in made.stderr
        assert run_command("key", "revoke", "lost", cwd=tmp_path).returncode == 0
        server.start()
        server.key = made.stdout.strip()
        with server.client() as client:
            assert [key["name"] for key in client.list_keys()] == ["me"]


# --- without any server


def run(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["key", *arguments, "--database", str(path)])


def test_before_the_first_start(tmp_path: Path) -> None:
    path = tmp_path / "state" / "x.db"
    looked = run(path, "list")
    assert looked.exit_code == 1
    assert "There is no database" in looked.stderr
    assert not path.parent.exists()
    refused = run(path, "create", "web", "--scope", "inference")
    assert refused.exit_code == 1
    assert "first key must have the scope admin" in refused.stderr
    assert run(path, "create", "me", "--scope", "admin").exit_code == 0
    assert run(path, "create", "web", "--scope", "inference", "--expires", "90d").exit_code == 0
    listed = json.loads(run(path, "list", "--json").stdout)["keys"]
    assert [(key["name"], key["scopes"]) for key in listed] == [("me", ["admin"]), ("web", ["inference"])]
    last = run(path, "revoke", "me")
    assert last.exit_code == 1
    assert "last key with the scope admin" in last.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["create", "x", "--scope", "root"], "--scope: got 'root', expected one of inference, lease, admin."),
        (["create", "x y", "--scope", "admin"], "A name has letters, digits"),
        (
            ["create", "x", "--scope", "admin", "--expires", "soon"],
            "--expires: got 'soon', expected a duration",
        ),
        (["create", "x", "--scope", "admin", "--expires", "0"], "expected a duration above 0"),
        (["create", "x"], "--scope"),
        (["create"], "NAME"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], told: str) -> None:
    result = run(tmp_path / "x.db", *arguments)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "x.db").exists()


# --- what a client shows to whom


def test_a_key_file_is_read_only_when_the_server_asks(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "admin.key").write_text("orc_here\n")
    stub.answers["GET /keys"] = [(200, {"keys": []}), MISSING, (200, {"keys": []})]
    listing = ["key", "list", "--url", stub.url]
    assert CliRunner().invoke(app, listing).exit_code == 0
    assert "Authorization" not in stub.headers[0]
    assert CliRunner().invoke(app, listing).exit_code == 0
    assert [headers.get("Authorization") for headers in stub.headers[1:]] == [None, "Bearer orc_here"]
    stub.answers["GET /keys"] = MISSING
    named = CliRunner().invoke(app, [*listing, "--key", "mine"])
    assert named.exit_code == 1
    assert len(stub.headers) == 4
    assert stub.headers[3]["Authorization"] == "Bearer mine"  # a key that was named is the only one shown


def test_a_server_elsewhere_is_not_told_the_key_of_this_machine(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "admin.key").write_text("orc_here\n")
    monkeypatch.setattr("orchestrator.client.http.is_loopback", lambda url: False)
    monkeypatch.setenv("NO_PROXY", "*")
    stub.answers["GET /keys"] = MISSING
    assert CliRunner().invoke(app, ["key", "list", "--url", stub.url]).exit_code == 1
    assert [headers.get("Authorization") for headers in stub.headers] == [None]


def test_nobody_answers_where_one_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["key", "create", "me", "-s", "admin", "--url", f"http://127.0.0.1:{free_port()}"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2
    assert "No orchestrator answers" in result.stderr
    assert list(tmp_path.iterdir()) == []
