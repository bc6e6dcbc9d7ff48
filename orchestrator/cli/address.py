"""Where the server of this folder listens, as `serve` would read it; without loading all of the settings."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

DEFAULT_FILE = "orchestrator.yaml"
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}
"""Who listens everywhere listens on the loopback address too."""


def address_here(config: Path | None = None, environment: Mapping[str, str] = os.environ) -> str | None:
    """The URL that `host` and `port` lead to: variables first, then the settings file.

    None where nothing says either, or where the port is any free one. What is wrong in the file is
    left to `serve` and `doctor` to tell.
    """
    variables = {key: environment.get(f"ORCHESTRATOR_{key.upper()}") for key in ("host", "port")}
    said: dict[str, object] = {key: value for key, value in variables.items() if value is not None}
    if len(said) < len(variables):
        said = {**_written(config or environment.get("ORCHESTRATOR_CONFIG")), **said}
    if not said.keys() & variables.keys():
        return None
    host, port = str(said.get("host", DEFAULT_HOST)), str(said.get("port", DEFAULT_PORT))
    return url_of(host, int(port)) if port.isdecimal() and int(port) else None


def is_here(url: str) -> bool:
    """Whether its host is this machine: elsewhere no server of these settings can listen.

    A folder's settings file may be anybody's: it must not lead a key to another machine.
    """
    try:
        found = socket.getaddrinfo(urlsplit(url).hostname or "", 0, type=socket.SOCK_DGRAM)
    except (OSError, ValueError):
        return False
    return any(can_be_bound(family, place) for family, _, _, _, place in found)


def can_be_bound(family: int, place: tuple[Any, ...]) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(place)
    except OSError:
        return False
    return True


def url_of(host: str, port: int) -> str:
    """As a client on this machine reaches who listens there."""
    name = EVERYWHERE.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name and "[" not in name else f"http://{name}:{port}"


def _written(config: Path | str | None) -> Mapping[str, object]:
    """The settings file's keys; none where there is no such file, or no sense in it."""
    try:
        path = Path(config or DEFAULT_FILE).expanduser()
    except RuntimeError:  # there is no such user
        return {}
    if not os.path.lexists(path):
        return {}
    from orchestrator.catalogue.yaml_lines import load_yaml
    from orchestrator.core.errors import CatalogueError

    try:
        data = load_yaml(path.absolute()).data
    except CatalogueError:
        return {}
    return data if isinstance(data, dict) else {}
