"""`doctor`: the server's own diagnosis, or what can be seen without a server."""

from __future__ import annotations

from typing import Any

import typer

from orchestrator.cli import show
from orchestrator.cli.talk import FAILED, UNUSABLE, new_client, refuse
from orchestrator.cli.where import Where
from orchestrator.client.http import ApiError, NotOurs, ServerDown


def examine(where: Where, *, as_json: bool) -> None:
    """Exit code 1 if something is bad, else 2 if no server answers, else 0."""
    diagnosis, answers = ask(where)
    if as_json:
        show.print_json(diagnosis)
    else:
        show.draw(show.checks_screen(diagnosis))
        show.say(show.checks_summary(diagnosis))
    if not diagnosis["ok"]:
        raise typer.Exit(FAILED)
    if not answers:
        raise typer.Exit(UNUSABLE)


def ask(where: Where) -> tuple[dict[str, Any], bool]:
    """The diagnosis, and whether it is a server's."""
    try:
        with new_client(where) as client:
            return client.doctor(), True
    except (ServerDown, NotOurs) as error:
        from orchestrator.cli.checks import diagnose_without_server

        return diagnose_without_server(error.message, where.config), False
    except ApiError as error:
        refuse(error)
