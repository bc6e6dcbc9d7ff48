"""What ends: waits without a waiter, starts that take too long, idle models, drains, overdue stops."""

from __future__ import annotations

from orchestrator.core.draft import Draft
from orchestrator.core.entities import LOADING, NOBODY_LISTENS, AttemptId, Failure, Stop
from orchestrator.core.failures import with_failure
from orchestrator.core.fold import finish
from orchestrator.core.lifecycle import Instance, Signal, State
from orchestrator.core.placement import is_placement_of
from orchestrator.core.verdicts import Broken, Ready

DRAIN_LIMIT_S = 600.0
"""How long requests may go on that use a model which has left the catalogue."""

OVERDUE_S = 10.0
"""A stop that takes this long beyond its grace is stuck: it survived the kill."""


def end_if_due(draft: Draft, instance: Instance) -> None:
    match instance.state:
        case State.QUEUED:
            cancel_if_unwanted(draft, instance)
        case State.CLAIMED:
            withdraw_if_unwanted(draft, instance)
        case State.STARTING:
            stop_if_unwanted_or_late(draft, instance)
        case State.READY:
            end_if_unwanted_or_idle(draft, instance)
        case State.DRAINING:
            end_drain(draft, instance)
        case State.STOPPING:
            call_stuck_if_overdue(draft, instance)
        case _:
            pass


def cancel_if_unwanted(draft: Draft, instance: Instance) -> None:
    """Nobody waits any more: as it was before."""
    if instance.model not in draft.entries:
        draft.move(instance, Signal.CANCEL_FAILED if instance.failure else Signal.CANCEL)


def withdraw_if_unwanted(draft: Draft, instance: Instance) -> None:
    if not instance.unload_wanted:
        replan_if_changed(draft, instance)
        return
    draft.note("withdrawn", f"'{instance.model}' was unloaded before it started", instance)
    call_back(draft, instance)
    finish_unloads(draft, instance)
    draft.move(
        instance, Signal.WITHDRAW, placement={}, parameters={}, unload_wanted=False, unloads=(), force=False
    )


def replan_if_changed(draft: Draft, claim: Instance) -> None:
    """The catalogue was read again, or a load has shown more: what it was promised is not what it needs."""
    model = draft.model(claim.model)
    if model is None or model.problem or not is_placement_of(draft, model, claim):
        draft.note("replanned", f"what '{claim.model}' needs has changed; planning again", claim)
        replan(draft, claim)


def call_back(draft: Draft, claim: Instance) -> None:
    """Its start may have been ordered by an earlier server: the engine is not to complete that any more."""
    if claim.started_at_s and claim.attempt is not None:
        grace_s = stop_grace_s(draft, claim)
        draft.act(Stop(claim.attempt, claim.model, grace_s, "its start was given up"))


def stop_grace_s(draft: Draft, instance: Instance) -> float:
    model = draft.model(instance.model)
    return model.stop_grace_s if model else 10.0


def finish_unloads(draft: Draft, instance: Instance) -> None:
    for key in instance.unloads:
        operation = draft.snapshot.operations.get(key)
        if operation is not None:
            message = f"'{instance.model}' was unloaded before it started."
            draft.operations[key] = finish(draft.snapshot, operation, message)


def stop_if_unwanted_or_late(draft: Draft, instance: Instance) -> None:
    model = draft.model(instance.model)
    if instance.unload_wanted or model is None:
        stop(draft, instance, "unloaded while it was starting")
        return
    if instance.port is None:
        return  # the engine has not started it yet: pulling its image, or not answering
    late_at_s = instance.since_s + model.start_timeout_s
    if draft.now_s < late_at_s:
        draft.wake(late_at_s)
        return
    failure = Failure(
        f"it did not become healthy within {model.start_timeout_s:.0f} s ({model.launch.health_path} on port "
        f"{instance.port} never answered 2xx; at last: {last_answer(draft, instance)})",
        "start_timeout",
    )
    stop(draft, instance, "start took too long", failure)


def last_answer(draft: Draft, instance: Instance) -> str:
    told = draft.snapshot.progress.get(instance.attempt or "")
    return told.detail if told is not None and told.stage == LOADING else NOBODY_LISTENS


