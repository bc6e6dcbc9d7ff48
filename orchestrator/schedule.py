"""Housekeeping by the clock: retention, and a look at everything again. What people schedule comes later."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from apscheduler.schedulers.asyncio import AsyncIOScheduler

RESYNC_S = 30
PRUNE_S = 3600


def new_schedule(
    resync: Callable[[], Awaitable[None]], prune: Callable[[], Awaitable[None]]
) -> AsyncIOScheduler:
    """The jobs, not started yet. A job that overruns is skipped, never run twice at once."""
    schedule = AsyncIOScheduler(timezone="UTC", job_defaults={"max_instances": 1, "coalesce": True})
    schedule.add_job(resync, "interval", seconds=RESYNC_S, id="resync")
    schedule.add_job(prune, "interval", seconds=PRUNE_S, id="prune")
    return schedule
