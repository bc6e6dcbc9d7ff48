"""State, progress and checks as text for a terminal. Nothing here talks to anybody."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

View = Mapping[str, Any]

WIDTH_IN_A_PIPE = 160
WIDE = 110
FOREIGN_NAMED = 3
NOBODYS_MIB = 64
RECENT_S = 86_400.0
RAM = "RAM"
ROOMY = Console(width=1000)
BAR_WIDTH, NARROW_BAR_WIDTH = 32, 16
USED, PROMISED, FREE, KEPT = "█", "▒", "·", "░"

STATE_STYLES = {
    "ready": "green",
    "failed": "bold red",
    "stuck": "bold red",
    "stopped": "dim",
    "queued": "yellow",
    "claimed": "yellow",
    "starting": "cyan",
}
SIGNS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "bad": ("✗", "bold red")}
ACTIVE = frozenset({"queued", "claimed", "starting", "ready", "draining", "stopping", "stuck", "reclaiming"})


def console(stream: TextIO | None = None) -> Console:
    """A console that leaves our words alone; in a pipe it is wide, so that lines stay whole for grep."""
    stream = stream or sys.stdout
    width = None if stream.isatty() or os.environ.get("COLUMNS") else WIDTH_IN_A_PIPE
    return Console(file=stream, highlight=False, markup=False, emoji=False, width=width)


def draw(screen: RenderableType, stream: TextIO | None = None) -> None:
    """A whole screen; in a pipe without the blanks that fill its lines up."""
    target = console(stream)
    if target.is_terminal:
        target.print(screen)
        return
    with target.capture() as captured:
        target.print(screen)
    target.file.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
    target.file.flush()


def print_json(body: object) -> None:
    sys.stdout.write(json.dumps(body, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(text: str | Text, stream: TextIO | None = None, style: str = "") -> None:
    """One message; long ones wrap where the terminal ends, and nowhere else."""
    console(stream).print(Text(clean(text), style) if isinstance(text, str) else text, soft_wrap=True)


def clean(text: str) -> str:
    """Without characters that could command a terminal: a model's last words may hold anything."""
    return "".join(c for c in text if c in "\n\t" or (c.isprintable()))


def size(size_bytes: int) -> str:
    """A size of files: 17.3 GiB, 480.0 MiB."""
    gib = size_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{size_bytes / 2**20:.1f} MiB"


# --- ps


def state_screen(state: View, *, with_all: bool = False, width: int = WIDTH_IN_A_PIPE) -> RenderableType:
    """Devices with their bars, models, and what there is to say about some of them."""
    models = list(state["models"])
    shown = [model for model in models if with_all or is_of_interest(model)]
    rest = [model for model in models if model not in shown]
    parts: list[RenderableType] = [fitting_device_table(state["devices"], width)]
    parts += [*foreign_lines(state["devices"]), Text()]
    if shown:
        parts.append(model_table(shown, device_names(state["devices"])))
    parts += [*unmeasured(state["devices"]), *overcommitted(state["devices"])]
    parts += troubles(state["devices"])
    parts += remarks(models, waiting_reasons(state))
    parts += unloaded_line(rest)
    if not models:
        parts.append(Text("The catalogue has no models; models.yaml is where they are named.", "yellow"))
    return Group(*parts)


def is_of_interest(model: View) -> bool:
    """It runs, is on its way, has failed, or would be loaded by itself."""
    return model["state"] in ACTIVE or "failure" in model or bool(model["pinned"]) or is_downloading(model)


def is_downloading(model: View) -> bool:
    return bool((model.get("status") or {}).get("value") == "downloading")


def device_names(devices: Iterable[View]) -> dict[str, str]:
    """Short names by device id: RAM, GPU 0."""
    return {device["id"]: short_name(device) for device in devices}


def short_name(device: View) -> str:
    if device["kind"] == "host" or device["id"] == "host":
        return RAM
    return f"GPU {device['index']}" if device.get("index") is not None else str(device["id"])


def fitting_device_table(devices: Sequence[View], width: int) -> Table:
    """The fullest layout whose lines are not broken at this width; at the least without bars."""
    return next(
        (table for table in layouts(devices, width) if natural_width(table) <= width),
        device_table(devices, is_wide=False, bar_width=0),
    )


def layouts(devices: Sequence[View], width: int) -> Iterator[Table]:
    if width >= WIDE:
        yield device_table(devices, is_wide=True, bar_width=BAR_WIDTH)
        yield device_table(devices, is_wide=True, bar_width=NARROW_BAR_WIDTH)
    yield device_table(devices, is_wide=False, bar_width=NARROW_BAR_WIDTH)


