"""Keys and sessions in the real database, and the admin key's file beside it."""

import stat
from pathlib import Path

import pytest

from orchestrator.core.errors import StoreError
from orchestrator.core.keys import Key, Scope, Session, digest_of
from orchestrator.store.admin_key import admin_key_file, forget_admin_key, read_admin_key, write_admin_key
from orchestrator.store.keys import SqliteKeys
from tests.store.conftest import Opener

KEY = Key("3f9a1c07", "webui", b"\0\xff", frozenset({Scope.INFERENCE, Scope.LEASE}), 5.0, 9.5)
OTHER = Key("00000000", "me", b"x", frozenset({Scope.ADMIN}), 6.0)


async def test_keys_and_sessions_come_back_as_they_were(opened: Opener, path: Path) -> None:
    store, _ = opened()
    keys = SqliteKeys(store, path)
    assert keys.load() == ([], [])
    for key in (KEY, OTHER):
        await keys.add_key(key)
    sessions = [Session(b"1", KEY.id, 100.0), Session(b"2", OTHER.id, 200.0), Session(b"3", KEY.id, 300.0)]
    for session in sessions:
        await keys.add_session(session, now=50.0)
    store.close()
    store, _ = opened()
    keys = SqliteKeys(store, path)
    assert keys.load() == ([OTHER, KEY], sessions)
    await keys.note_use({OTHER.id: 77.0})
    await keys.add_session(Session(b"4", OTHER.id, 400.0), now=100.0)  # the first has expired
    await keys.remove_session(b"2")
    await keys.remove_key(KEY.id)  # and its sessions
    found, left = keys.load()
    assert [(key.name, key.last_used_at) for key in found] == [("me", 77.0)]
    assert left == [Session(b"4", OTHER.id, 400.0)]


async def test_a_name_is_in_the_database_once(opened: Opener, path: Path) -> None:
    keys = SqliteKeys(opened()[0], path)
    await keys.add_key(KEY)
    with pytest.raises(StoreError):
        await keys.add_key(Key("11111111", KEY.name, b"", KEY.scopes, 5.0))


async def test_the_first_key_goes_to_a_file_that_only_its_owner_reads(opened: Opener, path: Path) -> None:
    store, _ = opened()
    keys = SqliteKeys(store, path)
    admin_key_file(path).write_text("left by another life")
    made = keys.make_first(7.0)
    file = admin_key_file(path)
    token = read_admin_key(path)
    assert token is not None
    assert digest_of(token) == made.digest
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert keys.load()[0] == [made]
    assert made.scopes == {Scope.ADMIN}
    await keys.remove_key("another")
    assert file.exists()
    await keys.remove_key(made.id)
    assert not file.exists()
    store.close()
    assert not any(token.encode() in part.read_bytes() for part in path.parent.iterdir() if part.is_file())


def test_a_key_that_cannot_be_written_down_is_not_made(opened: Opener, path: Path) -> None:
    keys = SqliteKeys(opened()[0], path)
    admin_key_file(path).mkdir()
    with pytest.raises(StoreError, match=r"admin\.key"):
        keys.make_first(7.0)
    assert keys.load() == ([], [])


def test_a_file_without_a_key_of_ours_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    assert read_admin_key(path) is None
    write_admin_key(path, "not one of ours")
    forget_admin_key(path, "3f9a1c07")
    assert read_admin_key(path) == "not one of ours"
    admin_key_file(path).write_bytes(b"\xff\xfe")
    assert read_admin_key(path) is None
