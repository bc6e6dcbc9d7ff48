"""What the benchmarks print: a title, the machine, one table, notes."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

WIDTH = 118


def machine() -> str:
    """Cores we may use, Python, kernel, and how busy the machine was: the reader judges the noise."""
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return (
        f"{cores} cores, {cpu_name()}; Python {platform.python_version()}, Linux {platform.release()}; "
        f"load average {load:.1f}"
    )


def cpu_name() -> str:
    with open("/proc/cpuinfo") as file:  # noqa: PTH123
        names = (line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
        return next(names, platform.machine())


def show(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()
) -> None:
    """Print one table; the first column names the row, the others are numbers."""
    console = Console(width=WIDTH, highlight=False)
    table = Table(title_justify="left", header_style="bold", pad_edge=False, box=None)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(f"\n[bold]{title}[/bold]")
    console.print(machine(), style="dim")
    console.print(table)
    for note in notes:
        console.print(note, style="dim")


def say(line: str) -> None:
    """A line about progress, or about what is left out and why."""
    print(line, flush=True)


def milliseconds(seconds: float, digits: int = 2) -> str:
    return f"{seconds * 1000:.{digits}f} ms"


def ratio(measured: float, bare: float) -> str:
    return f"{measured / bare:.2f}x" if bare else "-"


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
