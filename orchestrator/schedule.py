"""Housekeeping by the clock: retention, and a look at everything again. What people schedule comes later."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

from apscheduler.schedulers.asyncio import AsyncIOScheduler

RESYNC_S = 30
PRUNE_S = 3600
BACK_UP_S = 900
FIRST_BACK_UP_S = 60
NOTE_USES_S = 300


def new_schedule(
    resync: Callable[[], Awaitable[None]],
    prune: Callable[[], Awaitable[None]],
    back_up: Callable[[], Awaitable[None]],
    note_uses: Callable[[], Awaitable[None]],
) -> AsyncIOScheduler:
    """The jobs, not started yet. A job that overruns is skipped, never run twice at once."""
    schedule = AsyncIOScheduler(timezone="UTC", job_defaults={"max_instances": 1, "coalesce": True})
    schedule.add_job(resync, "interval", seconds=RESYNC_S, id="resync")
    schedule.add_job(prune, "interval", seconds=PRUNE_S, id="prune")
    first = datetime.now(UTC) + timedelta(seconds=FIRST_BACK_UP_S)
    schedule.add_job(back_up, "interval", seconds=BACK_UP_S, id="back up", next_run_time=first)
    schedule.add_job(note_uses, "interval", seconds=NOTE_USES_S, id="note uses of keys")
    return schedule
