"""API keys: what one may do, how its text looks, and what is kept of it.

A key's text is `orc_`, its id and its secret: `orc_3f9a1c07_…64 hex digits…`. Only a digest of the text
is kept. The secret is 32 random bytes, so nobody can guess it from a fast hash (docs/adr/0014).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.core.errors import KeyConflict, UnknownKey

PREFIX = "orc_"
ID_BYTES = 4
SECRET_BYTES = 32
TOKEN = re.compile(r"orc_[0-9a-f]{8}_[0-9a-f]{64}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Scope(StrEnum):
    """What a caller may do. Admin implies the others; of those, none implies another."""

    INFERENCE = "inference"
    LEASE = "lease"
    ADMIN = "admin"


NOTHING: frozenset[Scope] = frozenset()
EVERYTHING = frozenset(Scope)


def granted_by(scopes: Collection[Scope]) -> frozenset[Scope]:
    """All that these scopes allow."""
    return EVERYTHING if Scope.ADMIN in scopes else frozenset(scopes)


@dataclass(frozen=True, slots=True)
class Key:
    """What is kept of a key. `…_at` are seconds since 1970; `last_used_at` is up to an hour late."""

    id: str
    name: str
    digest: bytes
    scopes: frozenset[Scope]
    created_at: float
    expires_at: float | None = None
    last_used_at: float | None = None

    def is_valid(self, now: float) -> bool:
        return self.expires_at is None or now < self.expires_at

    def allows(self, scope: Scope) -> bool:
        return scope in self.scopes or Scope.ADMIN in self.scopes


@dataclass(frozen=True, slots=True)
class Session:
    """A browser that logged in with a key, and may do what that key may, for as long as there is one."""

    digest: bytes
    key_id: str
    expires_at: float


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()


def id_of(token: str) -> str | None:
    """The id within a key's text, None if that is no key of ours."""
    return token[len(PREFIX) :].partition("_")[0] if TOKEN.fullmatch(token) else None


def issue(
    name: str,
    scopes: Iterable[Scope],
    *,
    now: float,
    lasts_s: float | None,
    random_hex: Callable[[int], str],
) -> tuple[Key, str]:
    """A new key and its text, which nothing can tell again. `random_hex(n)` is n random bytes in hex."""
    key_id = random_hex(ID_BYTES)
    token = f"{PREFIX}{key_id}_{random_hex(SECRET_BYTES)}"
    expires_at = None if lasts_s is None else now + lasts_s
    return Key(key_id, name, digest_of(token), frozenset(scopes), now, expires_at), token


def key_view(key: Key) -> dict[str, object]:
    """What may be told of a key."""
    return {
        "name": key.name,
        "id": key.id,
        "scopes": sorted(key.scopes),
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "last_used_at": key.last_used_at,
    }


# --- rules


def check_addition(keys: Collection[Key], name: str, scopes: Collection[Scope], now: float) -> None:
    """Raises KeyConflict: names are unique, and somebody must always be able to manage the keys."""
    if any(key.name == name for key in keys):
        raise KeyConflict(
            f"There is a key '{name}' already. Choose another name, or revoke that one first.", "key_exists"
        )
    if Scope.ADMIN not in scopes and not administrators(keys, now):
        raise KeyConflict(
            "The first key must have the scope admin: once there is a key every call needs one, and nobody "
            "could manage them. Make that one first: orchestrator key create admin --scope admin",
            "admin_key_first",
        )


def check_removal(keys: Collection[Key], name: str, now: float) -> Key:
    """The key of that name. Raises UnknownKey, or KeyConflict if nobody could manage the others."""
    found = next((key for key in keys if key.name == name), None)
    if found is None:
        raise UnknownKey(name, tuple(sorted(key.name for key in keys)))
    rest = [key for key in keys if key is not found]
    if rest and administrators(keys, now) == [found]:
        raise KeyConflict(
            f"'{name}' is the last key with the scope admin, and there are others. Make another one first.",
            "last_admin_key",
        )
    return found


def administrators(keys: Iterable[Key], now: float) -> list[Key]:
    return [key for key in keys if Scope.ADMIN in key.scopes and key.is_valid(now)]