def natural_width(table: Table) -> int:
    return Measurement.get(ROOMY, ROOMY.options, table).maximum


def device_table(devices: Iterable[View], *, is_wide: bool, bar_width: int) -> Table:
    table = new_table("DEVICE", "", "USED", "RESERVED", "AVAILABLE", "OF MiB", "FOREIGN", *["LOAD"] * is_wide)
    for column in table.columns[2:]:
        column.justify = "right"
    for device in devices:
        name = Text(short_name(device), "bold")
        if is_wide and device["kind"] != "host":
            name.append(f"  {clean(str(device['name']))}", "dim")
        cells = device_cells(device, bar_width)
        blanks = [Text()] * (6 - len(cells))
        table.add_row(name, *cells, *blanks, *[Text(load_text(device), "dim")] * is_wide)
    return table


def load_text(device: View) -> str:
    """Utilisation, temperature and power, as far as the card tells them."""
    told: View = device.get("telemetry") or {}
    parts = {"utilization_percent": "%", "temperature_c": "°C", "power_w": "W"}
    return ", ".join(f"{told[key]:.0f} {unit}" for key, unit in parts.items() if told.get(key) is not None)


def device_cells(device: View, bar_width: int) -> list[RenderableType]:
    if "error" in device:
        return [Text("not measured", "bold red")]
    numbers = [device[f"{key}_mib"] for key in ("used", "reserved", "available", "capacity")]
    cells: list[RenderableType] = [
        memory_bar(device, bar_width),
        *(Text(str(number)) for number in numbers),
    ]
    return [*cells, Text(str(device["foreign_mib"]), "dim")]


def memory_bar(device: View, width: int) -> Text:
    """Used, promised but not yet taken, available, and what is kept free, side by side."""
    capacity = max(1, device["capacity_mib"])
    available = max(0, device["available_mib"])
    promised = max(0, device["kept_back_mib"])
    used = max(0, min(device["used_mib"], capacity - available - promised))
    parts = shares([used, promised, available], capacity, width)
    bar = Text(USED * parts[0], bar_colour(used / capacity))
    bar.append(PROMISED * parts[1], "yellow")
    bar.append(FREE * parts[2], "dim")
    return bar.append(KEPT * (width - sum(parts)), "dim")


def shares(sizes: Sequence[int], whole: int, width: int) -> list[int]:
    """Cells for each size; what is not nothing gets at least one, and together they fit."""
    cells = [max(1, round(size * width / whole)) if size > 0 else 0 for size in sizes]
    while sum(cells) > width:
        cells[cells.index(max(cells))] -= 1
    return cells


def bar_colour(share: float) -> str:
    return "red" if share > 0.95 else "green"


def foreign_lines(devices: Iterable[View]) -> list[RenderableType]:
    """For each device those who are not ours, the largest first."""
    lines: list[RenderableType] = []
    for device in devices:
        holders = foreign_holders(device.get("foreign", ()))
        told = [f"{who} {used_mib} MiB" for who, used_mib in holders[:FOREIGN_NAMED]]
        if rest := holders[FOREIGN_NAMED:]:
            told.append(f"{len(rest)} more {sum(used_mib for _, used_mib in rest)} MiB")
        if (nobodys_mib := device.get("unexplained_mib") or 0) >= NOBODYS_MIB:
            told.append(f"{nobodys_mib} MiB of no process")
        if told:
            lines.append(remark("·", "dim", f"not ours on {short_name(device)}: {', '.join(told)}"))
    return lines


def foreign_holders(processes: Iterable[View]) -> list[tuple[str, int]]:
    """Who has how many MiB: each container as one, and each process outside of any."""
    groups: dict[str, list[View]] = {}
    for process in processes:
        groups.setdefault(process.get("container") or str(process["pid"]), []).append(process)
    holders = [(foreign_name(group), sum(each["used_mib"] for each in group)) for group in groups.values()]
    return sorted(holders, key=lambda holder: -holder[1])


def foreign_name(group: Sequence[View]) -> str:
    first = group[0]
    if first.get("container_name"):
        return f"{first['container_name']} (container)"
    process = f"{first['name']} (PID {first['pid']})"
    if not first.get("container"):
        return process
    inside = process if len(group) == 1 else f"{len(group)} processes"
    return f"{inside} in container {first['container'][:12]}"


def model_table(models: Iterable[View], names: Mapping[str, str]) -> Table:
    table = new_table("MODEL", "STATE", "ON", "USED / RESERVED", "IN FLIGHT", "FOR", "IDLE LIMIT", "")
    table.columns[3].justify = table.columns[4].justify = table.columns[5].justify = "right"
    for model in models:
        table.add_row(*model_cells(model, names))
    return table


