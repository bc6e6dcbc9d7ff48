"""The `orchestrator` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from orchestrator import __version__

HELP = """\
One owner for the GPU memory of a house: loads, evicts and lends it by measured bytes.

`orchestrator serve` runs the server; every other command talks to one.
"""
EPILOG = "Exit codes: 0 done · 1 the operation failed · 2 wrong usage or configuration, or no server answers."

app = typer.Typer(
    help=HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SERVER, MODELS, LOOK = "The server", "Models", "Looking"

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name or alias.", show_default=False)]
Url = Annotated[
    Optional[str],  # noqa: UP045 - typer reads it at run time
    typer.Option(
        "--url",
        envvar="ORCHESTRATOR_URL",
        help="Where the server is; http://127.0.0.1:8000 unless told otherwise.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the server's JSON and nothing else.")]
Config = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(help="The settings file; ./orchestrator.yaml is read if it is there.", show_default=False),
]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Do not wait for the end of it.")]


def setting(text: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=text, show_default=False)
    return option


@app.command(rich_help_panel=SERVER)
def serve(
    config: Config = None,
    host: Annotated[Optional[str], setting("The address to listen on; 127.0.0.1.")] = None,  # noqa: UP045
    port: Annotated[Optional[int], setting("The port to listen on; 8000. 0 takes a free one.")] = None,  # noqa: UP045
    models_dir: Annotated[Optional[Path], setting("A folder of GGUF files, each offered as a model.")] = None,  # noqa: UP045
    models: Annotated[Optional[Path], setting("The catalogue; ./models.yaml.")] = None,  # noqa: UP045
    engine: Annotated[Optional[Literal["auto", "docker", "process"]], setting("Who starts models.")] = None,  # noqa: UP045
    devices: Annotated[Optional[Literal["auto", "nvml", "host"]], setting("Whose memory is managed.")] = None,  # noqa: UP045
    database: Annotated[Optional[Path], setting("The SQLite file; ./state/orchestrator.db.")] = None,  # noqa: UP045
) -> None:
    """Run the server until it is told to end.

    Options win over ORCHESTRATOR_… variables, and those over the settings file.
    """
