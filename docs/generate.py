"""Writes the parts of docs/lifecycle.md that come from the code: `python docs/generate.py`.

With `--check` nothing is written; the exit code is 1 if the document no longer says what the code does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from orchestrator.core.lifecycle import (
    AT_REST,
    COMMANDS,
    HAS_PROCESS,
    HOLDS_RESERVATION,
    TRANSITIONS,
    Signal,
    State,
)

DOCUMENT = Path(__file__).parent / "lifecycle.md"


def diagram() -> str:
    """Every row of the table as an arrow; rows between the same two states share one."""
    arrows: dict[tuple[State, State], list[Signal]] = {}
    for (state, signal), following in TRANSITIONS.items():
        arrows.setdefault((state, following), []).append(signal)
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.STOPPED}"]
    lines += [f"    {a} --> {b}: {' / '.join(signals)}" for (a, b), signals in arrows.items()]
    return "\n".join([*lines, "```"])


def transitions() -> str:
    lines = ["| state | signal | next | the signal is |", "|---|---|---|---|"]
    for (state, signal), following in TRANSITIONS.items():
        kind = "ordered" if signal in COMMANDS else "seen"
        lines.append(f"| {state} | {signal} | {following} | {kind} |")
    return "\n".join(lines)


def states() -> str:
    def mark(state: State, group: frozenset[State]) -> str:
        return "yes" if state in group else ""

    lines = ["| state | keeps its bytes reserved | has a process | at rest |", "|---|---|---|---|"]
    groups = (HOLDS_RESERVATION, HAS_PROCESS, AT_REST)
    lines += [f"| {state} | {' | '.join(mark(state, group) for group in groups)} |" for state in State]
    return "\n".join(lines)


PARTS = {"diagram": diagram, "transitions": transitions, "states": states}


def with_parts(text: str) -> str:
    """The document with each generated part made anew. Raises ValueError where one has no place in it."""
    for name, make in PARTS.items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        head, begun, rest = text.partition(begin)
        _, ended, tail = rest.partition(end)
        if not begun or not ended:
            raise ValueError(f"{DOCUMENT.name} has no place for '{name}': it needs {begin} and {end}")
        text = f"{head}{begin}\n{make()}\n{end}{tail}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the document is stale")
    is_check = parser.parse_args().check
    old = DOCUMENT.read_text(encoding="utf-8")
    new = with_parts(old)
    if new == old:
        return 0
    if is_check:
        print(f"{DOCUMENT.name} is stale: run `python docs/generate.py`", file=sys.stderr)
        return 1
    DOCUMENT.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
