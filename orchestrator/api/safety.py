"""Who may talk to us from where: the `Host` must be ours, and a web page of somebody else may not act.

Without this, any page in a browser of the house could unload models (cross-site requests), or read
everything by pointing its own name at 127.0.0.1 (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Container
from functools import lru_cache, partial
from urllib.parse import urlsplit

from orchestrator.api.asgi import Scope, header
from orchestrator.api.problems import Problem

HOSTS_KEPT = 256
READING = frozenset({"GET", "HEAD", "OPTIONS"})
OUR_NAMES = frozenset({"localhost", "orchestrator", "orchestrator.lan", "llama.lan"})


class Safety:
    """One check for every path. Raw IP addresses are always ours: a rebinding attack needs a name.

    `hostnames` has the names of services, which a reload may change.
    """

    def __init__(self, allowed_hosts: tuple[str, ...] = (), hostnames: Container[str] = ()) -> None:
        own = {socket.gethostname().lower()}
        names = OUR_NAMES | own | {name.lower() for name in allowed_hosts}
        self._hostnames = hostnames
        self._is_known = lru_cache(maxsize=HOSTS_KEPT)(partial(is_one_of, names))

    def is_ours(self, host: str) -> bool:
        return self._is_known(host) or host in self._hostnames

    def check(self, scope: Scope, *, may_change: bool) -> Problem | None:
        """None if the request may pass. `may_change`: it could load, unload or change anything."""
        host = header(scope, b"host").decode("latin-1")
        if not self.is_ours(host):
            return Problem(
                421,
                f"The Host header '{host[:100]}' is not one of this server's names. "
                "Add it to allowed_hosts in orchestrator.yaml if it should be.",
                "unknown_host",
            )
        return self._check_origin(scope, host) if may_change else None

    def _check_origin(self, scope: Scope, host: str) -> Problem | None:
        site = header(scope, b"sec-fetch-site")
        if site and site not in (b"same-origin", b"none"):
            return cross_site(site.decode("latin-1"))
        origin = header(scope, b"origin").decode("latin-1")
        if origin and not self._is_our_page(authority_of(origin), host):
            return cross_site(origin)
        return None

    def _is_our_page(self, origin: str, host: str) -> bool:
        """The page came from where it now asks, or from another name of ours; any IP could be anybody's."""
        return origin == host or (self.is_ours(origin) and not is_address(name_of(origin)))


def is_one_of(names: frozenset[str] | set[str], host: str) -> bool:
    name = name_of(host)
    return name in names or name.endswith(".localhost") or is_address(name)


def cross_site(origin: str) -> Problem:
    message = f"A web page of another site ('{origin[:100]}') may not change anything here."
    return Problem(403, message, "cross_site_refused")


def authority_of(origin: str) -> str:
    """Host and port of an origin, empty where it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def name_of(host: str) -> str:
    """The host without its port, in lower case: `[::1]:8000` is `::1`."""
    if host.startswith("["):
        return host[1:].split("]", 1)[0].lower()
    return host.rsplit(":", 1)[0].lower() if host.count(":") == 1 else host.lower()


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
