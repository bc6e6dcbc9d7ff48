"""`trusted_networks` and `trusted_proxies`, from a file or from the text of a variable."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from orchestrator.catalogue.units import listed
from orchestrator.core.keys import Scope

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

HOST_NAME = re.compile(
    r"(?=.{1,253}$)[a-z0-9]([a-z0-9_-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9_-]*[a-z0-9])?)*", re.I
)
SCOPES = ", ".join(Scope)


def networks(value: Any) -> dict[Network, frozenset[Scope]]:
    """Scopes by network. As text: `192.168.1.0/24=inference+admin, 172.28.0.0/16=inference`."""
    given = pairs(value) if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        raise ValueError("expected networks with scopes, such as {192.168.1.0/24: [inference]}")
    return {network(name): scopes(name, wanted) for name, wanted in given.items()}


def pairs(text: str) -> dict[str, list[str]]:
    found = {}
    for part in listed(text):
        name, _, wanted = part.partition("=")
        found[name.strip()] = [word.strip() for word in wanted.split("+")]
    return found


def network(name: object) -> Network:
    try:
        return ipaddress.ip_network(str(name))
    except ValueError as error:
        raise ValueError(
            f"expected networks such as 192.168.1.0/24 or fd00::/8; '{name}' is none ({error})"
        ) from None


def scopes(name: object, wanted: Any) -> frozenset[Scope]:
    try:
        found = frozenset(Scope(word) for word in listed(wanted))
    except (TypeError, ValueError):
        found = frozenset()
    if not found:
        raise ValueError(f"expected scopes for {name}: some of {SCOPES}")
    return found


def proxies(value: Any) -> Any:
    """Addresses, networks and host names, as they were written."""
    names = listed(value)
    for name in names if isinstance(names, list | tuple) else ():
        if not is_network(str(name)) and not is_host_name(str(name)):
            raise ValueError(f"expected addresses, networks or host names; '{name}' is none")
    return names


def is_host_name(name: str) -> bool:
    """The last part has a letter, else it would be an address that somebody mistyped."""
    return HOST_NAME.fullmatch(name) is not None and not name.rpartition(".")[2].isdecimal()


def is_network(name: str) -> bool:
    try:
        ipaddress.ip_network(name)
    except ValueError:
        return False
    return True
