"""Who really asks: what a trusted proxy says of the client it relays, and nobody else's word.

X-Forwarded-For lists the hops, the nearest last. The nearest one that is no proxy of ours is the client:
what stands before it was written by the client.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable

import structlog

from orchestrator.api.asgi import Headers, Scope

log = structlog.get_logger(__name__)

RESOLVE_EVERY_S = 10.0
RESOLVE_AGAIN_S = 0.5
"""While a name has no address yet: its container starts at the same time as ours."""
RELAYED = {b"forwarded", b"x-forwarded-for"}
SCHEMES = {(b"http", "http"): "http", (b"https", "http"): "https"}
SCHEMES |= {(b"http", "websocket"): "ws", (b"https", "websocket"): "wss"}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def address_of(text: str) -> Address | None:
    """The address, None if it is none. What IPv6 sockets call ::ffff:10.0.0.1 is 10.0.0.1."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def is_in(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


class Proxies:
    """The trusted ones: addresses and networks as they are, names as they resolve from time to time."""

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self._networks: list[Network] = []
        self._names: dict[str, frozenset[Address]] = {}
        for one in trusted:
            try:
                self._networks.append(ipaddress.ip_network(one))
            except ValueError:
                self._names[one] = frozenset()

    async def watch(self) -> None:
        """Resolve the names again and again: a container gets another address when it is made anew."""
        while self._names:
            for name in self._names:
                await self.resolve(name)
            await asyncio.sleep(RESOLVE_EVERY_S if all(self._names.values()) else RESOLVE_AGAIN_S)

    async def resolve(self, name: str) -> None:
        """A name that cannot be resolved keeps the addresses it had."""
        try:
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except OSError as error:
            log.debug("a trusted proxy's name was not resolved", name=name, error=str(error))
            return
        addresses = frozenset(a for *_, sockaddr in found if (a := address_of(str(sockaddr[0]))))
        if addresses != self._names[name]:
            log.info("trusted proxy", name=name, addresses=" ".join(sorted(map(str, addresses))))
            self._names[name] = addresses

    def trusts(self, text: str) -> bool:
        address = address_of(text)
        if address is None:
            return False
        return any(address in known for known in self._names.values()) or is_in(address, self._networks)

    def unwrapped(self, scope: Scope) -> Scope:
        """The request as its client made it: `client`, `scheme` and `Host` as a trusted proxy tells them.

        One that somebody else has relayed has no client: whose it is, nobody here can know.
        """
        peer = scope.get("client")
        if peer is None or not self.trusts(peer[0]):
            is_relayed = any(name in RELAYED for name, _ in scope["headers"])
            return {**scope, "client": None} if is_relayed else scope
        told = {**scope, "client": (self._client(scope["headers"], peer[0]), 0)}
        scheme = SCHEMES.get((last_of(scope["headers"], b"x-forwarded-proto").lower(), scope["type"]))
        if scheme is not None:
            told["scheme"] = scheme
        host = last_of(scope["headers"], b"x-forwarded-host")
        if host:
            told["headers"] = [(k, host if k == b"host" else v) for k, v in scope["headers"]]
        return told

    def _client(self, headers: Headers, peer: str) -> str:
        hops = [hop.decode("latin-1") for hop in listed(headers, b"x-forwarded-for")]
        for hop in reversed(hops):
            if not self.trusts(hop):
                return hop
        return hops[0] if hops else peer


def listed(headers: Headers, name: bytes) -> list[bytes]:
    """The entries of a list header, over all its lines."""
    return [
        part.strip() for key, value in headers if key == name for part in value.split(b",") if part.strip()
    ]


def last_of(headers: Headers, name: bytes) -> bytes:
    """What the nearest hop wrote."""
    return next(reversed(listed(headers, name)), b"")
