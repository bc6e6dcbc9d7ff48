"""Who may call: one check of keys, networks and browser sessions for everything that is served.

It reads the plain ASGI request, since the gateway's bytes pass by all middleware.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import lru_cache

import structlog

from orchestrator.api.asgi import Headers, Scope
from orchestrator.api.forwarded import Network, address_of
from orchestrator.api.problems import Problem
from orchestrator.api.scopes import needed_scope
from orchestrator.control.keyring import KeyRing
from orchestrator.core import keys
from orchestrator.core.keys import Key

log = structlog.get_logger(__name__)

COOKIE = "orchestrator_session"
ADDRESSES_KEPT = 1024
TOLD_EVERY_S = 60.0
HOW = "Send it as 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'"


class Access:
    """`networks` are those whose callers need no key, with the scopes they have."""

    def __init__(self, ring: KeyRing, networks: Mapping[Network, frozenset[keys.Scope]]) -> None:
        self._ring = ring
        self._networks = {network: keys.granted_by(scopes) for network, scopes in networks.items()}
        self._of_network = lru_cache(maxsize=ADDRESSES_KEPT)(self.scopes_of_address)
        self._refused = Refused()

    def check(self, scope: Scope) -> Problem | None:
        """None if the caller may. `scope` is the request as its client made it (forwarded.py)."""
        if not self._ring.is_required:
            return None
        needed = needed_scope(scope)
        if needed is None:
            return None
        client = scope.get("client")
        if self._networks and client is not None and needed in self._of_network(client[0]):
            return None
        return self._check_key(scope, needed)

    def scopes_of_address(self, text: str) -> frozenset[keys.Scope]:
        """Those of all networks that the address is in."""
        address = address_of(text)
        found = (s for network, s in self._networks.items() if address is not None and address in network)
        return keys.NOTHING.union(*found)

    def _check_key(self, scope: Scope, needed: keys.Scope) -> Problem | None:
        lesser = None
        for key in self._keys_of(scope["headers"]):
            if not self._ring.use(key):
                continue
            if key.allows(needed):
                return None
            lesser = key
        if lesser is not None:
            return insufficient(needed, lesser)
        if any(tokens_of(scope["headers"])):
            self._refused.tell(scope)
            return invalid()
        return missing(needed)

    def _keys_of(self, headers: Headers) -> Iterator[Key]:
        """The keys that the request shows, some of which may have expired."""
        for token in tokens_of(headers):
            if (key := self._ring.key_of(token)) is not None:
                yield key
        cookie = cookie_of(headers)
        if cookie and (key := self._ring.key_of_session(cookie)) is not None:
            yield key


class Refused:
    """Wrong keys are told in the log once in a while, without the key."""

    def __init__(self) -> None:
        self._count = 0
        self._told_at_s = -TOLD_EVERY_S

    def tell(self, scope: Scope) -> None:
        self._count += 1
        now_s = time.monotonic()
        if now_s - self._told_at_s >= TOLD_EVERY_S:
            client = scope.get("client")
            log.warning("refused a key that is not valid", client=client and client[0], times=self._count)
            self._count, self._told_at_s = 0, now_s


def tokens_of(headers: Headers) -> Iterator[str]:
    for name, value in headers:
        if name == b"authorization":
            if value[:7].lower() == b"bearer ":
                yield value[7:].strip().decode("latin-1")
        elif name == b"x-api-key":
            yield value.strip().decode("latin-1")


def cookie_of(headers: Headers) -> str | None:
    """The session's cookie, None if the browser has none."""
    for name, value in headers:
        if name == b"cookie":
            for part in value.decode("latin-1").split(";"):
                key, _, cookie = part.strip().partition("=")
                if key == COOKIE:
                    return cookie
    return None


def missing(needed: keys.Scope) -> Problem:
    message = (
        f"This call needs an API key with the scope '{needed}'. {HOW}; "
        f"`orchestrator key create NAME --scope {needed}` makes one."
    )
    return Problem(401, message, "missing_key", details={"needed_scope": needed})


def invalid() -> Problem:
    message = f"The API key is not one of this server's, or it has expired or was revoked. {HOW}."
    return Problem(401, message, "invalid_key")


def insufficient(needed: keys.Scope, key: Key) -> Problem:
    has = sorted(key.scopes)
    message = f"This call needs the scope '{needed}', and the key '{key.name}' has: {', '.join(has)}."
    details: dict[str, object] = {"needed_scope": needed, "scopes": has}
    return Problem(403, message, "insufficient_scope", details=details)
