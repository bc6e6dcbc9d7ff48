"""What is lost with a GPU, or with its CUDA context: it is ended, and counted as failed like any other.

Its process may live on and answer that it is well, and fail every request.
"""

from __future__ import annotations

from orchestrator.core.draft import Draft
from orchestrator.core.endings import stop
from orchestrator.core.entities import Failure
from orchestrator.core.lifecycle import Instance, State

BROKEN_S = 10.0
"""How long a GPU must have been seen to be broken: drivers have hiccups."""

FAULT_S = 5.0
"""How long a program has to end by itself after its fault: then its own last words say why."""

GPU_BROKEN, GPU_FAULT = "gpu_broken", "gpu_fault"


def end_if_lost(draft: Draft, instance: Instance) -> bool:
    """Stop it if it can never answer again; whether it was stopped."""
    if instance.state not in (State.STARTING, State.READY, State.DRAINING):
        return False
    return end_with_its_gpu(draft, instance) or end_with_its_context(draft, instance)


def end_with_its_gpu(draft: Draft, instance: Instance) -> bool:
    since_s = draft.snapshot.broken_since_s
    broken = [device for device in instance.placement if device in since_s]
    if not broken:
        return False
    first = min(broken, key=lambda device: since_s[device])
    due_s = since_s[first] + BROKEN_S
    if draft.snapshot.sample.taken_at_s < due_s:  # what was seen once may be over; each sample is a turn
        return False
    why = draft.snapshot.sample.errors.get(first, "it is broken")
    end(draft, instance, "its GPU is broken", Failure(f"its GPU is broken: {why}", GPU_BROKEN))
    return True


def end_with_its_context(draft: Draft, instance: Instance) -> bool:
    fault = draft.snapshot.faults.get(instance.attempt or "")
    if fault is None:
        return False
    if draft.now_s < fault.at_s + FAULT_S:
        draft.wake(fault.at_s + FAULT_S)
        return False
    message = f"its GPU reported {fault.text}, after which it cannot compute any more"
    end(draft, instance, "its CUDA context is lost", Failure(message, GPU_FAULT))
    return True


def end(draft: Draft, instance: Instance, reason: str, failure: Failure) -> None:
    """What was to go anyway has not failed."""
    stop(draft, instance, reason, None if instance.unload_wanted else failure)
