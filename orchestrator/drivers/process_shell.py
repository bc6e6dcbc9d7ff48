"""The shell around a host process: it outlives the signals meant for it, and writes its exit code down."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

from orchestrator.control.ports import StartOrder
from orchestrator.core.errors import StartFailed
from orchestrator.drivers.late_placeholders import filled

# A signal to the group reaches the shell too. It only remembers it: dash and bash run a trap after the
# command in the foreground has ended, so the code is still written. Programs get the default handlers
# back, as exec resets what a shell traps. $0 is the file for the code.
WRAPPER = """stop=
trap stop=143 TERM INT HUP QUIT
if [ "$stop" ]; then code=$stop; else "$@"; code=$?; fi
echo "$code" > "$0"
exit "$code"
"""
SHELL = ["/bin/sh", "-c", WRAPPER]


def wrapped_command(order: StartOrder, port: int, environment: Mapping[str, str]) -> list[str]:
    """The launch's command with its program found on PATH. Raises StartFailed, naming what is missing."""
    where = f"services/{order.launch.service}/service.yaml"
    if not order.launch.command:
        raise StartFailed(f"'{order.model}' cannot run as a process: {where} has no `command`.")
    program, *arguments = (filled(part, port, order.gpus) for part in order.launch.command)
    path = shutil.which(program, path=environment.get("PATH"))
    if path is None:
        if found := shutil.which(program, os.F_OK, environment.get("PATH")):
            raise StartFailed(
                f"'{order.model}' cannot start: this user may not execute '{found}'. "
                f"Allow it with `chmod +x {found}`, or correct `command` in {where}."
            )
        raise StartFailed(
            f"'{order.model}' cannot start: there is no program '{program}'. "
            f"Install it, or correct `command` in {where}."
        )
    return [path, *arguments]
