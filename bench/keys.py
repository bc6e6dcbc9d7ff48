"""What the check of API keys costs: the gateway with keys, against the same gateway before it had any."""

from __future__ import annotations

import secrets
import time
import timeit
from ipaddress import ip_network
from statistics import median
from typing import cast

from bench.gateway import Load, run_client, stub_behind_gateway
from bench.report import ratio, say, show
from bench.server import Server
from orchestrator.api.access import Access
from orchestrator.api.forwarded import Network
from orchestrator.control.keyring import KeyRing
from orchestrator.control.ports import KeyStore
from orchestrator.core.keys import Scope, issue

CONNECTIONS = 16
ROUNDS = 8
ROUND_S = 1.5
MANY_KEYS = 50
LOOPBACK: dict[Network, frozenset[Scope]] = {ip_network("127.0.0.0/8"): frozenset({Scope.INFERENCE})}


def rounds(servers: dict[str, Server], kind: str) -> dict[str, list[Load]]:
    """The servers in turn, so that other work on the machine disturbs them alike."""
    found: dict[str, list[Load]] = {name: [] for name in servers}
    for _ in range(ROUNDS):
        for name, server in servers.items():
            load = run_client(server.port, CONNECTIONS, ROUND_S, kind, server, server.key)
            found[name].append(load)
    return found


def make_keys(server: Server) -> None:
    """An admin's, and a client's in the middle of many."""
    server.key = server.post("/keys", {"name": "me", "scopes": ["admin"]})["key"]
    for number in range(MANY_KEYS):
        made = server.post("/keys", {"name": f"client-{number}", "scopes": ["inference"]})
    server.key = made["key"]


def row(kind: str, name: str, loads: list[Load], without: list[Load]) -> list[str]:
    cpu_s, cpu_without_s = median(r.cpu_s for r in loads), median(r.cpu_s for r in without)
    per_s, per_s_without = median(r.per_s for r in loads), median(r.per_s for r in without)
    return [
        f"{kind}, {CONNECTIONS} conn., {name}",
        f"{per_s:,.0f}/s",
        ratio(per_s, per_s_without),
        f"{cpu_s * 1e6:,.0f} us",
        ratio(cpu_s, cpu_without_s),
    ]


def check_alone_s(shown: str, networks: dict[Network, frozenset[Scope]]) -> float:
    """Seconds of one check, without a server; other work on the machine disturbs the best of many least."""
    key, token = issue("x", [Scope.INFERENCE], now=0, lasts_s=None, random_hex=secrets.token_hex)
    ring = KeyRing(cast(KeyStore, None), [key], [], is_strict=False, wall=time.time)
    access = Access(ring, networks)
    names = ("host", "accept", "content-type", "content-length", "user-agent")
    headers = [(name.encode(), b"x") for name in names]
    headers += [(b"authorization", f"Bearer {token}".encode())] if shown == "key" else []
    path = "/v1/chat/completions"
    scope = {"type": "http", "method": "POST", "path": path, "client": ("127.0.0.1", 1), "headers": headers}
    assert access.check(scope) is None
    return min(timeit.repeat(lambda: access.check(scope), number=2000, repeat=50)) / 2000


def main() -> None:
    say(f"keys: 2 loads of {ROUNDS} rounds on three servers, about a minute and a half")
    network = {"trusted_networks": {"127.0.0.0/8": ["inference", "admin"]}}
    with (
        stub_behind_gateway() as (open_, _),
        stub_behind_gateway() as (keyed, _),
        stub_behind_gateway(**network) as (trusted, _),
    ):
        make_keys(keyed)
        servers = {"no keys": open_, f"a key of {MANY_KEYS + 1}": keyed, "a trusted network": trusted}
        rows = []
        for kind in ("json", "stream"):
            found = rounds(servers, kind)
            rows += [row(kind, name, loads, found["no keys"]) for name, loads in found.items()]
    show(
        "API keys: what the check costs the gateway",
        ["load", "answers", "to no keys", "CPU/answer", "to no keys"],
        rows,
        [
            f"Medians of {ROUNDS} rounds of {ROUND_S} s, the three servers in turn, on shared cores.",
            f"The check alone: {check_alone_s('key', {}) * 1e6:.1f} us with a key, "
            f"{check_alone_s('nothing', LOOPBACK) * 1e6:.1f} us from a trusted network.",
        ],
    )


if __name__ == "__main__":
    main()
