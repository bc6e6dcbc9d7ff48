"""`serve`: the server in this process, with what keeps it from starting as one message."""

from __future__ import annotations

import contextlib
from pathlib import Path

from orchestrator.cli.talk import UNUSABLE, fail
from orchestrator.core.errors import OrchestratorError


def run_server(config: Path | None, **explicit: object) -> None:
    from orchestrator.settings import load_settings

    with contextlib.suppress(KeyboardInterrupt):
        try:
            settings = load_settings(config, **explicit)
            from orchestrator.serve import serve  # takes seconds on a small machine: wrong settings first

            serve(settings)
        except OrchestratorError as error:
            fail(why_not(error), UNUSABLE)


def why_not(error: OrchestratorError) -> str:
    """One message; several lines of what is wrong stand below a line that says so."""
    lines = error.message.splitlines()
    if len(lines) < 2:
        return f"The server cannot run: {error.message}"
    return "\n".join(
        [f"The server cannot run, {len(lines)} things are wrong:", *(f"  {line}" for line in lines)]
    )
