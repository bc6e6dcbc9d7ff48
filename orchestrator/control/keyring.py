"""The API keys of a running server: all of them in memory, so that asking costs no look at the database."""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable, Iterable
from dataclasses import replace

import structlog

from orchestrator.control.ports import KeyStore
from orchestrator.core.errors import StoreError
from orchestrator.core.keys import (
    SECRET_BYTES,
    Key,
    Scope,
    Session,
    check_addition,
    check_removal,
    digest_of,
    id_of,
    issue,
)

log = structlog.get_logger(__name__)

SESSION_LASTS_S = 7 * 86400.0
USE_NOTED_EVERY_S = 3600.0
"""A key's last use is a hint for who cleans up; a write for each request would cost more than the request."""


class KeyRing:
    """Finds the key behind a text or a browser's cookie; makes and revokes keys.

    `is_strict`: a key is asked for although there may be none, since others than this machine's own users
    can reach the server. `wall` is the time in seconds since 1970.
    """

    def __init__(
        self,
        store: KeyStore,
        keys: Iterable[Key],
        sessions: Iterable[Session],
        *,
        is_strict: bool,
        wall: Callable[[], float],
    ) -> None:
        self._store = store
        self._keys = {key.id: key for key in keys}
        self._sessions = {session.digest: session for session in sessions}
        self._used_at: dict[str, float] = {}
        self._is_strict = is_strict
        self._wall = wall
        self._changing = asyncio.Lock()  # what the rules were checked against must still be so when written
        self.is_required = is_strict or bool(self._keys)

    # --- who is it

    def key_of(self, token: str) -> Key | None:
        """The key whose text this is, also one that has expired."""
        key = self._keys.get(id_of(token) or "")
        if key is None or not hmac.compare_digest(key.digest, digest_of(token)):
            return None
        return key

    def key_of_session(self, cookie: str) -> Key | None:
        """The key that the browser logged in with; None once the session has expired."""
        session = self._sessions.get(digest_of(cookie))  # how long that takes tells nothing of the cookie
        if session is None or self._wall() >= session.expires_at:
            return None
        return self._keys.get(session.key_id)

    def use(self, key: Key) -> bool:
        """Whether the key is valid now; if so, its use is noted."""
        now = self._wall()
        if not key.is_valid(now):
            return False
        self._used_at[key.id] = now
        return True

    # --- the keys

    def known(self) -> list[Key]:
        return sorted(self._keys.values(), key=lambda key: key.name)

    async def create(self, name: str, scopes: Iterable[Scope], lasts_s: float | None) -> tuple[Key, str]:
        """A new key and its text, which is told this once. Raises KeyConflict, StoreError."""
        async with self._changing:
            now = self._wall()
            wanted = frozenset(scopes)
            check_addition(self._keys.values(), name, wanted, now)
            key, token = issue(name, wanted, now=now, lasts_s=lasts_s, random_hex=secrets.token_hex)
            await self._store.add_key(key)
            self._keys[key.id] = key
            self.is_required = True
        log.info("key made", name=name, scopes=" ".join(sorted(wanted)))
        return key, token

    async def revoke(self, name: str) -> Key:
        """The key counts no more, nor do its sessions. Raises UnknownKey, KeyConflict, StoreError."""
        async with self._changing:
            key = check_removal(self._keys.values(), name, self._wall())
            await self._store.remove_key(key.id)
            del self._keys[key.id]
            self._used_at.pop(key.id, None)
            self._sessions = {d: s for d, s in self._sessions.items() if s.key_id != key.id}
            self.is_required = self._is_strict or bool(self._keys)
        log.info("key revoked", name=name)
        return key

    async def note_uses(self) -> None:
        """Remember when keys were last used, where that is an hour from what is known."""
        fresh = {
            key_id: at
            for key_id, at in self._used_at.items()
            if at - (self._keys[key_id].last_used_at or 0.0) >= USE_NOTED_EVERY_S
        }
        self._used_at.clear()
        if not fresh:
            return
        try:
            await self._store.note_use(fresh)
        except StoreError as error:
            log.warning("the last use of keys was not noted", error=error.message)
            return
        for key_id, at in fresh.items():
            if key_id in self._keys:
                self._keys[key_id] = replace(self._keys[key_id], last_used_at=at)

    # --- browsers

    async def log_in(self, key: Key) -> str:
        """A new session's cookie. Raises StoreError."""
        cookie = secrets.token_hex(SECRET_BYTES)
        now = self._wall()
        session = Session(digest_of(cookie), key.id, now + SESSION_LASTS_S)
        await self._store.add_session(session, now)
        self._sessions = {d: s for d, s in self._sessions.items() if s.expires_at > now}
        self._sessions[session.digest] = session
        return cookie

    async def log_out(self, cookie: str) -> None:
        """Raises StoreError."""
        digest = digest_of(cookie)
        if self._sessions.pop(digest, None) is not None:
            await self._store.remove_session(digest)
