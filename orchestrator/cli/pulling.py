"""`pull` and `rm`: models from the hub into the server's cache, and out of it again."""

from __future__ import annotations

from orchestrator.cli import show
from orchestrator.cli.loading import RUNNING, interruptible, outcome
from orchestrator.cli.talk import talking_to
from orchestrator.cli.where import Where


def pull(model: str, where: Where, *, waits: bool, as_json: bool) -> None:
    further = f"`orchestrator pull {model}` shows how far it is, `orchestrator rm {model}` cancels it"
    with (
        talking_to(where, as_json=as_json) as client,
        interruptible(f"'{model}' goes on downloading", further),
    ):
        operation = outcome(client, client.download(model), waits, as_json)
        if not as_json:
            is_running = operation["state"] == RUNNING
            show.say(f"{operation['message']}{f'; {further}.' if is_running else ''}")


def remove(model: str, where: Where, *, as_json: bool) -> None:
    further = "`orchestrator ps` shows whether it is still loaded"
    with talking_to(where, as_json=as_json) as client, interruptible(f"'{model}' is being removed", further):
        answer = client.remove(model)
        if as_json:
            show.print_json(answer)
        else:
            show.say(str(answer["message"]))
