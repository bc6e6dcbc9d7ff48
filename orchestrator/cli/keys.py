"""`key`: through a server, or straight on the database where none runs: so a lost key is replaced."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from orchestrator.cli import show
from orchestrator.cli.database import find
from orchestrator.cli.talk import FAILED, UNUSABLE, fail, new_client, refuse
from orchestrator.cli.where import Where
from orchestrator.client.http import ApiError, ServerDown
from orchestrator.core.errors import DatabaseInUse, KeyConflict, StoreError, UnknownKey
from orchestrator.core.keys import NAME, Scope, check_addition, check_removal, issue, key_view
from orchestrator.core.units import parse_duration
from orchestrator.store.admin_key import forget_admin_key
from orchestrator.store.database import Database
from orchestrator.store.explain import explained
from orchestrator.store.keys import delete_key, insert_key, read_keys

Result = TypeVar("Result")
View = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """A server, or a database: `database` as an option, else as the settings say."""

    where: Where
    database: Path | None = None


class Keys(Protocol):
    """What a server's client and a database both can do."""

    def create_key(self, name: str, scopes: Sequence[str], expires_in: str | None = None) -> View: ...

    def list_keys(self) -> list[View]: ...

    def revoke_key(self, name: str) -> View: ...


# --- the commands


def create(place: Place, name: str, scopes: Sequence[str], expires: str | None, *, as_json: bool) -> None:
    """The key alone goes to stdout, so that a script can keep it."""
    for scope in scopes:
        if scope not in set(Scope):
            fail(f"--scope: got '{scope}', expected one of {', '.join(Scope)}.", UNUSABLE)
    made = done(place, lambda keys: keys.create_key(name, scopes, expires))
    if as_json:
        show.print_json(made)
        return
    for_how_long = f", for {expires}" if expires else ""
    told = f"The key '{name}' may: {', '.join(made['scopes'])}{for_how_long}. It is not shown again:"
    show.say(told, sys.stderr)
    show.say(made["key"])


def list_all(place: Place, *, as_json: bool) -> None:
    keys = done(place, lambda keys: keys.list_keys())
    if as_json:
        show.print_json({"keys": keys})
    elif keys:
        show.draw(show.key_table(keys, time.time()))
    else:
        show.say("There are no keys.")


def revoke(place: Place, name: str) -> None:
    done(place, lambda keys: keys.revoke_key(name))
    show.say(f"The key '{name}' counts no more.")


# --- where they are done


def done(place: Place, work: Callable[[Keys], Result]) -> Result:
    """By the server; by us if none answers and nobody named one. What goes wrong ends the command."""
    if place.database is None:
        try:
            with new_client(place.where) as client:
                return work(client)
        except ApiError as error:
            refuse(error)
        except ServerDown as error:
            if place.where.url is not None:
                fail(error.message, UNUSABLE)
    path = find(place.where.config, place.database)
    try:
        return work(Direct(path))
    except DatabaseInUse as error:
        fail(f"{error.message} Or name that server's address with --url.", FAILED)
    except (KeyConflict, StoreError, UnknownKey) as error:
        fail(error.message, FAILED)


class Direct:
    """On the database itself, which no server may have open meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path
        show.say(f"No server: straight in {path}", sys.stderr)

    def create_key(self, name: str, scopes: Sequence[str], expires_in: str | None = None) -> View:
        """Also before the first start: then it makes the database."""
        if NAME.fullmatch(name) is None:
            fail("A name has letters, digits and . _ - and is at most 64 long.", UNUSABLE)
        lasts_s, now = seconds(expires_in), time.time()
        wanted = [Scope(scope) for scope in scopes]
        key, token = issue(name, wanted, now=now, lasts_s=lasts_s, random_hex=secrets.token_hex)
        database = Database(self._path)
        try:
            with database.transaction() as connection:
                check_addition(read_keys(connection), name, wanted, now)
                insert_key(connection, key)
        finally:
            database.close()
        return {**key_view(key), "key": token}

    def list_keys(self) -> list[View]:
        database = self._open()
        try:
            with database.reading() as connection:
                return [key_view(key) for key in read_keys(connection)]
        finally:
            database.close()

    def revoke_key(self, name: str) -> View:
        database = self._open()
        try:
            with database.transaction() as connection:
                key = check_removal(read_keys(connection), name, time.time())
                delete_key(connection, key.id)
        finally:
            database.close()
        forget_admin_key(self._path, key.id)
        return key_view(key)

    def _open(self) -> Database:
        """One that exists; looking makes none."""
        with explained(self._path):
            is_there = self._path.exists()
        if not is_there:
            fail(f"There is no database {self._path}. --config or --database names another.", FAILED)
        return Database(self._path)


def seconds(expires_in: str | None) -> float | None:
    if expires_in is None:
        return None
    try:
        found = parse_duration(expires_in)
    except ValueError as error:
        fail(f"--expires: got '{expires_in}', {error}.", UNUSABLE)
    if not found:
        fail(f"--expires: got '{expires_in}', expected a duration above 0.", UNUSABLE)
    return found
