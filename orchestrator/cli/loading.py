"""`load` and `unload`: ask, follow the operation, say how it went."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from orchestrator.cli import show
from orchestrator.cli.talk import FAILED, INTERRUPTED, fail, talking_to
from orchestrator.cli.where import Where
from orchestrator.client.http import Client

POLL_S = 0.1
RUNNING, SUCCEEDED, FAILURE = "running", "succeeded", "failed"

PHASES = {
    "stopped": "waiting",
    "failed": "waiting",
    "queued": "waiting",
    "claimed": "making room",
    "starting": "starting",
    "ready": "ready",
    "draining": "its earlier instance ends its requests",
    "stopping": "its earlier instance stops",
    "stuck": "its earlier instance does not end",
    "reclaiming": "waiting for its earlier memory to come back",
}
LEAVING = {
    "draining": "its requests in flight end; --force would cut them",
    "stopping": "stopping",
    "stuck": "it does not end, although it was killed",
    "reclaiming": "waiting until its memory is free",
}
WAITING = frozenset({"stopped", "failed", "queued", "claimed"})

View = Mapping[str, Any]
Display = Callable[[View], None]


@dataclass(frozen=True, slots=True)
class Step:
    """How far a load is. `share` is None while that cannot be said."""

    text: str
    share: float | None = None


def step_of(operation: View) -> Step:
    """An operation as a line for a person: its phase, why it waits, how far it is."""
    phase = str(operation.get("phase", ""))
    if operation.get("kind") == "unload":
        return Step(LEAVING.get(phase, "unloading"))
    if operation.get("kind") == "download":
        return download_step(operation.get("progress"))
    text = PHASES.get(phase, phase or "waiting")
    if phase in WAITING and operation.get("message"):
        return Step(show.clean(f"{text}: {operation['message']}"))
    progress: View | None = operation.get("progress")
    if phase == "starting" and progress:
        return Step(str(progress["stage"]), float(progress["value"]))
    return Step(text)


def download_step(progress: View | None) -> Step:
    if progress is None:
        return Step("downloading")
    done, total = show.size(progress["done_bytes"]), show.size(progress["total_bytes"])
    return Step(f"{done} of {total}", float(progress["value"]))


# --- load


def load(model: str, where: Where, *, pin: bool | None, waits: bool, as_json: bool) -> None:
    with talking_to(where, as_json=as_json) as client, interruptible(f"'{model}' goes on loading"):
        began_s = time.monotonic()
        answer = client.load(model, pin=pin)
        was_loaded = answer["operation"]["state"] == SUCCEEDED
        operation = outcome(client, answer, waits, as_json)
        if not as_json:
            show.say(loaded_text(client, operation, None if was_loaded else time.monotonic() - began_s))


def outcome(client: Client, answer: View, waits: bool, as_json: bool) -> View:
    """The operation as it ended, or as it stands; in JSON it is printed. A failure ends the command."""
    operation: View = answer["operation"]
    if waits and operation["state"] == RUNNING:
        with display_for(operation["model"], as_json) as display:
            operation = follow(client, operation, display)
    has_failed = operation["state"] == FAILURE
    if as_json:
        show.print_json({**answer, **summary(operation), "operation": operation})
    if has_failed and not as_json:
        fail(operation["message"], FAILED)
    if has_failed:
        raise typer.Exit(FAILED)
    return operation


def summary(operation: View) -> dict[str, Any]:
    """What the server's own answer says beside the operation, as of now."""
    told: dict[str, Any] = {"success": operation["state"] != FAILURE, "message": operation["message"]}
    is_of_memory = operation["kind"] in ("load", "unload") and operation["state"] != RUNNING
    return told | ({"freed_mib": operation["freed_mib"]} if is_of_memory else {})


def follow(client: Client, operation: View, display: Display) -> View:
    """Show the operation until it has ended."""
    while operation["state"] == RUNNING:
        display(operation)
        time.sleep(POLL_S)
        operation = client.operation(operation["id"])
    display(operation)
    return operation


def loaded_text(client: Client, operation: View, took_s: float | None) -> str:
    """How long it took (None: it was there already) and where it is."""
    name = operation["model"]
    if operation["state"] == RUNNING:
        return f"{name} is being loaded; `orchestrator ps` shows how far it is."
    state = client.state()
    found = next((model for model in state["models"] if model["id"] == name), None)
    memory: View = ((found or {}).get("instance") or {}).get("memory") or {}
    names = show.device_names(state["devices"])
    places = [
        f"{names.get(place, place)} ({show.number(part['used_mib'])} of {part['reserved_mib']} MiB reserved)"
        for place, part in memory.items()
    ]
    pinned = ", pinned" if found and found["pinned"] else ""
    where = f" on {' and '.join(places)}" if places else ""
    how = "was loaded already" if took_s is None else f"is ready after {show.duration(took_s)}"
    return f"{name} {how}{where}{pinned}."


# --- unload


def unload(model: str, where: Where, *, force: bool, hold: str | None, waits: bool, as_json: bool) -> None:
    with talking_to(where, as_json=as_json) as client, interruptible(f"'{model}' goes on unloading"):
        answer = client.unload(model, wait=False, force=force, hold=hold)
        operation = outcome(client, answer, waits, as_json)
        if not as_json:
            show.say(unloaded_text(operation, hold))


def unloaded_text(operation: View, hold: str | None) -> str:
    name, freed_mib = operation["model"], operation["freed_mib"]
    kept_out = f" It is kept out for {hold}." if hold else ""
    if operation["state"] == RUNNING:
        return f"{name} is being unloaded; `orchestrator ps` shows how far it is.{kept_out}"
    told = f"{name} is unloaded, {freed_mib} MiB freed." if freed_mib else str(operation["message"])
    return told + kept_out


# --- on the screen


@contextmanager
def interruptible(still: str, further: str = "`orchestrator ps` shows it") -> Iterator[None]:
    """Ctrl-C ends our waiting only, and says so, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        show.say(f"\n{still}; {further}.", sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def display_for(model: str, as_json: bool) -> Iterator[Display]:
    """Shows steps on stderr: a live bar on a terminal, else a line whenever the phase changes."""
    if as_json:
        yield lambda operation: None
    elif sys.stderr.isatty():
        with bar() as progress:
            task = progress.add_task("", total=None, model=model)
            yield lambda operation: advance(progress, task, operation)
    else:
        yield Lines(model)


def bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.fields[model]}", style="bold", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=show.console(sys.stderr),
        transient=True,
    )


def advance(progress: Progress, task: TaskID, operation: View) -> None:
    if operation["state"] != RUNNING:
        is_done = operation["state"] == SUCCEEDED
        progress.update(task, description=operation["state"], total=1.0, completed=float(is_done))
        return
    step = step_of(operation)
    if step.share is None:
        progress.update(task, description=step.text, total=None)
    else:
        progress.update(task, description=step.text, total=1.0, completed=step.share)


class Lines:
    """Progress for where nothing can be redrawn: a line for each new step, and for each quarter of it."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._last = ""

    def __call__(self, operation: View) -> None:
        if operation["state"] != RUNNING:
            return
        step = step_of(operation)
        percent = int((step.share or 0.0) * 4) * 25
        line = f"{self._model}: {step.text}{f' {percent} %' if percent else ''}"
        news = f"{percent}" if operation.get("kind") == "download" else line  # bytes alone are no news
        if operation.get("phase") in WAITING:
            news = re.sub(r"\d+", "", line)  # nor are the seconds that pass
        if news != self._last:
            self._last = news
            show.say(line, sys.stderr)
