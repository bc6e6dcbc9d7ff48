"""A key's text, what is kept of it, and which keys there must be."""

import re
import secrets

import pytest

from orchestrator.core.errors import KeyConflict, UnknownKey
from orchestrator.core.keys import (
    EVERYTHING,
    TOKEN,
    Key,
    Scope,
    check_addition,
    check_removal,
    digest_of,
    granted_by,
    id_of,
    issue,
    key_view,
)

NOW = 1_800_000_000.0


def key(name: str, *scopes: Scope, expires_at: float | None = None) -> Key:
    return Key(name, name, b"", frozenset(scopes), NOW, expires_at)


def test_a_key_is_found_by_its_id_and_known_by_its_digest() -> None:
    made, token = issue("webui", [Scope.INFERENCE], now=NOW, lasts_s=60, random_hex=secrets.token_hex)
    assert re.fullmatch(r"orc_[0-9a-f]{8}_[0-9a-f]{64}", token)  # what a scanner of secrets looks for
    assert id_of(token) == made.id
    assert made.digest == digest_of(token)
    assert made.is_valid(NOW + 59)
    assert not made.is_valid(NOW + 60)
    assert token.rpartition("_")[2] not in repr(made)
    assert token.rpartition("_")[2] not in str(key_view(made))


@pytest.mark.parametrize(
    "text", ["", "unused", "orc_", "orc_12345678_", "sk-" + "0" * 64, "orc_1234567G_" + "0" * 64, "orc_é_ü"]
)
def test_other_texts_are_no_keys(text: str) -> None:
    assert id_of(text) is None
    assert TOKEN.fullmatch(text + "\n") is None


def test_admin_implies_the_others_and_nothing_else_does() -> None:
    assert granted_by([Scope.ADMIN]) == EVERYTHING
    for one in (Scope.INFERENCE, Scope.LEASE):
        assert granted_by([one]) == {one}
        assert key("x", Scope.ADMIN).allows(one)
        assert not key("x", one).allows(Scope.ADMIN)
    assert not key("x", Scope.LEASE).allows(Scope.INFERENCE)


def test_the_first_key_must_be_able_to_manage_the_others() -> None:
    with pytest.raises(KeyConflict, match="first key must have the scope admin") as refused:
        check_addition([], "webui", [Scope.INFERENCE], NOW)
    assert refused.value.code == "admin_key_first"
    check_addition([], "me", [Scope.ADMIN], NOW)
    check_addition([key("me", Scope.ADMIN)], "webui", [Scope.INFERENCE], NOW)
    with pytest.raises(KeyConflict):  # one that has expired manages nothing
        check_addition([key("me", Scope.ADMIN, expires_at=NOW)], "webui", [Scope.INFERENCE], NOW)


def test_names_are_given_once() -> None:
    with pytest.raises(KeyConflict, match="'me' already") as refused:
        check_addition([key("me", Scope.ADMIN)], "me", [Scope.ADMIN], NOW)
    assert refused.value.code == "key_exists"


def test_the_last_admin_key_stays_while_there_are_others() -> None:
    me, webui = key("me", Scope.ADMIN), key("webui", Scope.INFERENCE)
    with pytest.raises(KeyConflict, match="last key with the scope admin"):
        check_removal([me, webui], "me", NOW)
    assert check_removal([me, webui, key("too", Scope.ADMIN)], "me", NOW) is me
    assert check_removal([me, webui], "webui", NOW) is webui
    assert check_removal([me], "me", NOW) is me
    with pytest.raises(UnknownKey, match=r"'nobody'\. There are: me"):
        check_removal([me], "nobody", NOW)
