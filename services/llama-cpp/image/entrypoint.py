"""The container's first program: becomes the wanted user, then llama-server, or the command it was given.

no command, or options alone    serve; the options are added to llama-server's
download …                      the same as huggingface-cli download …
healthcheck                     exit code 0 once the model answers
anything else                   is run as it stands
"""

from __future__ import annotations

import os
import shutil
import sys
import urllib.request
from collections.abc import Mapping, Sequence

import identity
import serving


def main(arguments: Sequence[str]) -> int:
    """Only returns if nothing could be run in its place: the exit code."""
    if arguments[:1] == ["healthcheck"]:
        return healthcheck(os.environ)
    try:
        identity.step_down(os.environ)
        words = command(arguments, os.environ)
    except identity.BadIdentity as error:
        return _fail(str(error), serving.BAD_VARIABLE)
    except serving.Unusable as error:
        return _fail(str(error), error.code)
    return _become(words)


def command(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """What to run. Raises Unusable."""
    if not arguments or arguments[0].startswith("-"):
        options = serving.read_options(environment)
        if options.mmproj is not None:
            print(f"vision projector: {options.mmproj}", flush=True)
        return [*serving.command_line(options, environment), *arguments]
    if arguments[0] == "download":
        return ["huggingface-cli", *arguments]
    return list(arguments)


def healthcheck(environment: Mapping[str, str]) -> int:
    host, port = environment.get("HOST") or "0.0.0.0", environment.get("PORT") or "8000"
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    try:
        with urllib.request.urlopen(f"http://{host}:{port}/health", timeout=4) as answer:
            return 0 if answer.status == 200 else 1
    except OSError as error:
        print(error)
        return 1


def _become(words: list[str]) -> int:
    program = shutil.which(words[0])
    if program is None:
        return _fail(f"there is no command '{words[0]}' in this image", 127)
    try:
        os.execv(program, words)
    except OSError as error:
        return _fail(f"cannot run {program}: {error.strerror}", 126)


def _fail(reason: str, code: int) -> int:
    print(f"cannot start: {reason}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
