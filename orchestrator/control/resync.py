"""Every so often everything is looked at again, because events are only hints. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.control.effects import ended
from orchestrator.control.ports import Exit, Found
from orchestrator.control.recovery import ORPHAN_GRACE_S
from orchestrator.core.entities import AttemptId, ModelId, Stop
from orchestrator.core.events import Ended
from orchestrator.core.lifecycle import MAY_BE_ADOPTED, MAY_HAVE_PROCESS, Instance, State
from orchestrator.core.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Corrections:
    """`events` are exits nobody told us; `orphans` ours that nobody knows, `lent` others' we may take."""

    events: tuple[Ended, ...]
    orphans: tuple[Stop, ...]
    lent: tuple[Found, ...] = ()


def corrections(before: Snapshot, found: Iterable[Found], after: Snapshot) -> Corrections:
    """Compare what the engine listed with what we knew before and after it was asked.

    Only what both agree on counts: what changed meanwhile is on its way already.
    """
    known = {item.attempt: item for item in found}
    events = []
    for instance in after.instances.values():
        attempt = instance.attempt
        if attempt is None or before.instances.get(instance.model) is not instance:
            continue
        if instance.state not in (State.READY, State.DRAINING) and not has_come_up(instance):
            continue
        place = known.get(attempt)
        if place is None:
            events.append(ended(instance.model, attempt, Exit(None)))
        elif place.exit is not None:
            events.append(ended(instance.model, attempt, place.exit))
    current = attempts_of(before) | attempts_of(after)
    unknown = [item for item in known.values() if item.attempt not in current]
    orphans = tuple(
        Stop(item.attempt, item.model, ORPHAN_GRACE_S, "nobody knows this attempt")
        for item in unknown
        if (item.is_running or not item.has_run) and not item.is_lent
    )
    lent = (item for item in unknown if item.is_lent and item.is_running)
    free = tuple(item for item in lent if may_be_adopted(after, item.model))
    return Corrections(tuple(events), orphans, free)


def may_be_adopted(snapshot: Snapshot, model: ModelId) -> bool:
    """Nothing of the model is there, and no user holds it out."""
    is_held = snapshot.holds.get(model, snapshot.now_s) > snapshot.now_s
    return snapshot.instance(model).state in MAY_BE_ADOPTED and not is_held


def has_come_up(instance: Instance) -> bool:
    """It starts, and the engine has said where it answers: from now on it can be missing."""
    return instance.state is State.STARTING and instance.port is not None


def attempts_of(snapshot: Snapshot) -> set[AttemptId]:
    return {i.attempt for i in snapshot.instances.values() if i.attempt and i.state in MAY_HAVE_PROCESS}