def model_cells(model: View, names: Mapping[str, str]) -> list[RenderableType]:
    instance: View = model.get("instance") or {}
    memory: View = instance.get("memory") or {}
    on = ", ".join(names.get(device, device) for device in memory)
    return [
        Text(model["id"], "bold"),
        Text(state_word(model), STATE_STYLES.get(model["state"], "magenta")),
        Text(on or "–"),
        Text(memory_text(model, memory, names)),
        Text(str(instance["in_flight"]) if instance else "–"),
        Text(duration(instance["for_s"]) if instance else "–"),
        Text(idle_text(model)),
        Text("pinned" if model["pinned"] else "", "blue"),
    ]


def state_word(model: View) -> str:
    if is_downloading(model):
        return f"downloading {round(100 * model['status']['progress']['value'])} %"
    progress = (model.get("instance") or {}).get("progress")
    if progress:
        return f"{model['state']} {round(100 * progress['value'])} %"
    return "not loaded" if model["state"] == "stopped" else str(model["state"])


def memory_text(model: View, memory: View, names: Mapping[str, str]) -> str:
    """What it holds, of GPUs and of RAM; for one that is not loaded what it would need."""
    if memory:
        parts_of: dict[bool, list[View]] = {True: [], False: []}
        for device, part in memory.items():
            parts_of[names.get(device) == RAM].append(part)
        return apart(held_text(parts_of[False]), held_text(parts_of[True])) or "0 / 0"
    footprint: View = model.get("footprint") or {}
    gpu, ram = footprint.get("gpu_mib", 0), footprint.get("host_mib", 0)
    if all(name == RAM for name in names.values()):
        gpu, ram = gpu + ram, 0
    needed = apart(str(gpu) if gpu else None, str(ram) if ram else None)
    least = "at least " if footprint.get("is_least") else ""
    return f"needs {least}{needed}" if needed else "–"


def held_text(parts: Sequence[View]) -> str | None:
    """Of devices of one kind; None where nothing is reserved. What cannot be measured is not zero."""
    uses, reserved = [part["used_mib"] for part in parts], sum(part["reserved_mib"] for part in parts)
    used = None if None in uses else sum(uses)
    return f"{number(used)} / {reserved}" if used or reserved else None


def number(value: int | None) -> str:
    return "?" if value is None else str(value)


def apart(gpu: str | None, ram: str | None) -> str:
    """Bytes of a GPU and of RAM do not add up to anything."""
    return f"{gpu}, RAM {ram}" if gpu and ram else gpu or ram or ""


def idle_text(model: View) -> str:
    idle_after_s = model.get("idle_after_s")
    return "never" if model["pinned"] or idle_after_s is None else duration(idle_after_s)


def waiting_reasons(state: View) -> dict[str, str]:
    return {entry["model"]: entry["reason"] for entry in state["queue"] if entry.get("reason")}


def unmeasured(devices: Iterable[View]) -> list[RenderableType]:
    return [
        remark("✗", "red", f"{short_name(device)} gets nothing: {device['error']}")
        for device in devices
        if "error" in device
    ]


def overcommitted(devices: Iterable[View]) -> list[RenderableType]:
    """Where available is less than nothing, and whether that is because somebody just leaves."""
    lines: list[RenderableType] = []
    for device in devices:
        if not (lacking_mib := device.get("overcommitted_mib")):
            continue
        name = short_name(device)
        if any(holder["state"] == "claimed" for holder in device.get("holders", ())):
            text = f"{name}: {lacking_mib} MiB of what was promised are still to come from those who leave"
            lines.append(remark("·", "dim", text))
            continue
        kept = f"{device['headroom_mib']} MiB of headroom and {device['kept_back_mib']} MiB promised"
        text = f"{name} is overcommitted by {lacking_mib} MiB: so much less is free than {kept}"
        lines.append(remark("!", "yellow", text))
    return lines


def troubles(devices: Iterable[View]) -> list[RenderableType]:
    """What GPUs report of themselves: errors, and why they are slow."""
    lines: list[RenderableType] = []
    for device in devices:
        told: View = device.get("telemetry") or {}
        if reasons := told.get("throttled_by"):
            lines.append(remark("!", "yellow", f"{short_name(device)} is slowed down: {', '.join(reasons)}"))
        if count := told.get("ecc_uncorrected"):
            lines.append(remark("✗", "red", f"{short_name(device)} had {count} uncorrected memory errors"))
        if incidents := [i for i in device.get("incidents", ()) if time.time() - i["at"] < RECENT_S]:
            last, more = incidents[-1], len(incidents) - 1
            since = f"{duration(time.time() - last['at'])} ago" + (f", and {more} before" if more else "")
            lines.append(remark("!", "yellow", f"{short_name(device)} reported {last['text']} ({since})"))
    return lines


