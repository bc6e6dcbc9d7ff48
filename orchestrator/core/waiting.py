"""The age of a wait: how it raises a priority, and how it outlives an answer that only said "not now"."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.core.entities import Age, Entry, Model, ModelId
from orchestrator.core.lifecycle import Instance, State

AGING_S = 10.0
"""For each of these that somebody waits, the priority rises by one."""

AGE_KEPT_S = 60.0
"""Who comes back within this time after a 503 is as old as before."""

HAD_ITS_TURN = frozenset({State.STARTING, State.READY})


def effective_priority(model: Model, entry: Entry, now_s: float) -> int:
    return model.priority + int((now_s - entry.since_s) / AGING_S)


def new_entry(model: ModelId, ages: Mapping[ModelId, Age], now_s: float) -> Entry:
    """A place in the queue: a new one, or the one that was given up a moment ago."""
    age = ages.get(model)
    if age is None or now_s > age.kept_until_s:
        return Entry(model, since_s=now_s, waiters=())
    return Entry(model, since_s=age.since_s, waiters=(), place_since_s=age.place_since_s)


def with_age_kept(
    ages: Mapping[ModelId, Age], entry: Entry, instance: Instance, now_s: float
) -> Mapping[ModelId, Age]:
    """Remember the age of an entry that ends unserved; one whose start is under way has had its turn."""
    if instance.state in HAD_ITS_TURN:
        return ages
    return {**ages, entry.model: Age(entry.since_s, now_s + AGE_KEPT_S, entry.place_since_s)}


def still_kept(ages: Mapping[ModelId, Age], now_s: float) -> Mapping[ModelId, Age]:
    if all(age.kept_until_s >= now_s for age in ages.values()):
        return ages
    return {model: age for model, age in ages.items() if age.kept_until_s >= now_s}
