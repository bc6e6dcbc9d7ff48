"""Nobody waits for ever: age, its survival, the kept place, and the bound that docs/fairness.md states."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.core import patience
from orchestrator.core.entities import MIB, ForeignProcess, Model, Sample, Usage
from orchestrator.core.events import UnloadAsked, WaiterCame, WaiterLeft
from orchestrator.core.fold import RECLAIM_LIMIT_S, fold
from orchestrator.core.lifecycle import State
from orchestrator.core.patience import PATIENCE_S
from orchestrator.core.planner import make_plan
from orchestrator.core.snapshot import Snapshot, apply
from orchestrator.core.victims import STAY_LOADS, STAY_S
from orchestrator.core.waiting import AGE_KEPT_S, AGING_S
from tests.core.house import STEP_S, Habit, House, with_habits
from tests.core.worlds import NOW_S, entry, gpu, instance, model, world


def bound_s(models: list[Model], habits: dict[str, Habit], waiting: Model) -> float:
    """docs/fairness.md, "The longest wait", word for word."""
    rise_s = AGING_S * (1 + max(other.priority for other in models) - waiting.priority)
    longest = max(habits.values(), key=lambda habit: habit.load_s)
    stay_s = max(STAY_S, STAY_LOADS * (longest.load_s + STEP_S))
    leave_s = max(h.request_s + h.stop_s for h in habits.values()) + RECLAIM_LIMIT_S
    turn_s = PATIENCE_S + longest.load_s + stay_s + leave_s
    return rise_s + len(models) * turn_s


def crowded(count: int, big_priority: int = 50) -> House:
    """One GPU; `big` needs all of it, the others half of it each, and all are wanted all the time."""
    models = [model("big", 1000, priority=big_priority)]
    models += [model(f"small-{n}", 500) for n in range(count)]
    habits = {m.id: Habit() for m in models}
    return House([gpu(0, 1000)], with_habits(models, habits), habits)


@pytest.mark.parametrize("big_priority", [50, 45])
def test_small_ones_that_come_in_turns_cannot_keep_a_big_one_out(big_priority: int) -> None:
    house = crowded(3, big_priority)
    house.live(3600)
    for one in house.models:
        assert house.longest_wait_s[one.id] <= bound_s(house.models, house.habits, one)


def test_without_a_kept_place_they_could(monkeypatch: pytest.MonkeyPatch) -> None:
    """The house above is a hard one: this is what patience is for."""
    monkeypatch.setattr(patience, "PATIENCE_S", inf)
    house = crowded(3)
    house.live(3600)
    assert house.longest_wait_s["big"] > bound_s(house.models, house.habits, house.models[0])


class Desktop(House):
    """Another program has 0 to 20 MiB of each GPU, now here, now there."""

    def sample(self) -> Sample:
        plain = super().sample()
        turn = int(self.now_s / 3.0)
        readings = {}
        for n, (device, reading) in enumerate(plain.readings.items()):
            used = 10 * MIB * ((turn + n) % 3)
            readings[device] = replace(
                reading,
                free_bytes=reading.free_bytes - used,
                used_bytes=reading.used_bytes + used,
                foreign=(ForeignProcess(9, "desktop", used),),
            )
        return replace(plain, readings=readings)


def test_a_place_on_two_gpus_outlives_the_flicker_of_a_desktop() -> None:
    """Which two are the roomiest changes every few seconds; where newcomers are not in the way does not."""
    models = [model("big", 1900, gpu_counts=(2,), priority=48)]
    models += [model(f"small-{n}", 450) for n in range(9)]
    habits = {m.id: Habit(load_s=5.0 + 3 * (n % 4)) for n, m in enumerate(models)}
    house = Desktop([gpu(n, 1000) for n in range(3)], with_habits(models, habits), habits)
    house.live(1200)
    assert house.longest_wait_s["big"] <= bound_s(house.models, habits, house.models[0])


HABITS = st.builds(
    Habit, load_s=st.sampled_from([0.5, 3.0, 20.0]), request_s=st.sampled_from([0.5, 8.0, 40.0])
)


@st.composite
def houses(draw: st.DrawFn) -> House:
    devices = [gpu(n, 1000) for n in range(draw(st.integers(1, 3)))]
    models = [
        model(
            f"m{n}",
            draw(st.sampled_from([200, 400, 500, 600, 1000])),
            priority=draw(st.sampled_from([45, 50, 52])),
            gpu_counts=draw(st.sampled_from([(1,), (1,), (2,), (1, 2)])) if len(devices) > 1 else (1,),
        )
        for n in range(draw(st.integers(2, 6)))
    ]
    habits = {m.id: draw(HABITS) for m in models}
    return House(devices, with_habits(models, habits), habits)


@settings(max_examples=25, deadline=None)
@given(houses())
def test_every_wait_is_bounded_however_many_want_the_same_room(house: House) -> None:
    house.live(1500)
    for one in house.models:
        assert house.longest_wait_s.get(one.id, 0.0) <= bound_s(house.models, house.habits, one)


# --- the kept place, by example


def queue_of_two(waited_s: float) -> Snapshot:
    """`big` waits for a busy one that may not be asked yet; `late` would fit beside it at once."""
    models = [model("big", 900), model("busy", 500), model("late", 400)]
    busy = instance("busy", State.READY, {"GPU-0": 500}, ready_at_s=NOW_S - 1, claimed_at_s=NOW_S - 400)
    return world([gpu(0, 1000)], models, [busy], [entry("big", waited_s), entry("late")])


@pytest.mark.parametrize(("waited_s", "passes"), [(PATIENCE_S - 1, True), (PATIENCE_S, False)])
def test_others_pass_until_it_has_waited_long(waited_s: float, passes: bool) -> None:
    snapshot = queue_of_two(waited_s)
    after = apply(snapshot, make_plan(snapshot, busy_usage()))
    late = after.instance("late")
    assert late.state is (State.STARTING if passes else State.QUEUED)
    if not passes:
        assert "'big' has waited longer" in after.entries["late"].reason
        assert after.entries["big"].place_since_s == NOW_S


def test_what_stays_out_of_its_way_may_start_all_the_same() -> None:
    models = [model("big", 900), model("busy", 500), model("small", 100)]
    busy = instance("busy", State.READY, {"GPU-0": 500}, ready_at_s=NOW_S - 1, claimed_at_s=NOW_S - 400)
    snapshot = world([gpu(0, 1000)], models, [busy], [entry("big", 100), entry("small")])
    after = apply(snapshot, make_plan(snapshot, busy_usage()))
    assert after.instance("small").state is State.STARTING


def test_the_place_is_kept_on_one_device_and_the_others_are_free() -> None:
    models = [model("big", 900), model("busy", 500), model("keen", 500), model("late", 400)]
    holders = [
        instance("busy", State.READY, {"GPU-0": 500}, ready_at_s=NOW_S - 8, claimed_at_s=NOW_S - 400),
        instance("keen", State.READY, {"GPU-1": 500}, ready_at_s=NOW_S - 1, claimed_at_s=NOW_S - 400),
    ]
    snapshot = world([gpu(0, 1000), gpu(1, 1000)], models, holders, [entry("big", 100), entry("late")])
    after = apply(snapshot, make_plan(snapshot, busy_usage("busy", "keen")))
    assert after.instance("late").placement == {"GPU-1": 400 * MIB}, "GPU-0 is the first to be had"


def busy_usage(*names: str) -> dict[str, Usage]:
    return {f"{name}-1": Usage(1, 1, None) for name in names or ("busy",)}


# --- age


def after_a_wait(waited_s: float, away_s: float) -> Snapshot:
    """Somebody waited, gave up, and came back."""
    snapshot = queue_of_two(0)
    snapshot = replace(snapshot, entries={"big": entry("big", waited_s)})
    gone = fold(snapshot, [WaiterLeft("big", "r-big")], now_s=NOW_S, wall_s=0.0)
    assert "big" not in gone.entries
    back_s = NOW_S + away_s
    return fold(gone, [WaiterCame("big", "again", back_s + 60)], now_s=back_s, wall_s=0.0)


@pytest.mark.parametrize(
    ("away_s", "since_s"), [(1.0, NOW_S - 20), (AGE_KEPT_S, NOW_S - 20), (AGE_KEPT_S + 1, NOW_S + 61)]
)
def test_age_survives_a_503_for_a_minute(away_s: float, since_s: float) -> None:
    assert after_a_wait(20, away_s).entries["big"].since_s == since_s


def test_age_survives_a_refusal_that_says_not_now() -> None:
    models = [model("big", 900), model("fixed", 500, pinned=True)]
    snapshot = world(
        [gpu(0, 1000)], models, [instance("fixed", State.READY, {"GPU-0": 500})], [entry("big", 25)]
    )
    refused = apply(snapshot, make_plan(snapshot, {}))
    assert "big" not in refused.entries
    back = fold(refused, [WaiterCame("big", "again", NOW_S + 90)], now_s=NOW_S + 5, wall_s=0.0)
    assert back.entries["big"].since_s == NOW_S - 25


def test_age_ends_with_the_turn_it_waited_for() -> None:
    snapshot = replace(queue_of_two(20), entries={"big": entry("big", 20)})
    starting = instance("big", State.STARTING, {"GPU-0": 900})
    snapshot = replace(snapshot, instances={"big": starting})
    left = fold(snapshot, [WaiterLeft("big", "r-big")], now_s=NOW_S, wall_s=0.0)
    back = fold(left, [WaiterCame("big", "again", NOW_S + 60)], now_s=NOW_S + 1, wall_s=0.0)
    assert back.entries["big"].since_s == NOW_S + 1


def test_an_unload_ends_the_age_too() -> None:
    snapshot = replace(queue_of_two(0), entries={"big": entry("big", 20)})
    told = fold(snapshot, [UnloadAsked("big", "op-1")], now_s=NOW_S, wall_s=0.0)
    back = fold(told, [WaiterCame("big", "again", NOW_S + 60)], now_s=NOW_S + 1, wall_s=0.0)
    assert back.entries["big"].since_s == NOW_S + 1
