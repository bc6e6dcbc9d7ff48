"""`ps` and `logs`: they only read."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from orchestrator.cli import show
from orchestrator.cli.talk import talking_to
from orchestrator.cli.where import Where


def show_state(where: Where, *, with_all: bool, as_json: bool) -> None:
    with talking_to(where, as_json=as_json) as client:
        state = client.state()
    if as_json:
        show.print_json(state)
    else:
        show.draw(show.state_screen(state, with_all=with_all, width=show.console().width))


def print_logs(
    model: str, where: Where, *, follow: bool, tail: int, attempt: str | None, previous: bool
) -> None:
    """The bytes as they came. Ctrl-C is how following ends, and a reader that leaves is no error."""
    with talking_to(where) as client, contextlib.suppress(KeyboardInterrupt), quiet_when_pipe_ends():
        for chunk in client.logs(model, follow=follow, tail=tail, attempt=attempt, previous=previous):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


@contextlib.contextmanager
def quiet_when_pipe_ends() -> Iterator[None]:
    """Python would complain again at its exit, when it flushes what nobody reads."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
