"""`database`: check the file, copy it, and put a copy back; none of it needs a server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.cli.show import say
from orchestrator.cli.talk import FAILED, UNUSABLE, fail
from orchestrator.core.errors import CatalogueError, StoreError
from orchestrator.core.units import age


def check(config: Path | None, database: Path | None) -> None:
    from orchestrator.store.backup import check as look

    path = find(config, database)
    with explained():
        report = look(path)
    say(f"{path}: {report.size_bytes / 2**20:.1f} MiB, {report.problem or 'sound'}")
    now = time.time()
    for copy in report.copies:
        say(f"  a copy made {age(now - copy.made_at)} ago: {copy.path}")
    if not report.copies:
        say("  no copies")
    if report.problem is not None:
        fail("It is damaged. Stop the server, then: orchestrator database restore", FAILED)


def back_up(config: Path | None, database: Path | None) -> None:
    from orchestrator.store.backup import back_up as copy_it

    path = find(config, database)
    with explained():
        say(f"Copied to {copy_it(path, time.time()).path}")


def restore(copy: Path | None, config: Path | None, database: Path | None) -> None:
    from orchestrator.store.backup import restore as put_back

    path = find(config, database)
    with explained():
        done = put_back(path, copy)
    say(f"{path} is now {done.copy}.")
    if done.aside is not None:
        say(f"What was there is kept as {done.aside}.")
    say("Start the server: it stops what runs and is not in this copy, and adopts the rest.")


def find(config: Path | None, database: Path | None) -> Path:
    """The database that is named, or the settings'."""
    if database is not None:
        return database.expanduser().absolute()
    from orchestrator.settings import load_settings

    try:
        return load_settings(config).database
    except CatalogueError as error:
        fail(error.message, UNUSABLE)


@contextmanager
def explained() -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        fail(error.message, FAILED)
