"""`orchestrator doctor`: what was found, what is wrong, and what to do about each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.api.context import Context
from orchestrator.catalogue.read import Catalogue
from orchestrator.catalogue.shared_cache import look_at_cache
from orchestrator.catalogue.yaml_lines import shown
from orchestrator.control.keyring import KeyRing
from orchestrator.control.status import device_view
from orchestrator.core.foreign import foreign_holdings
from orchestrator.core.keys import administrators
from orchestrator.core.lifecycle import AT_REST, State
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.units import age, counted
from orchestrator.core.wording import held_by
from orchestrator.settings import Settings

OK, WARNING, BAD = "ok", "warning", "bad"
TO_RESET = (
    " To reset a GPU: stop the orchestrator and what else uses it, `nvidia-smi --gpu-reset`, start it again."
)
IDLE_CARD_MIB = 64
"""A card nobody uses may show as much, without any process to tell whose it is."""

RECENT_S = 86_400.0
LOOK_S = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the diagnosis; `advice` is empty where nothing needs doing."""

    name: str
    status: str
    found: str
    advice: str = ""


async def diagnose(
    context: Context, settings: Settings, catalogue: Catalogue, unused_gpus: Callable[[], Sequence[str]]
) -> dict[str, object]:
    """`unused_gpus` may block; it names what could be managed and is not."""
    snapshot = context.loop.as_of_now()
    checks = [Check("choice", OK, line) for line in context.found]
    checks.append(await check_engine(context))
    checks += [check_device(snapshot, device) for device in snapshot.devices]
    checks += check_unused(await unless_it_hangs(unused_gpus))
    checks.append(await check_store(context, settings))
    checks.append(check_keys(context.keyring, settings))
    checks.append(await asyncio.to_thread(check_cache, settings.hub_volume))
    checks.append(check_loop(context))
    checks += [
        Check("self-check", WARNING, difference.text, "The event log (GET /log) has what led to it.")
        for difference in context.checkup.differences
    ]
    checks += check_catalogue(context, settings, catalogue)
    checks += check_models(snapshot)
    return diagnosis_view(checks, context.version)


def diagnosis_view(checks: Sequence[Check], version: str) -> dict[str, object]:
    """The answer of `doctor`, the same with and without a server."""
    return {
        "ok": all(check.status != BAD for check in checks),
        "version": version,
        "checks": [
            {"name": c.name, "status": c.status, "found": c.found, "advice": c.advice} for c in checks
        ],
    }


async def check_engine(context: Context) -> Check:
    name = f"engine {context.engine.name}"
    problem = context.engine_problem or await context.engine.health()
    if problem is None:
        return Check(name, OK, "answers")
    return Check(
        name, BAD, problem, "Running models go on serving; nothing starts or stops until it answers."
    )


def check_device(snapshot: Snapshot, device: str) -> Check:
    view = device_view(snapshot, device)
    name = f"device {snapshot.devices[device].label}"
    if "error" in view:
        advice = TO_RESET if device in snapshot.sample.broken else ""
        return Check(
            name, BAD, str(view["error"]), f"Nothing is loaded there until it is well again.{advice}"
        )
    if trouble := trouble_of(snapshot, device):
        advice = "`nvidia-smi -q` says more; a card that goes on so should be looked at."
        return Check(name, WARNING, trouble, advice)
    found = (
        f"{view['available_mib']} MiB available of {view['capacity_mib']} MiB "
        f"(reserved {view['reserved_mib']}, other programs {view['foreign_mib']}, "
        f"headroom {view['headroom_mib']})"
    )
    reading = snapshot.reading(device)
    if reading is not None and reading.foreign:
        found += f"; others: {held_by(foreign_holdings(reading.foreign, snapshot.container_names))}"
    if not view["attributed"] and int(str(view["used_mib"])) > IDLE_CARD_MIB:
        return Check(
            name,
            WARNING,
            found + "; its processes cannot be told apart",
            "Run the orchestrator with `pid: host` (or on the host), so that NVML lists processes.",
        )
    if lacking := lacking_of(snapshot, device, view):
        advice = "What runs there may fail for lack of memory. End what else uses it, or unload a model."
        return Check(name, WARNING, f"{found}; {lacking}", advice)
    return Check(name, OK, found)


