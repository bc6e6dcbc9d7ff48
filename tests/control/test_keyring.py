"""The key ring over a store that may fail, with a clock of its own."""

import asyncio
import hmac
from collections.abc import Mapping

import pytest

from orchestrator.control import keyring
from orchestrator.control.keyring import SESSION_LASTS_S, USE_NOTED_EVERY_S, KeyRing
from orchestrator.core.errors import KeyConflict, StoreError
from orchestrator.core.keys import Key, Scope, Session

ADMIN = [Scope.ADMIN]


class Memory:
    """ports.KeyStore that remembers, or fails."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.keys: dict[str, Key] = {}
        self.sessions: dict[bytes, Session] = {}
        self.uses: list[Mapping[str, float]] = []
        self.fails = False

    def ring(self, *, is_strict: bool = False) -> KeyRing:
        return KeyRing(
            self, self.keys.values(), self.sessions.values(), is_strict=is_strict, wall=lambda: self.now
        )

    async def _write(self) -> None:
        await asyncio.sleep(0)
        if self.fails:
            raise StoreError("the disk is full")

    async def add_key(self, key: Key) -> None:
        await self._write()
        self.keys[key.id] = key

    async def remove_key(self, key_id: str) -> None:
        await self._write()
        del self.keys[key_id]

    async def note_use(self, used_at: Mapping[str, float]) -> None:
        await self._write()
        self.uses.append(dict(used_at))

    async def add_session(self, session: Session, now: float) -> None:
        await self._write()
        self.sessions[session.digest] = session

    async def remove_session(self, digest: bytes) -> None:
        await self._write()
        del self.sessions[digest]


@pytest.fixture
def memory() -> Memory:
    return Memory()


async def test_a_key_counts_from_when_it_is_stored_until_it_is_revoked(memory: Memory) -> None:
    ring = memory.ring()
    assert not ring.is_required
    key, token = await ring.create("me", ADMIN, None)
    assert ring.is_required
    assert ring.key_of(token) is key
    assert memory.ring().key_of(token) == key  # after a restart
    await ring.revoke("me")
    assert ring.key_of(token) is None
    assert not ring.is_required
    assert memory.keys == {}


async def test_what_was_not_stored_does_not_count(memory: Memory) -> None:
    ring = memory.ring()
    memory.fails = True
    with pytest.raises(StoreError):
        await ring.create("me", ADMIN, None)
    assert ring.known() == []
    assert not ring.is_required
    memory.fails = False
    _, token = await ring.create("me", ADMIN, None)
    memory.fails = True
    with pytest.raises(StoreError):
        await ring.revoke("me")
    assert ring.key_of(token) is not None


async def test_where_others_can_reach_it_a_key_is_needed_although_there_is_none(memory: Memory) -> None:
    ring = memory.ring(is_strict=True)
    assert ring.is_required
    await ring.create("me", ADMIN, None)
    await ring.revoke("me")
    assert ring.is_required


async def test_two_that_ask_for_one_name_get_one_key(memory: Memory) -> None:
    ring = memory.ring()
    made = await asyncio.gather(*(ring.create("me", ADMIN, None) for _ in range(2)), return_exceptions=True)
    assert [type(one) for one in made] == [tuple, KeyConflict]
    assert len(memory.keys) == 1


async def test_digests_are_compared_in_constant_time(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = memory.ring()
    key, token = await ring.create("me", ADMIN, None)
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    monkeypatch.setattr(keyring, "hmac", type("Hmac", (), {"compare_digest": staticmethod(compare)}))
    assert ring.key_of(token) is key
    wrong = token[:-1] + ("0" if token[-1] != "0" else "1")
    assert ring.key_of(wrong) is None  # the id of one, the secret of none
    assert [a for a, _ in compared] == [key.digest, key.digest]
    assert compared[0][1] == key.digest != compared[1][1]


async def test_an_expired_key_is_known_and_not_valid(memory: Memory) -> None:
    ring = memory.ring()
    key, token = await ring.create("me", ADMIN, 60)
    assert ring.use(key)
    memory.now += 60
    assert ring.key_of(token) is key
    assert not ring.use(key)
    assert ring.is_required


async def test_a_use_is_noted_once_an_hour_and_not_for_each_request(memory: Memory) -> None:
    ring = memory.ring()
    key, token = await ring.create("me", ADMIN, None)
    for _ in range(100):
        ring.use(key)
    assert memory.uses == []
    await ring.note_uses()
    await ring.note_uses()
    assert memory.uses == [{key.id: memory.now}]
    assert [known.last_used_at for known in ring.known()] == [memory.now]
    memory.now += USE_NOTED_EVERY_S - 1
    assert ring.use(ring.known()[0])
    await ring.note_uses()
    assert len(memory.uses) == 1
    memory.now += 1
    assert ring.use(ring.known()[0])
    memory.fails = True
    await ring.note_uses()  # says so in the log, and goes on
    assert ring.key_of(token) is not None


async def test_a_session_is_as_good_as_its_key_and_no_longer(memory: Memory) -> None:
    ring = memory.ring()
    key, _ = await ring.create("me", ADMIN, None)
    cookie = await ring.log_in(key)
    assert ring.key_of_session(cookie) is key
    assert memory.ring().key_of_session(cookie) == key  # after a restart
    assert ring.key_of_session("") is None
    assert ring.key_of_session(cookie[:-1]) is None
    memory.now += SESSION_LASTS_S
    assert ring.key_of_session(cookie) is None


async def test_logging_out_ends_one_session_and_revoking_all(memory: Memory) -> None:
    ring = memory.ring()
    key, _ = await ring.create("me", ADMIN, None)
    one, other = await ring.log_in(key), await ring.log_in(key)
    await ring.log_out(one)
    await ring.log_out("nonsense")
    assert ring.key_of_session(one) is None
    assert ring.key_of_session(other) is key
    await ring.revoke("me")
    assert ring.key_of_session(other) is None
