"""How the loop itself is doing: what waits for it, how long its turns take, and what it is busy with."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

WINDOW_S = 60.0


class Recent:
    """Largest and mean value of the last one to two minutes."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began_s = clock()
        self._count = self._old_count = 0
        self._sum = self._old_sum = 0.0
        self._largest = self._old_largest = 0.0
        self.last = 0.0

    def add(self, value: float) -> None:
        self._roll()
        self.last = value
        self._count += 1
        self._sum += value
        self._largest = max(self._largest, value)

    def largest(self) -> float:
        self._roll()
        return max(self._largest, self._old_largest)

    def mean(self) -> float:
        self._roll()
        count = self._count + self._old_count
        return (self._sum + self._old_sum) / count if count else 0.0

    def _roll(self) -> None:
        """Begin a new window; the one before still counts."""
        gone_s = self._clock() - self._began_s
        if gone_s < WINDOW_S:
            return
        is_next = gone_s < 2 * WINDOW_S
        self._old_count, self._old_sum, self._old_largest = (
            (self._count, self._sum, self._largest) if is_next else (0, 0.0, 0.0)
        )
        self._count, self._sum, self._largest = 0, 0.0, 0.0
        self._began_s = self._clock()


class Vitals:
    """Written by the loop and the watchdog, read by whoever asks. `phase` is what the turn does now."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.turns = 0
        self.turn_s = Recent(clock)
        self.save_s = Recent(clock)
        self.lag_s = Recent(clock)
        self.inbox = Recent(clock)
        self.late: str | None = None  # why the loop is late now
        self.phase = "waiting"
        self.phase_since_s = clock()
        self._turn_began_s = clock()

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.phase_since_s = self._clock()

    def turn_begins(self, depth: int) -> None:
        self._turn_began_s = self._clock()
        self.inbox.add(depth)
        self.enter("planning")

    def turn_ends(self) -> None:
        self.turns += 1
        self.turn_s.add(self._clock() - self._turn_began_s)
        self.enter("waiting")

    def saved(self) -> None:
        self.save_s.add(self._clock() - self.phase_since_s)

    def busy_s(self) -> float:
        """How long the turn that is under way takes already; 0 between turns."""
        return 0.0 if self.phase == "waiting" else self._clock() - self._turn_began_s

    def view(self, waiting: int) -> dict[str, object]:
        """All of it, ready for JSON; `waiting` are the events in the inbox now."""
        return {
            "turns": self.turns,
            "inbox": waiting,
            "inbox_max": int(self.inbox.largest()),
            "turn_ms": in_ms(self.turn_s),
            "save_ms": in_ms(self.save_s),
            "lag_ms": in_ms(self.lag_s),
            "phase": self.phase,
            "phase_for_s": round(self._clock() - self.phase_since_s, 3),
            "tasks": len(asyncio.all_tasks()),
            "late": self.late,
        }


def in_ms(recent: Recent) -> dict[str, float]:
    return {
        "last": round(recent.last * 1e3, 2),
        "mean": round(recent.mean() * 1e3, 2),
        "max": round(recent.largest() * 1e3, 2),
    }