async def unless_it_hangs(look: Callable[[], Sequence[str]]) -> Sequence[str]:
    """What it sees, or nothing: a driver may never answer."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(look), LOOK_S)
    except TimeoutError:
        return ()


def check_unused(gpus: Sequence[str]) -> list[Check]:
    if not gpus:
        return []
    advice = (
        "Start with `--devices nvml`: that counts for one start, `devices: nvml` in orchestrator.yaml for "
        "all. `devices: host` there says that it is meant so."
    )
    return [Check("GPUs", WARNING, f"not used: {', '.join(gpus)}; models have the RAM alone", advice)]


def lacking_of(snapshot: Snapshot, device: str, view: Mapping[str, object]) -> str:
    """By how much it is overcommitted, where that is much; empty else.

    What a model grows goes into the headroom, and while a claim waits others are just leaving.
    """
    lacking_mib, headroom_mib = int(str(view["overcommitted_mib"])), int(str(view["headroom_mib"]))
    instances = snapshot.instances.values()
    if lacking_mib <= max(IDLE_CARD_MIB, headroom_mib // 2):
        return ""
    if any(i.state is State.CLAIMED and device in i.placement for i in instances):
        return ""
    return (
        f"overcommitted by {lacking_mib} MiB: so much less is free than the headroom and the "
        f"{view['kept_back_mib']} MiB that models were promised and have not taken"
    )


def trouble_of(snapshot: Snapshot, device: str) -> str:
    """What the GPU has reported of itself within a day, newest first; empty if nothing."""
    since = snapshot.wall_s - RECENT_S
    reported = [r for r in snapshot.incidents if r.incident.device == device and r.at > since]
    parts = [f"{age(snapshot.wall_s - each.at)} ago: {each.incident.text}" for each in reversed(reported)]
    told = snapshot.sample.telemetry.get(device)
    if told is not None and told.ecc_uncorrected:
        parts.append(f"{told.ecc_uncorrected} uncorrected memory errors since the driver was loaded")
    if told is not None and told.throttled_by:
        parts.append(f"slowed down now: {', '.join(told.throttled_by)}")
    return "; ".join(parts)


async def check_store(context: Context, settings: Settings) -> Check:
    problem = context.loop.store_problem or await context.store.health()
    if problem is None:
        return Check("store", OK, str(settings.database))
    advice = "Ready models go on serving; nothing starts or stops until it works, and nothing was half done."
    return Check("store", BAD, problem, advice)


def check_keys(ring: KeyRing, settings: Settings) -> Check:
    """Who may call, in one line."""
    keys = ring.known()
    if keys:
        trusted = ", ".join(map(str, settings.trusted_networks))
        found = f"{len(keys)}; every call needs one" + (f", except from {trusted}" if trusted else "")
        if administrators(keys, time.time()):
            return Check("keys", OK, found)
        advice = "Stop the server, then `orchestrator key create NAME --scope admin`."
        return Check("keys", WARNING, f"{found}; none that is valid has the scope admin", advice)
    if ring.is_required:
        advice = "A restart makes one, and so does `orchestrator key create` while the server is stopped."
        return Check("keys", WARNING, "none, and every call needs one", advice)
    if settings.is_reachable:
        advice = "`orchestrator key create me --scope admin`; from then on every call needs a key."
        return Check("keys", WARNING, "none: whoever can reach this server may do everything", advice)
    return Check("keys", OK, "none; only this machine can reach the server")


def check_cache(volume: str | None) -> Check:
    """The Hugging Face cache: models are looked for there, and downloads go there."""
    report = look_at_cache(volume)
    return Check("models' cache", WARNING if report.advice else OK, report.found, report.advice)


def check_loop(context: Context) -> Check:
    """Late means that requests wait for the orchestrator itself."""
    vitals = context.loop.vitals
    if vitals.late is not None:
        advice = "Look for a slow disk or a busy CPU; the event log says when it ended."
        return Check("loop", WARNING, f"late: {vitals.late}", advice)
    turn_ms, lag_ms = vitals.turn_s.largest() * 1e3, vitals.lag_s.largest() * 1e3
    return Check(
        "loop", OK, f"turns within {turn_ms:.0f} ms, late by at most {lag_ms:.0f} ms in the last minute"
    )


def catalogue_found(settings: Settings, catalogue: Catalogue) -> str:
    """How much there is, and where it stands."""
    origins = [
        shown(settings.models) if settings.models in catalogue.read_from else "no models.yaml: the demos"
    ]
    if settings.models_dir is not None:
        origins.append(shown(settings.models_dir))
    models, services = counted(len(catalogue.models), "model"), counted(len(catalogue.services), "service")
    return f"{models}, {services} ({', '.join(origins)})"


def check_catalogue(context: Context, settings: Settings, catalogue: Catalogue) -> list[Check]:
    checks = [Check("catalogue", OK, catalogue_found(settings, catalogue))]
    if context.catalogue_problem is not None:
        advice = "The catalogue before it stays in force. Mend the file, then GET /models?reload=1."
        checks.append(Check("catalogue, last reload", BAD, context.catalogue_problem, advice))
    advice = "Other models are not affected. Mend it, then GET /models?reload=1."
    return checks + [Check("catalogue", WARNING, problem, advice) for problem in catalogue.problems]


def check_models(snapshot: Snapshot) -> list[Check]:
    checks = []
    for instance in snapshot.instances.values():
        if instance.failure is not None:
            last = f"`orchestrator logs {instance.model}` shows what it said last."
            advice = last if instance.failure.has_log else ""
            checks.append(Check(f"model {instance.model}", WARNING, instance.failure.message, advice))
        elif instance.state not in AT_REST:
            checks.append(Check(f"model {instance.model}", OK, instance.state.value))
    return checks
