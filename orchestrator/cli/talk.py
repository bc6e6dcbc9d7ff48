"""How commands reach a server, and how they end when that fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from orchestrator.cli.address import address_here, is_here
from orchestrator.cli.show import print_json, say
from orchestrator.cli.where import Where
from orchestrator.client.http import ApiError, Client, ServerDown

FAILED = 1
UNUSABLE = 2
INTERRUPTED = 130
HOW = "This command takes a key from ORCHESTRATOR_KEY, or from the file that --key-file names."

ELSEWHERE = (
    "The settings lead to {url}, which is not this machine: no server of theirs can listen there. Nothing "
    "was sent. If that server is meant, name it with --url or ORCHESTRATOR_URL."
)


@contextmanager
def talking_to(where: Where, *, as_json: bool = False) -> Iterator[Client]:
    """A client of that server. What goes wrong with it ends the command with one message."""
    try:
        with new_client(where) as client:
            yield client
    except ApiError as error:
        refuse(error, as_json=as_json)
    except ServerDown as error:
        fail(error.message, UNUSABLE)


def new_client(where: Where) -> Client:
    """Without a key it looks for the server's own, once that asks for one.

    Raises ServerDown where the settings name a host that is not this machine.
    """
    own = None if where.url else address_here(where.config)
    if own is not None and not is_here(own):
        raise ServerDown(own, ELSEWHERE.format(url=own))
    return Client(
        where.url or own,
        key=key_of(where),
        find_key=lambda: find_key(where.config),
        is_here=own is not None,
    )


def key_of(where: Where) -> str | None:
    if where.key_file is None:
        return where.key
    try:
        return where.key_file.expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        fail(f"The key file {where.key_file} cannot be read: {why}.", UNUSABLE)


def find_key(config: Path | None) -> str | None:
    """The key of the server on this machine."""
    from orchestrator.cli.key_file import admin_key_here  # the settings take a moment to import

    return admin_key_here(config)


def refuse(error: ApiError, *, as_json: bool = False) -> NoReturn:
    """End the command with what the server said."""
    if as_json:
        print_json(error.body)
        raise typer.Exit(FAILED)
    fail(f"{error.message} {HOW}" if error.status == 401 else error.message, FAILED)


def fail(message: str, code: int) -> NoReturn:
    say(message, sys.stderr, "red")
    raise typer.Exit(code)
