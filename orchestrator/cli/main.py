"""The `orchestrator` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from orchestrator import __version__
from orchestrator.cli.where import Where

HELP = """\
One owner for the GPU memory of a house: loads, evicts and lends it by measured bytes.

`orchestrator serve` runs the server; most other commands talk to one.
"""
EPILOG = "Exit codes: 0 done; 1 it failed; 2 wrong usage or configuration, or no server answers."
SERVER, MODELS = "The server", "Models"


class Grouped(TyperGroup):
    """Lists the commands under the headings that they name."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading in (MODELS, SERVER):
            own = [(n, c) for n, c in self.commands.items() if getattr(c, "rich_help_panel", "") == heading]
            with formatter.section(heading):
                formatter.write_dl([(name, command.get_short_help_str(80)) for name, command in own])


# Plain help, since rich's takes a fifth of a second more to load.
app = typer.Typer(
    cls=Grouped,
    help=HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def option(*names: str, text: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, show_default=False, **more)


Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's name or alias.", show_default=False)]
Url = Annotated[
    str | None,
    option(
        "--url",
        text="Where the server is. [default: as the settings file says, else http://127.0.0.1:8000]",
        envvar="ORCHESTRATOR_URL",
    ),
]
Key = Annotated[
    str | None,
    option(
        "--key",
        text="An API key. Others see it in the list of processes: better the variable, or a file.",
        envvar="ORCHESTRATOR_KEY",
    ),
]
KeyFile = Annotated[Path | None, option("--key-file", text="A file that holds the API key.")]
Json = Annotated[bool, option("--json", text="Print the server's JSON and nothing else.")]
NoWait = Annotated[bool, option("--no-wait", text="Do not wait until it is done.")]
Config = Annotated[
    Path | None, option("--config", "-c", text="The settings file. [default: orchestrator.yaml, if there]")
]
Host = Annotated[str | None, option("--host", text="The address to listen on. [default: 127.0.0.1]")]
Port = Annotated[
    int | None, option("--port", "-p", text="The port to listen on; 0 takes a free one. [default: 8000]")
]
ModelsDir = Annotated[
    Path | None, option("--models-dir", text="A folder of GGUF files, each offered as a model.")
]
Models = Annotated[Path | None, option("--models", text="The catalogue. [default: models.yaml]")]
EngineName = Annotated[
    Literal["auto", "docker", "process"] | None,
    option("--engine", text="Who starts models: containers, or processes of this machine."),
]
DevicesName = Annotated[
    Literal["auto", "nvml", "host"] | None,
    option("--devices", text="Whose memory is managed: the GPUs', or the RAM."),
]
Database = Annotated[
    Path | None, option("--database", text="The SQLite file. [default: state/orchestrator.db]")
]


@app.command(rich_help_panel=SERVER)
def serve(
    config: Config = None,
    host: Host = None,
    port: Port = None,
    models_dir: ModelsDir = None,
    models: Models = None,
    engine: EngineName = None,
    devices: DevicesName = None,
    database: Database = None,
) -> None:
    """Run the server until it is told to end.

    Options win over ORCHESTRATOR_… variables, and those over the settings file.
    """
    from orchestrator.cli.serving import run_server

    run_server(
        config,
        host=host,
        port=port,
        models_dir=models_dir,
        models=models,
        engine=engine,
        devices=devices,
        database=database,
    )


@app.command(rich_help_panel=SERVER)
def doctor(
    config: Config = None, url: Url = None, key: Key = None, key_file: KeyFile = None, as_json: Json = False
) -> None:
    """Say what was found, what is wrong, and what to do about it.

    Asks the server. If none answers, checks what can be checked without one.
    """
    from orchestrator.cli.doctor import examine

    examine(Where(url, key, key_file, config), as_json=as_json)


database_app = typer.Typer(
    help="Check the database, copy it, put a copy back.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(database_app, name="database", rich_help_panel=SERVER)


@database_app.command()
def check(config: Config = None, database: Database = None) -> None:
    """Read all of it, and list its copies. Exit code 1 if it is damaged."""
    from orchestrator.cli.database import check as check_it

    check_it(config, database)


@database_app.command()
def backup(config: Config = None, database: Database = None) -> None:
    """Make a copy now, also while the server runs."""
    from orchestrator.cli.database import back_up

    back_up(config, database)


@database_app.command()
def restore(
    copy: Annotated[
        Path | None,
        typer.Argument(metavar="COPY", help="The copy. [default: the newest good one]", show_default=False),
    ] = None,
    config: Config = None,
    database: Database = None,
) -> None:
    """Put a copy back; the server must be stopped. What was there is kept beside it."""
    from orchestrator.cli.database import restore as put_back

    put_back(copy, config, database)


key_app = typer.Typer(
    help="Make API keys, list them, revoke them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(key_app, name="key", rich_help_panel=SERVER)
KeyName = Annotated[str, typer.Argument(metavar="NAME", help="The key's name.", show_default=False)]


@key_app.command("create")
def create_key(
    name: KeyName,
    scopes: Annotated[
        list[str],
        option("--scope", "-s", metavar="SCOPE", text="inference, lease, or admin (all); can be repeated."),
    ],
    expires: Annotated[
        str | None, option("--expires", text="Refuse it after this long, such as 90d. [default: never]")
    ] = None,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
    config: Config = None,
    database: Database = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it, this once.

    Asks the server. If none answers, or --database is given, it is made in the database itself: that is how
    a lost key is replaced, with the server stopped.
    """
    from orchestrator.cli.keys import Place, create

    place = Place(Where(url, key, key_file, config), database)
    create(place, name, scopes, expires, as_json=as_json)


@key_app.command("list")
def list_keys(
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
    config: Config = None,
    database: Database = None,
    as_json: Json = False,
) -> None:
    """List the keys: names, scopes and times."""
    from orchestrator.cli.keys import Place, list_all

    list_all(Place(Where(url, key, key_file, config), database), as_json=as_json)


@key_app.command("revoke")
def revoke_key(
    name: KeyName,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
    config: Config = None,
    database: Database = None,
) -> None:
    """Revoke a key: it is refused from now on, and the browsers that logged in with it are logged out."""
    from orchestrator.cli.keys import Place, revoke

    revoke(Place(Where(url, key, key_file, config), database), name)


learned_app = typer.Typer(
    help="Look at what loads have shown of models' memory, or forget it.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(learned_app, name="learned", rich_help_panel=MODELS)


@learned_app.command("list")
def list_learned(config: Config = None, database: Database = None, as_json: Json = False) -> None:
    """List what was learned, also while the server runs. --json has every load."""
    from orchestrator.cli.learned import list_all

    list_all(config, database, as_json=as_json)


@learned_app.command("forget")
def forget_learned(
    target: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A model of the catalogue, a key of the list, or all."),
    ],
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
    config: Config = None,
    database: Database = None,
) -> None:
    """Forget what was learned; footprints are predicted again.

    While the server runs it is asked to forget. What a loaded model holds is noted anew: unload it first.
    """
    from orchestrator.cli.learned import forget

    forget(target, Where(url, key, key_file, config), database)


@app.command(rich_help_panel=SERVER)
def version() -> None:
    """Print the version of this command."""
    typer.echo(f"orchestrator {__version__}")


@app.command(rich_help_panel=MODELS)
def ps(
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
    with_all: Annotated[
        bool, option("--all", "-a", text="A row for every model, also those not loaded.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show the devices' memory, and the models that have it."""
    from orchestrator.cli.looking import show_state

    show_state(Where(url, key, key_file), with_all=with_all, as_json=as_json)


@app.command(rich_help_panel=MODELS)
def load(
    model: Model,
    pin: Annotated[
        bool, option("--pin", text="Never evict it, and load it again after a reboot; unload ends that.")
    ] = False,
    no_wait: NoWait = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Load a model and show how far it is."""
    from orchestrator.cli.loading import load as load_it

    load_it(model, Where(url, key, key_file), pin=True if pin else None, waits=not no_wait, as_json=as_json)


@app.command(rich_help_panel=MODELS)
def unload(
    model: Model,
    force: Annotated[
        bool, option("--force", "-f", text="Cut requests in flight instead of letting them end.")
    ] = False,
    hold: Annotated[
        str | None, option("--hold", text="Keep it out this long, such as 10m; a load ends that.")
    ] = None,
    no_wait: NoWait = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Unload a model; done when its memory is seen to be free."""
    from orchestrator.cli.loading import unload as unload_it

    unload_it(model, Where(url, key, key_file), force=force, hold=hold, waits=not no_wait, as_json=as_json)


@app.command(rich_help_panel=MODELS)
def plan(
    model: Model, url: Url = None, key: Key = None, key_file: KeyFile = None, as_json: Json = False
) -> None:
    """Say what a load would do: where it goes, who leaves, or why not.

    Changes nothing. Exit code 1 if it would be refused.
    """
    from orchestrator.cli.planning import plan as plan_it

    plan_it(model, Where(url, key, key_file), as_json=as_json)


@app.command(rich_help_panel=MODELS)
def estimate(
    target: Annotated[
        str, typer.Argument(metavar="FILE_OR_MODEL", help="A GGUF file, or a model of the catalogue.")
    ],
    context_size: Annotated[
        int | None, option("--context-size", min=1, text="Tokens of all slots together. [default: 8192]")
    ] = None,
    n_gpu_layers: Annotated[
        int | None, option("--n-gpu-layers", min=0, text="Layers on the GPU. [default: all]")
    ] = None,
    cache_type_k: Annotated[
        str | None, option("--cache-type-k", text="Type of the cache's keys. [default: f16]")
    ] = None,
    cache_type_v: Annotated[
        str | None, option("--cache-type-v", text="Type of the cache's values. [default: f16]")
    ] = None,
    parallel: Annotated[
        int | None, option("--parallel", min=1, max=256, text="Slots that share the cache. [default: 4]")
    ] = None,
    gpu: Annotated[
        str | None, option("--gpu", text="The card's name, such as 'RTX 5090'; none: everything in RAM.")
    ] = None,
    gpus: Annotated[
        int | None, option("--gpus", min=1, max=16, text="So many of them share the layers. [default: 1]")
    ] = None,
    mmproj: Annotated[
        Path | None, option("--mmproj", metavar="FILE", text="The projector that comes with the model.")
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Predict the memory of a file or a model, part by part.

    Works without a server. For a model of the catalogue its own settings are the defaults.
    """
    from orchestrator.cli.estimate import estimate as estimate_it

    changes = {
        "context_size": context_size,
        "n_gpu_layers": n_gpu_layers,
        "cache_type_k": cache_type_k,
        "cache_type_v": cache_type_v,
        "parallel": parallel,
        "split": None if gpus is None else (1.0,) * gpus,
    }
    estimate_it(target, config, changes, gpu=gpu, mmproj=mmproj, as_json=as_json)


@app.command(rich_help_panel=MODELS)
def pull(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="OWNER/NAME[:QUANT], or a model of models.yaml.", show_default=False
        ),
    ],
    no_wait: NoWait = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
    as_json: Json = False,
) -> None:
    """Download a model into the server's cache, and show how far it is.

    Without QUANT it is Q4_K_M, else Q8_0, else the first. Ctrl-C leaves the download running.
    """
    from orchestrator.cli.pulling import pull as pull_it

    pull_it(model, Where(url, key, key_file), waits=not no_wait, as_json=as_json)


@app.command(rich_help_panel=MODELS)
def rm(
    model: Model, url: Url = None, key: Key = None, key_file: KeyFile = None, as_json: Json = False
) -> None:
    """Remove a model that was downloaded, with its files; or cancel its download."""
    from orchestrator.cli.pulling import remove

    remove(model, Where(url, key, key_file), as_json=as_json)


@app.command(rich_help_panel=MODELS)
def logs(
    model: Model,
    follow: Annotated[bool, option("--follow", "-f", text="Go on with what it prints next.")] = False,
    tail: Annotated[
        int, typer.Option("--tail", "-n", min=0, help="Begin with the last so many lines.")
    ] = 200,
    attempt: Annotated[
        str | None, option("--attempt", text="Of this attempt instead of the newest one.")
    ] = None,
    previous: Annotated[
        bool, option("--previous", "-p", text="Of the attempt before the newest one.")
    ] = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """Print what a model's service printed, also of its last failed attempt."""
    from orchestrator.cli.looking import print_logs

    print_logs(model, Where(url, key, key_file), follow=follow, tail=tail, attempt=attempt, previous=previous)
