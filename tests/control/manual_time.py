"""An asyncio loop whose time stands still until a test moves it, and that runs one round at a time."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.control.world import ManualClock

ROUND_S = 1e-6
"""What a round takes: no two things that depend on each other happen at the very same time."""

MOST_ROUNDS = 3000
"""So many rounds without any time passing mean that something spins."""


class ManualEventLoop(asyncio.SelectorEventLoop):
    """Timers are due by `clock`. Nothing ever sleeps: `run_round` runs what is ready now and returns."""

    def __init__(self, clock: ManualClock) -> None:
        self._manual_clock = clock
        super().__init__()

    def time(self) -> float:
        return self._manual_clock()

    def run_round(self) -> None:
        """Exactly one round of callbacks: every task that can go on goes on to its next await."""
        self._manual_clock.now_s += ROUND_S
        self.stop()
        self.run_forever()

    def run_until_quiet(self) -> None:
        """Until nothing can go on before time passes."""
        for _ in range(MOST_ROUNDS):
            if not self.is_busy():
                return
            self.run_round()
        raise AssertionError(f"it spins: {MOST_ROUNDS} rounds without rest")

    def is_busy(self) -> bool:
        ready: Any = getattr(self, "_ready")  # noqa: B009 (asyncio does not show it)
        due_s = self.next_due_s()
        return bool(ready) or (due_s is not None and due_s <= self.time())

    def next_due_s(self) -> float | None:
        """When the next timer is due; None if there is none."""
        timers: Any = getattr(self, "_scheduled")  # noqa: B009
        return min((timer.when() for timer in timers if not timer.cancelled()), default=None)
