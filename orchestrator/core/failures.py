"""What a failure was, and when the next try is due."""

from __future__ import annotations

from dataclasses import replace

from orchestrator.core.entities import Failure
from orchestrator.core.events import Ended
from orchestrator.core.lifecycle import Instance

FIRST_RETRY_S = 1.0
LAST_RETRY_S = 300.0
READY_RESETS_S = 60.0

GPU_OUT_OF_MEMORY = "gpu_out_of_memory"
LAST_WORDS = ("out of memory", "failed to allocate")
"""How llama-server, torch and CUDA say that a GPU had no room, in lower case. No exit code says it."""


def failure_of(event: Ended) -> Failure:
    code = GPU_OUT_OF_MEMORY if is_gpu_out_of_memory(event) else event.code
    if event.message:
        message = event.message
    elif event.oom:
        message = "it ran out of memory and was killed by the kernel"
    elif event.exit_code is None:
        message = "it ended, and nobody could see its exit code"
    elif code == GPU_OUT_OF_MEMORY:
        message = f"the GPU had too little memory for it: it exited with code {event.exit_code}"
    else:
        message = f"it exited with code {event.exit_code}"
    return Failure(message, code, event.exit_code, event.oom, event.log_tail)


def is_gpu_out_of_memory(event: Ended) -> bool:
    if not event.exit_code or event.oom:
        return False
    tail = "\n".join(event.log_tail).lower()
    return any(words in tail for words in LAST_WORDS)


def with_failure(instance: Instance, failure: Failure, now_s: float) -> Instance:
    """Count the failure and say when the next try is due: 1 s, doubling to 5 min."""
    was_steady = instance.ready_at_s is not None and now_s - instance.ready_at_s >= READY_RESETS_S
    failures = 1 if was_steady else instance.failures + 1
    delay_s = min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(failures - 1, 20))
    return replace(instance, failure=failure, failures=failures, retry_at_s=now_s + delay_s, is_failing=True)
