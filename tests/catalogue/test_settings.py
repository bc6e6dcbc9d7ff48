"""Where a setting comes from, and what a wrong one says."""

from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from orchestrator.core.errors import CatalogueError
from orchestrator.core.keys import Scope
from orchestrator.settings import Settings, load_settings
from tests.catalogue.conftest import House


def refused(**explicit: Any) -> str:
    with pytest.raises(CatalogueError) as caught:
        load_settings(**explicit)
    return caught.value.message


def test_nothing_is_required(house: House) -> None:
    settings = load_settings()
    assert (settings.host, settings.port, settings.engine) == ("127.0.0.1", 8000, "auto")
    assert settings.database == house.folder / "state" / "orchestrator.db"
    assert settings.state_dir == house.folder / "state"
    assert settings.services == house.folder / "services"
    assert settings.idle_after == 1800
    assert settings.host_memory_mib is None


def test_services_are_shipped_where_the_folder_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (load_settings().services / "llama-cpp" / "service.yaml").is_file()


def test_arguments_before_variables_before_file(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.write("orchestrator.yaml", "port: 1\npriority: 1\nidle_after: 1m\nmodels_dir: ggufs\n")
    monkeypatch.setenv("ORCHESTRATOR_PORT", "2")
    monkeypatch.setenv("ORCHESTRATOR_PRIORITY", "2")
    settings = load_settings(port=3, host=None)

    assert (settings.port, settings.priority, settings.idle_after) == (3, 2, 60)
    assert settings.models_dir == house.folder / "ggufs"
    assert settings.config == house.folder / "orchestrator.yaml"


def test_the_file_can_be_elsewhere_and_its_paths_count_from_there(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.write("orchestrator.yaml", "port: 1\n")
    other = house.write("etc/mine.yaml", "port: 2\ndatabase: var/o.db\nmount_roots: [/srv/a, /srv/b]\n")
    settings = load_settings(other)
    assert (settings.port, settings.database) == (2, house.folder / "etc" / "var" / "o.db")
    assert settings.mount_roots == (Path("/srv/a"), Path("/srv/b"))

    monkeypatch.setenv("ORCHESTRATOR_CONFIG", "etc/mine.yaml")
    assert load_settings().port == 2
    assert Settings(port=9).port == 9


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("idle_after", "never", None),
        ("idle_after", "2h", 7200),
        ("idle_after", "90", 90),
        ("deadline", "250ms", 0.25),
        ("host_memory_mib", "none", None),
        ("host_memory_mib", "900", 900),
        ("stop_containers_on_exit", "true", True),
        ("allowed_hosts", "gpu.lan, llama.lan", ("gpu.lan", "llama.lan")),
        ("mount_roots", "/srv", (Path("/srv"),)),
        (
            "trusted_networks",
            "192.168.1.0/24=inference+admin, fd00::/8=lease",
            {
                ip_network("192.168.1.0/24"): {Scope.INFERENCE, Scope.ADMIN},
                ip_network("fd00::/8"): {Scope.LEASE},
            },
        ),
        ("trusted_proxies", "caddy, 10.0.0.0/8", ("caddy", "10.0.0.0/8")),
        ("hub_volume", "hf-cache", "hf-cache"),
        ("hub_volume", "", None),
        ("engine", "Docker", "docker"),
        ("log_level", "DEBUG", "debug"),
    ],
)
def test_variables_are_text_of_every_kind(
    house: House, monkeypatch: pytest.MonkeyPatch, key: str, text: str, value: object
) -> None:
    monkeypatch.setenv(f"ORCHESTRATOR_{key.upper()}", text)
    assert getattr(load_settings(), key) == value


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("port: big", 'port: got "big", expected a whole number'),
        ("port: 70000", "port: got 70000, expected at most 65535"),
        ("port: true", "port: got true, expected a whole number"),
        ("idle_after: soon", 'idle_after: got "soon", expected a duration such as'),
        ("deadline: never", 'deadline: got "never", expected a duration such as'),
        ("deadline: -3", "deadline: got -3, expected a duration"),
        ("engine: podman", "engine: got \"podman\", expected one of 'auto', 'docker' or 'process'"),
        ("priority: 101", "priority: got 101, expected at most 100"),
        ("mount_roots: [srv]", 'mount_roots: got ["srv"], expected absolute folders'),
        ("hub_volume: /data", 'hub_volume: got "/data", expected a volume\'s name'),
        ("mount_roots: [/]", 'mount_roots: got ["/"], expected absolute folders'),
        ("allow_remote: perhaps", 'allow_remote: got "perhaps", expected true or false'),
        ("prot: 1", "prot: unknown setting; did you mean 'port'? allowed: allow_remote, "),
        ("config: x.yaml", "config: unknown setting; allowed: "),
        ("trusted_networks: [10.0.0.0/8]", 'trusted_networks: got ["10.0.0.0/8"], expected networks with'),
        (
            "trusted_networks: {10.0.0.1/8: admin}",
            'trusted_networks: got {"10.0.0.1/8": "admin"}, expected networks such as 192.168.1.0/24 or '
            "fd00::/8; '10.0.0.1/8' is none (10.0.0.1/8 has host bits set)",
        ),
        (
            "trusted_networks: {10.0.0.0/8: [root]}",
            'trusted_networks: got {"10.0.0.0/8": ["root"]}, expected scopes for 10.0.0.0/8: some of '
            "inference, lease, admin",
        ),
        (
            "trusted_proxies: 10.0.0.300",
            'trusted_proxies: got "10.0.0.300", expected addresses, networks or host names',
        ),
    ],
)
def test_errors_of_the_file_name_its_line(house: House, line: str, says: str) -> None:
    house.write("orchestrator.yaml", "# settings\nlog_level: info\n\n" + line + "\n")
    assert refused().startswith(f"orchestrator.yaml, line 4: {says}")


