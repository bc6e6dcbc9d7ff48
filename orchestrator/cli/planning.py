"""`plan`: what a load would do, as a screen or as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.cli import show
from orchestrator.cli.talk import FAILED, talking_to
from orchestrator.cli.where import Where

View = Mapping[str, Any]

ENDINGS = {1: "st", 2: "nd", 3: "rd"}
STYLES = {"loaded": "green", "loading": "cyan", "starts": "green", "waits": "yellow", "refused": "bold red"}


def plan(model: str, where: Where, *, as_json: bool) -> None:
    with talking_to(where, as_json=as_json) as client:
        planned = client.plan(model)
    if as_json:
        show.print_json(planned)
    else:
        show.draw(plan_screen(planned))
    if planned["outcome"] == "refused":
        raise typer.Exit(FAILED)


def plan_screen(planned: View) -> RenderableType:
    """The sentence, the devices, what it needs, who leaves, and what would fit instead."""
    parts: list[RenderableType] = [
        Text(show.clean(planned["message"]), STYLES.get(planned["outcome"], "")),
        Text(),
        device_table(planned["devices"]),
        *overcommitted_lines(planned["devices"]),
        Text(),
        *footprint_parts(planned["footprint"], planned["devices"]),
    ]
    if planned["parameters"]:
        parts += [Text(), Text(f"Chosen for it: {show.chosen_text(planned['parameters'])}.")]
    if planned["evictions"]:
        parts += [Text(), eviction_table(planned["evictions"], show.device_names(planned["devices"]))]
    if planned.get("would_fit"):
        parts += [Text(), fitting_table(planned["would_fit"])]
    return Group(*parts)


def device_table(devices: Iterable[View]) -> Table:
    table = show.new_table("DEVICE", "TAKES", "AVAILABLE", "AFTER", "USABLE MiB")
    align_right(table, 1)
    for device in devices:
        name = Text(show.short_name(device), "bold")
        if "error" in device:
            table.add_row(name, Text("not measured", "bold red"))
            continue
        numbers = (device[f"{key}_mib"] for key in ("available", "available_after", "capacity"))
        table.add_row(name, str(device["takes_mib"] or "–"), *map(str, numbers))
    return table


def overcommitted_lines(devices: Iterable[View]) -> list[RenderableType]:
    over = [(show.short_name(device), device.get("overcommitted_mib")) for device in devices]
    lines = [f"{name} is overcommitted by {lacking_mib} MiB now" for name, lacking_mib in over if lacking_mib]
    return [show.remark("!", "yellow", line) for line in lines]


def footprint_parts(footprint: View, devices: Iterable[View]) -> list[RenderableType]:
    """One line where only the sums are known, else a table of the parts."""
    breakdown: Mapping[str, Mapping[str, int]] = footprint["breakdown"]
    if footprint["source"] == "unknown":
        return [Text("What it needs is not known.")]
    if not breakdown:
        has_gpu = any(device["kind"] == "gpu" for device in devices)
        needs = [f"{footprint['gpu_mib']} MiB {'on the GPU' if has_gpu else 'of RAM'}"]
        needs += [f"{footprint['host_mib']} MiB of RAM beside that"] if footprint["host_mib"] else []
        return [Text(f"It needs {', '.join(needs)} ({footprint['source']}).")]
    table = show.new_table("NEEDS", *column_names(list(breakdown), devices))
    align_right(table, 1)
    for part in dict.fromkeys(part for parts in breakdown.values() for part in parts):
        table.add_row(part.replace("_", " "), *(str(parts.get(part, "")) for parts in breakdown.values()))
    each_mib = round(footprint["gpu_mib"] / max(1, len(breakdown.keys() - {"host"})))
    sums = (footprint["host_mib"] if part == "host" else each_mib for part in breakdown)
    table.add_row(f"together ({footprint['source']})", *map(str, sums), style="bold")
    return [table]


def column_names(parts: list[str], devices: Iterable[View]) -> list[str]:
    """`gpu0` is the first GPU of the model, wherever it goes: its name where that is known."""
    placed = [show.short_name(d) for d in devices if d["kind"] == "gpu" and d.get("takes_mib")]
    gpus = [part for part in parts if part != "host"]
    if len(placed) != len(gpus):
        placed = ["GPU"] if len(gpus) == 1 else [ordinal(n) for n in range(1, len(gpus) + 1)]
    names = dict(zip(gpus, placed, strict=True)) | {"host": "RAM"}
    return [names[part] for part in parts]


def ordinal(number: int) -> str:
    return f"{number}{ENDINGS.get(number, 'th')} GPU"


def eviction_table(evictions: Iterable[View], names: Mapping[str, str]) -> Table:
    table = show.new_table("LEAVES", "FREES MiB", "WHY IT")
    for eviction in evictions:
        frees = ", ".join(f"{size} of {names.get(d, d)}" for d, size in eviction["frees_mib"].items())
        table.add_row(Text(eviction["model"], "bold"), frees, show.clean(eviction["why"]))
    return table


def fitting_table(fitting: Iterable[View]) -> Table:
    """Each with what to write into models.yaml."""
    table = show.new_table("WOULD FIT WITH", "GPU MiB", "RAM MiB")
    align_right(table, 1)
    for one in fitting:
        written = {key: value for key, value in one.items() if not key.endswith("_mib")}
        words = ", ".join(f"{key}: {value}" for key, value in written.items())
        table.add_row(Text(words, "bold"), str(one["gpu_mib"]), str(one["host_mib"]))
    return table


def align_right(table: Table, first: int) -> None:
    for column in table.columns[first:]:
        column.justify = "right"