def end_if_unwanted_or_idle(draft: Draft, instance: Instance) -> None:
    model = draft.model(instance.model)
    if instance.unload_wanted or model is None:
        leave(draft, instance, "unloaded by request" if model else "no longer in the catalogue")
        return
    if model.idle_after_s is None or draft.snapshot.is_pinned(instance.model):
        return
    expires_at_s = draft.last_used_s(instance) + model.idle_after_s
    if draft.in_flight(instance):
        return
    if draft.now_s < expires_at_s or not draft.is_idle(instance):
        draft.wake(max(expires_at_s, draft.quiet_at_s(instance)))
        return
    leave(draft, instance, f"idle for {model.idle_after_s:.0f} s")


def end_drain(draft: Draft, instance: Instance) -> None:
    """A drain ends when it is quiet, forced, too long, or when the claim it makes room for is gone."""
    claim = instance.drained_for
    if claim is not None and not is_claimed(draft, claim):
        stays = draft.move(instance, Signal.RELENT, drained_for=None, stop_reason=None)
        draft.note("relented", f"'{instance.model}' stays: its room is no longer needed", stays)
        let_in_who_came(draft, stays)
        return
    model = draft.model(instance.model)
    limit_at_s = instance.since_s + (model.drain_limit_s if model else DRAIN_LIMIT_S)
    if draft.in_flight(instance) and not instance.force and draft.now_s < limit_at_s:
        draft.wake(limit_at_s)
        return
    stop(draft, instance, instance.stop_reason or "drained")


def let_in_who_came(draft: Draft, instance: Instance) -> None:
    """Whoever asked for it while it drained waited for its next attempt; this one serves on instead."""
    entry = draft.entries.get(instance.model)
    if entry is not None and instance.attempt is not None:
        draft.answer(entry, Ready(instance.model, instance.attempt))


def is_claimed(draft: Draft, attempt: AttemptId) -> bool:
    return any(i.attempt == attempt and i.state is State.CLAIMED for i in draft.instances.values())


def call_stuck_if_overdue(draft: Draft, instance: Instance) -> None:
    overdue_at_s = instance.since_s + stop_grace_s(draft, instance) + OVERDUE_S
    if draft.now_s < overdue_at_s:
        draft.wake(overdue_at_s)
        return
    draft.move(instance, Signal.OVERDUE)
    text = f"'{instance.model}' is not seen to end (it survived the kill, or the engine does not answer)"
    draft.note("stuck", f"{text}; its memory stays reserved", instance)


def leave(draft: Draft, instance: Instance, reason: str, claim: AttemptId | None = None) -> None:
    """Let it finish what it has; stop it at once if that is nothing."""
    if draft.in_flight(instance) and not instance.force:
        count = draft.in_flight(instance)
        what = "1 request" if count == 1 else f"{count} requests"
        draft.note("draining", f"'{instance.model}' finishes {what}, then leaves: {reason}", instance)
        draft.move(instance, Signal.DRAIN, drained_for=claim, stop_reason=reason)
        model = draft.model(instance.model)
        draft.wake(draft.now_s + (model.drain_limit_s if model else DRAIN_LIMIT_S))
    else:
        stop(draft, instance, reason)


def stop(draft: Draft, instance: Instance, reason: str, failure: Failure | None = None) -> None:
    """Order the stop. A wanted one clears what failed before; a failure is counted like any other."""
    grace_s = stop_grace_s(draft, instance)
    if failure is not None:
        instance = with_failure(instance, failure, draft.now_s)
        give_up(draft, instance, failure)
        stopped = draft.move(instance, Signal.STOP, stop_reason=reason)
    else:
        stopped = draft.move(
            instance, Signal.STOP, stop_reason=reason, failure=None, failures=0, retry_at_s=None
        )
    draft.wake(draft.now_s + grace_s + OVERDUE_S)
    draft.note("stopping", f"'{instance.model}' stops: {reason}", stopped)
    draft.act(Stop(stopped.attempt or "", stopped.model, grace_s, reason))


def give_up(draft: Draft, instance: Instance, failure: Failure) -> None:
    """Whoever waited for this start learns why it failed."""
    entry = draft.entries.get(instance.model)
    if entry is not None:
        draft.answer(entry, Broken(instance.model, failure, instance.retry_at_s))


def replan(draft: Draft, claim: Instance) -> None:
    """Back to the queue. Whoever drained for it stays, or drains for the claim it gets next."""
    call_back(draft, claim)
    draft.move(claim, Signal.REPLAN, placement={}, parameters={}, attempt=None)
    for drained in [i for i in draft.instances.values() if i.state is State.DRAINING]:
        if drained.drained_for == claim.attempt:
            end_drain(draft, drained)
