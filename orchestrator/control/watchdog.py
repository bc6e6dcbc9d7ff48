"""Says when the loop is late, and why: its thread was busy elsewhere, or a turn waits for the store."""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Callable

import structlog

from orchestrator.control.vitals import Vitals
from orchestrator.core.entities import Note

log = structlog.get_logger(__name__)

TICK_S = 0.5
LATE_S = 1.0
"""An event loop that does not turn for this long is late, as is a turn that takes this long."""

FRAMES_SHOWN = 4


class Watchdog:
    """A heartbeat on the event loop, and a thread that looks at it from outside.

    The thread names the culprit while it still runs; the heartbeat tells the event log afterwards.
    `note` is called on the event loop.
    """

    def __init__(
        self,
        vitals: Vitals,
        note: Callable[[Note], None],
        clock: Callable[[], float],
        *,
        late_s: float = LATE_S,
    ) -> None:
        self._vitals = vitals
        self._note = note
        self._clock = clock
        self._late_s = late_s
        self._beat_s = clock()
        self._ended = threading.Event()
        self._loop_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    async def run(self) -> None:
        """Beat until cancelled."""
        self._beat_s = self._clock()
        self._thread.start()
        try:
            while True:
                await asyncio.sleep(TICK_S)
                self._beat()
        finally:
            self._ended.set()

    def _beat(self) -> None:
        now_s = self._clock()
        self._vitals.lag_s.add(max(0.0, now_s - self._beat_s - TICK_S))
        self._beat_s = now_s
        if self._vitals.late is not None and self._vitals.busy_s() < self._late_s:
            self._note(Note("late", f"the control loop was late: {self._vitals.late}"))
            self._vitals.late = None

    def _watch(self) -> None:
        while not self._ended.wait(TICK_S / 2):
            self.look()

    def look(self) -> None:
        """Find out whether the loop is late now; said once for each time it is."""
        beat_s = self._beat_s
        behind_s = self._clock() - beat_s - TICK_S
        busy_s = self._vitals.busy_s()
        if behind_s > self._late_s:
            why = f"its thread has been busy for {behind_s:.1f} s in {self._culprit()}"
        elif busy_s > self._late_s:
            why = f"a turn has been {self._vitals.phase} for {busy_s:.1f} s"
        else:
            return
        if beat_s != self._beat_s:
            return  # it goes on again
        if self._vitals.late is None:
            log.warning("the control loop is late", why=why)
        self._vitals.late = why

    def _culprit(self) -> str:
        """Where the event loop's thread is now, innermost call last."""
        frame = sys._current_frames().get(self._loop_thread)
        calls = traceback.extract_stack(frame)[-FRAMES_SHOWN:] if frame else []
        return " > ".join(f"{call.name} ({call.filename.rsplit('/', 1)[-1]}:{call.lineno})" for call in calls)
