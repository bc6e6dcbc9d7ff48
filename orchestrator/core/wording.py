"""Verdicts as sentences: `error.message` alone must tell a chat user what happened and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import assert_never

from orchestrator.core.entities import MIB, Failure
from orchestrator.core.units import size_text
from orchestrator.core.verdicts import (
    Broken,
    Downloading,
    Holding,
    Lacking,
    QueueFull,
    Ready,
    Refused,
    Unloaded,
    Unmeasured,
    Unusable,
    Verdict,
)

MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Told:
    """A verdict for a person (`message`), for machines (`code`, `details`) and for retries.

    `status` is the HTTP status it has on every path; `retry_after_s` is None where a retry is useless.
    """

    message: str
    code: str
    status: int
    retry_after_s: float | None = None
    details: dict[str, object] = field(default_factory=dict)


def mib(size_bytes: int) -> str:
    return f"{round(size_bytes / MIB)} MiB"


def explain(verdict: Verdict, now_s: float) -> Told:
    match verdict:
        case Ready():
            return Told(f"'{verdict.model}' is ready.", "ready", 200)
        case Refused():
            return _refused(verdict)
        case Unmeasured():
            return _unmeasured(verdict)
        case Unloaded():
            return _unloaded(verdict, now_s)
        case Broken():
            return _broken(verdict, now_s)
        case Unusable():
            return Told(
                f"'{verdict.model}' cannot be loaded: {verdict.problem}",
                "model_unusable",
                409,
                details={"model": verdict.model},
            )
        case Downloading():
            done, total = size_text(verdict.done_bytes), size_text(verdict.total_bytes)
            return Told(
                f"'{verdict.model}' is still being downloaded: {done} of {total} are here.",
                "model_downloading",
                503,
                retry_after_s=60,
                details={"done_bytes": verdict.done_bytes, "total_bytes": verdict.total_bytes},
            )
        case QueueFull():
            return Told(
                f"{verdict.limit} requests already wait for '{verdict.model}'; try again in a moment.",
                "queue_full",
                503,
                retry_after_s=5,
                details={"queue_limit": verdict.limit},
            )
        case _:
            assert_never(verdict)


def _unmeasured(verdict: Unmeasured) -> Told:
    alike: dict[str, list[str]] = {}
    for device, why in verdict.errors.items():
        alike.setdefault(why.rstrip("."), []).append(verdict.labels.get(device, device))
    errors = "; ".join(f"{', '.join(devices)}: {why}" for why, devices in alike.items())
    return Told(
        f"'{verdict.model}' cannot be loaded while the memory of the devices is unknown ({errors}). "
        "Models that run go on serving. `orchestrator doctor` says more.",
        "device_unknown",
        503,
        retry_after_s=5,
        details={"devices": dict(verdict.errors)},
    )


def _refused(verdict: Refused) -> Told:
    numbers = {
        "device": verdict.device,
        "gpus": verdict.gpus,
        "needed_mib": round(verdict.needed_bytes / MIB),
        "available_mib": round(verdict.available_bytes / MIB),
        "capacity_mib": round(verdict.capacity_bytes / MIB),
        "parameters": dict(verdict.parameters),
        "holders": [
            {"holder": h.holder, "held_mib": round(h.held_bytes / MIB), "why_kept": h.why_kept}
            for h in verdict.holders
        ],
    }
    if verdict.lacking is not None:
        return Told(_lacking(verdict.model, verdict.lacking), "cannot_ever_fit", 409, details=numbers)
    where = "RAM (host)" if verdict.device == "host" else verdict.device_label or verdict.device
    if verdict.forever:
        return Told(
            f"'{verdict.model}' needs {_needed(verdict)}, but {where} can give at most "
            f"{mib(verdict.capacity_bytes)} even when empty. Nothing was unloaded. {_advice(verdict)}",
            "cannot_ever_fit",
            409,
            details=numbers,
        )
    kept = held_by(verdict.holders) or "nobody we know"
    return Told(
        f"'{verdict.model}' needs {_needed(verdict)}, but only {mib(verdict.available_bytes)} of "
        f"{where} can be made available now; the rest is held by {kept}. "
        "Nothing was unloaded. Free some of it and try again.",
        "no_room_now",
        503,
        retry_after_s=30,
        details=numbers,
    )


def _needed(verdict: Refused) -> str:
    """What it needs where it lacks most, and with what; over several GPUs all of it beside that."""
    chosen = " and ".join(f"{name} {value}" for name, value in verdict.parameters.items())
    run_so = f" with {chosen}" if chosen else ""
    if verdict.gpus == 1 or verdict.device == "host":
        return f"{mib(verdict.needed_bytes)}{run_so}"
    each = f"{mib(verdict.needed_bytes)} on each"
    return f"{mib(verdict.gpus_bytes)}{run_so} over {verdict.gpus} GPUs, {each}"


def _lacking(model: str, lacking: Lacking) -> str:
    present = lacking.present
    if not lacking.unknown:
        there = f"is only {len(present)}" if len(present) == 1 else f"are only {len(present)}"
        names = ", ".join(gpu.label for gpu in present)
        return (
            f"'{model}' is to be split over {lacking.count} GPUs, and there {there} here: {names}. "
            f"Nothing was unloaded. Let its entry say `gpus: {len(present)}` or `gpus: auto`."
        )
    unknown = " and ".join(lacking.unknown)
    those = "that UUID" if len(lacking.unknown) == 1 else "those UUIDs"
    uuids = ", ".join(f"{gpu.label} is {gpu.id}" for gpu in present) or "There is none"
    return (
        f"'{model}' asks for {unknown}, and no GPU here has {those}. {uuids}. "
        "Nothing was unloaded. Correct `gpus` in its entry."
    )


def _advice(verdict: Refused) -> str:
    """Only what could help with this model."""
    less = ["a smaller model"]
    if "context_size" in verdict.tunable:
        less.append("a smaller context_size")
    if "n_gpu_layers" in verdict.tunable and verdict.device != "host":
        less.append("fewer n_gpu_layers")
    advice = [f"take {_either(less)}"]
    if verdict.device == "host":
        advice.insert(0, "raise host_memory_mib in orchestrator.yaml")
    elif verdict.can_spread:
        advice.append("allow more `gpus`")
    if verdict.source == "declared":
        advice.append("correct the `memory` that its entry declares")
    text = ", or ".join([", ".join(advice[:-1]), advice[-1]]) if len(advice) > 1 else advice[0]
    return f"{text[0].upper()}{text[1:]}."


def _either(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} or {parts[-1]}" if len(parts) > 1 else parts[0]


def held_by(holders: Sequence[Holding]) -> str:
    """Who holds how much, in the order given; the last of many only as a sum."""
    named = [f"{h.holder} {mib(h.held_bytes)} ({h.why_kept})" for h in holders[:MOST_NAMED]]
    if rest := holders[MOST_NAMED:]:
        named.append(f"{len(rest)} more {mib(sum(h.held_bytes for h in rest))}")
    return ", ".join(named)


def _unloaded(verdict: Unloaded, now_s: float) -> Told:
    if verdict.held_until_s is not None and verdict.held_until_s > now_s:
        left_s = verdict.held_until_s - now_s
        return Told(
            f"'{verdict.model}' was unloaded and is kept out for another {left_s:.0f} s; "
            "POST /models/load ends that.",
            "model_held",
            503,
            retry_after_s=left_s,
            details={"held_for_s": round(left_s)},
        )
    return Told(
        f"'{verdict.model}' was unloaded while this waited for it; ask again to load it.",
        "model_unloaded",
        503,
        retry_after_s=1,
    )


def _broken(verdict: Broken, now_s: float) -> Told:
    failure = verdict.failure
    retry_after_s = None
    then = ""
    if verdict.retry_at_s is not None:
        retry_after_s = max(1.0, verdict.retry_at_s - now_s)
        then = f" The next try is due in {retry_after_s:.0f} s; POST /models/load tries at once."
    more = f" `orchestrator logs {verdict.model}` has more." if failure.has_log else ""
    return Told(
        f"'{verdict.model}' failed: {describe(failure)}{then}{more}",
        failure.code,
        503,
        retry_after_s=retry_after_s,
        details={
            "exit_code": failure.exit_code,
            "oom": failure.oom,
            "log_tail": list(failure.log_tail),
        },
    )


def describe(failure: Failure) -> str:
    """The failure in a sentence or two, with the last line that its log has to say."""
    text = failure.message.rstrip(".") + "."
    last = next((line.strip() for line in reversed(failure.log_tail) if line.strip()), "")
    return f"{text} Its last words: “{last[:300]}”." if last and last not in text else text
