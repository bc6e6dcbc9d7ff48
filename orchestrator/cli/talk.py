"""How commands reach a server, and how they end when that fails."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from orchestrator.cli.show import print_json, say
from orchestrator.client.http import ApiError, Client, ServerDown

FAILED = 1
UNUSABLE = 2
INTERRUPTED = 130


@contextmanager
def talking_to(url: str | None, *, as_json: bool = False) -> Iterator[Client]:
    """A client of that server. What goes wrong with it ends the command with one message."""
    try:
        with Client(url) as client:
            yield client
    except ApiError as error:
        if as_json:
            print_json(error.body)
            raise typer.Exit(FAILED) from None
        fail(error.message, FAILED)
    except ServerDown as error:
        fail(error.message, UNUSABLE)


def fail(message: str, code: int) -> NoReturn:
    say(message, sys.stderr, "red")
    raise typer.Exit(code)
