"""The loop's vital signs, and the watchdog that says when it is late and why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from orchestrator.control.vitals import Recent, Vitals
from orchestrator.control.watchdog import Watchdog
from orchestrator.core.entities import Note
from tests.control.world import ManualClock, model, running


def test_recent_values_are_forgotten_after_two_windows() -> None:
    clock = ManualClock()
    recent = Recent(clock)
    recent.add(5.0)
    recent.add(1.0)
    assert (recent.largest(), recent.mean(), recent.last) == (5.0, 3.0, 1.0)
    clock.now_s += 70
    recent.add(2.0)
    assert recent.largest() == 5.0, "of the window before"
    clock.now_s += 70
    assert recent.largest() == 2.0
    clock.now_s += 200
    assert (recent.largest(), recent.mean()) == (0.0, 0.0)


def test_a_turn_is_timed_and_its_phase_known() -> None:
    clock = ManualClock()
    vitals = Vitals(clock)
    vitals.turn_begins(3)
    clock.now_s += 0.5
    vitals.enter("saving")
    clock.now_s += 2.0
    assert (vitals.phase, vitals.busy_s()) == ("saving", 2.5)
    vitals.saved()
    vitals.turn_ends()
    assert (vitals.turns, vitals.turn_s.last, vitals.save_s.last, vitals.busy_s()) == (1, 2.5, 2.0, 0.0)
    assert vitals.inbox.largest() == 3


async def test_the_state_shows_how_the_loop_is_doing() -> None:
    async with running(model("a", 600)) as world:
        await world.ready("a")
        shown = world.loop.view()["loop"]
    assert isinstance(shown, dict)
    assert shown["turns"] > 3
    assert shown["inbox_max"] >= 1
    assert shown["late"] is None
    assert shown["tasks"] >= 2
    assert {"last", "mean", "max"} == shown["turn_ms"].keys() == shown["save_ms"].keys()


async def noted(notes: list[Note], until: Callable[[], object]) -> str:
    async with asyncio.timeout(10):
        while not until():  # noqa: ASYNC110 (the watchdog is a thread)
            await asyncio.sleep(0.02)
    return notes[0].text


def keep_the_thread_busy(until: Callable[[], object]) -> None:
    """Until it was noticed, by a thread that has to wait for its turn as well."""
    end_s = time.monotonic() + 20
    while not until() and time.monotonic() < end_s:
        time.sleep(0.05)


async def test_a_blocked_event_loop_is_named_with_its_culprit() -> None:
    notes: list[Note] = []
    vitals = Vitals(time.monotonic)
    watchdog = asyncio.create_task(Watchdog(vitals, notes.append, time.monotonic, late_s=0.1).run())
    await asyncio.sleep(0)
    keep_the_thread_busy(until=lambda: vitals.late)
    assert "keep_the_thread_busy" in (vitals.late or ""), "said while it still was"
    text = await noted(notes, lambda: notes)
    watchdog.cancel()
    assert "keep_the_thread_busy" in text
    assert vitals.late is None
    assert vitals.lag_s.largest() > 0.05


async def test_a_turn_that_waits_for_the_store_is_late() -> None:
    notes: list[Note] = []
    vitals = Vitals(time.monotonic)
    watchdog = asyncio.create_task(Watchdog(vitals, notes.append, time.monotonic, late_s=0.1).run())
    vitals.turn_begins(1)
    vitals.enter("saving")
    async with asyncio.timeout(10):
        while vitals.late is None:  # noqa: ASYNC110 (the watchdog is a thread)
            await asyncio.sleep(0.02)
    assert vitals.late.startswith("a turn has been saving for")
    vitals.turn_ends()
    assert "saving" in await noted(notes, lambda: notes)
    watchdog.cancel()


@pytest.mark.parametrize("busy_s", [0.0, 0.05])
async def test_in_time_is_not_late(busy_s: float) -> None:
    clock = ManualClock()
    vitals = Vitals(clock)
    watchdog = Watchdog(vitals, lambda note: pytest.fail(note.text), clock, late_s=0.1)
    vitals.turn_begins(1)
    clock.now_s += busy_s
    watchdog.look()
    assert vitals.late is None