def test_errors_of_variables_and_arguments_name_them(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(port="x").startswith('setting port: got "x"')
    monkeypatch.setenv("ORCHESTRATOR_HEADROOM_MIB", "much")
    assert refused() == 'the variable ORCHESTRATOR_HEADROOM_MIB: got "much", expected a whole number'
    monkeypatch.delenv("ORCHESTRATOR_HEADROOM_MIB")
    monkeypatch.setenv("ORCHESTRATOR_HEADROM_MIB", "512")
    message = refused()
    assert "ORCHESTRATOR_HEADROM_MIB is no setting; did you mean 'ORCHESTRATOR_HEADROOM_MIB'?" in message
    monkeypatch.setenv("ORCHESTRATOR_PRT", "1")
    assert "did you mean 'ORCHESTRATOR_PORT'?" in refused()


def test_all_errors_are_told_at_once(house: House) -> None:
    house.write("orchestrator.yaml", "port: a\n\npriority: b\n")
    lines = refused(queue_limit=0).splitlines()
    assert [line.split(": got")[0] for line in lines] == [
        "orchestrator.yaml, line 1: port",
        "orchestrator.yaml, line 3: priority",
        "setting queue_limit",
    ]


def test_unknown_names_hide_no_other_error(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "prot: 8100\nidle_after: soon\nheadroom_mib: 1GiB\nlog_level: loud\n"
    house.write("orchestrator.yaml", text)
    monkeypatch.setenv("ORCHESTRATOR_DEADLINE", "whenever")
    monkeypatch.setenv("ORCHESTRATOR_PRIORTY", "5")
    told = refused(queue_limit=0)
    for start in (
        "the variable ORCHESTRATOR_PRIORTY is no setting; did you mean 'ORCHESTRATOR_PRIORITY'?",
        "orchestrator.yaml, line 1: prot: unknown setting; did you mean 'port'?",
        'orchestrator.yaml, line 2: idle_after: got "soon", expected a duration',
        'orchestrator.yaml, line 3: headroom_mib: got "1GiB", expected a whole number',
        "orchestrator.yaml, line 4: log_level: got \"loud\", expected one of 'debug', 'info'",
        'the variable ORCHESTRATOR_DEADLINE: got "whenever", expected a duration',
        "setting queue_limit: got 0, expected a positive whole number",
    ):
        assert any(line.startswith(start) for line in told.splitlines()), start
    assert len(told.splitlines()) == 7
    house.write("orchestrator.yaml", "port: [\n")
    assert [line.split(":")[0] for line in refused().splitlines()] == [
        "the variable ORCHESTRATOR_PRIORTY is no setting; did you mean 'ORCHESTRATOR_PRIORITY'? allowed",
        "orchestrator.yaml, line 2",
    ]


def test_a_missing_file_that_was_named_is_an_error(house: House) -> None:
    assert "nowhere.yaml: cannot be read" in refused(config="nowhere.yaml")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_needs_no_keys(house: House, host: str) -> None:
    assert not load_settings(host=host).needs_keys


NETWORKS = {"10.0.0.0/8": ["inference"]}


@pytest.mark.parametrize(
    ("chosen", "needs"),
    [
        ({"host": "0.0.0.0"}, True),
        ({"host": "gpu.lan"}, True),
        ({"host": "0.0.0.0", "allow_remote": True}, False),
        ({"trusted_proxies": ["caddy"]}, True),
        ({"trusted_proxies": ["caddy"], "allow_remote": True}, False),
        ({"trusted_networks": NETWORKS}, True),
        ({"host": "0.0.0.0", "allow_remote": True, "trusted_networks": NETWORKS}, True),
    ],
)
def test_who_can_be_reached_needs_keys(house: House, chosen: dict[str, Any], needs: bool) -> None:
    assert load_settings(**chosen).needs_keys is needs


def test_the_client_and_our_marks_have_variables_that_are_no_settings(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_URL", "http://127.0.0.1:8000")
    monkeypatch.setenv("ORCHESTRATOR_ATTEMPT", "a-1")
    assert load_settings().port == 8000


def test_settings_do_not_change(house: House) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().port = 1  # type: ignore[misc]


def test_a_folder_of_a_user_who_is_not_there_is_told(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    nobodys = "~nobody-of-that-name/x"
    house.write("orchestrator.yaml", f"database: {nobodys}.db\n")
    monkeypatch.setenv("ORCHESTRATOR_MODELS", nobodys)
    with pytest.raises(CatalogueError) as told:
        load_settings()
    lines = told.value.message.splitlines()
    assert len(lines) == 2
    assert all("there is no user whose folder is ~nobody-of-that-name" in line for line in lines)
    with pytest.raises(CatalogueError, match="config: there is no user"):
        load_settings(nobodys)