def remarks(models: Iterable[View], waiting: Mapping[str, str]) -> list[RenderableType]:
    """A line for each thing that a table's cell could not explain."""
    lines: list[RenderableType] = []
    for model in models:
        name = model["id"]
        if name in waiting:
            lines.append(remark("…", "yellow", f"{name} waits: {waiting[name]}"))
        if chosen := (model.get("instance") or {}).get("parameters"):
            lines.append(remark("·", "dim", f"{name} runs with {chosen_text(chosen)}"))
        if "failure" in model:
            lines.append(remark("✗", "red", failure_text(model)))
        if model.get("problem"):
            lines.append(remark("!", "yellow", f"{name} cannot be loaded: {model['problem']}"))
        if model.get("held_for_s"):
            left = duration(model["held_for_s"])
            lines.append(remark("!", "yellow", f"{name} is kept out for another {left}"))
    return lines


def chosen_text(parameters: View) -> str:
    """As models.yaml would have it."""
    return ", ".join(f"{name}: {value}" for name, value in parameters.items())


def remark(sign: str, style: str, text: str) -> Text:
    return Text.assemble((f"{sign} ", style), clean(text))


def failure_text(model: View) -> str:
    failure: View = model["failure"]
    name, times = model["id"], failure["failures"]
    text = f"{name} failed{f' {times} times' if times > 1 else ''}: {failure['message'].rstrip('.')}."
    last = next((line.strip() for line in reversed(failure["log_tail"]) if line.strip()), "")
    if last and last not in text:
        text += f" Its last words: “{last[:300]}”."
    due_s = failure.get("next_try_in_s")
    if due_s:
        text += f" A request is not tried again for {duration(due_s)}."
    return f"{text} (orchestrator logs {name})" if failure.get("has_log", True) else text


def unloaded_line(models: Sequence[View]) -> list[RenderableType]:
    if not models:
        return []
    names = Text("Not loaded: ", "dim")
    return [names.append(", ".join(model["id"] for model in models))]


# --- doctor


def checks_screen(diagnosis: View) -> RenderableType:
    """Each check with its sign, what was found, and beneath it what to do."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for check in diagnosis["checks"]:
        sign, style = SIGNS.get(check["status"], ("?", ""))
        told = Text(clean(str(check["found"])))
        if check["advice"]:
            told.append(f"\n→ {clean(str(check['advice']))}", "yellow")
        table.add_row(Text(sign, style), Text(clean(str(check["name"]))), told)
    return table


def checks_summary(diagnosis: View) -> Text:
    counted = [check["status"] for check in diagnosis["checks"]]
    bad, warnings = counted.count("bad"), counted.count("warning")
    if bad:
        return Text(f"{plural(bad, 'problem')}, {plural(warnings, 'warning')}.", "bold red")
    return (
        Text(f"{plural(warnings, 'warning')}, no problem.", "yellow")
        if warnings
        else Text("All is well.", "green")
    )


def plural(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def key_table(keys: Iterable[View], now: float) -> Table:
    table = new_table("KEY", "SCOPES", "MADE", "LAST USED", "EXPIRES", "BEGINS WITH")
    for key in keys:
        expires_in = None if key["expires_at"] is None else key["expires_at"] - now
        table.add_row(
            key["name"],
            ", ".join(key["scopes"]),
            f"{duration(now - key['created_at'])} ago",
            "never" if key["last_used_at"] is None else f"{duration(now - key['last_used_at'])} ago",
            "never" if expires_in is None else f"in {duration(expires_in)}" if expires_in > 0 else "expired",
            f"orc_{key['id']}",
        )
    return table


# --- words


def new_table(*titles: str) -> Table:
    """Columns without lines, so that it reads well and copies well."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for title in titles:
        table.add_column(title, overflow="fold")
    return table


def duration(seconds: float) -> str:
    """Two units at most: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min, 4 d."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return two_units(round(seconds), 60, "min", "s")
    if seconds < 86400:
        return two_units(round(seconds / 60), 60, "h", "min")
    return two_units(round(seconds / 3600), 24, "d", "h")


def two_units(count: int, many: int, large: str, small: str) -> str:
    whole, part = divmod(count, many)
    return f"{whole} {large} {part} {small}" if part else f"{whole} {large}"
