"""How a model looks from outside: llama.cpp's status words, and our own fuller view. Pure reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from orchestrator.core.entities import (
    HOST,
    LOADING,
    MIB,
    AttemptId,
    Demand,
    DeviceId,
    DeviceKind,
    DownloadState,
    ForeignProcess,
    Model,
    ModelId,
    Operation,
    OperationKind,
    Usage,
)
from orchestrator.core.health import Telemetry
from orchestrator.core.ledger import available_bytes, kept_back, measured_use
from orchestrator.core.lifecycle import AT_REST, HAS_PROCESS, Instance, State
from orchestrator.core.snapshot import Snapshot

NO_USAGE: Mapping[AttemptId, Usage] = {}


def status_of(snapshot: Snapshot, model: ModelId) -> dict[str, object]:
    """llama.cpp's `status`: `value`, and `failed` with `exit_code` where the last attempt failed.

    It follows the newest attempt: somebody who waits makes it `loading`, also while an older attempt
    still leaves.
    """
    instance = snapshot.instance(model)
    if is_downloading(snapshot, model) and instance.state in AT_REST and model not in snapshot.entries:
        return {"value": "downloading", "progress": download_progress(snapshot, model)}
    if model in snapshot.entries or instance.state in (State.QUEUED, State.CLAIMED, State.STARTING):
        return {"value": "loading", **progress_of(snapshot, instance)}
    if instance.state is State.FAILED or instance.is_failing:
        code = instance.failure.exit_code if instance.failure else None
        return {"value": "unloaded", "failed": True, "exit_code": code or 1}
    if instance.state is State.STOPPED:
        return {"value": "unloaded", "exit_code": 0} if instance.attempt else {"value": "unloaded"}
    return {"value": "loaded" if instance.ready_at_s is not None else "loading"}


def progress_of(snapshot: Snapshot, instance: Instance) -> dict[str, object]:
    """`progress` of a start: an image pull by its bytes, else the memory taken of what was reserved."""
    if instance.state is not State.STARTING or instance.attempt is None:
        return {}
    told = snapshot.progress.get(instance.attempt)
    if told is not None and told.value is not None:
        return {"progress": {"stage": told.stage, "value": round(told.value, 3)}}
    taken = sum(used_bytes(snapshot, instance, device) or 0 for device in instance.placement)
    share = min(0.99, taken / max(1, sum(instance.placement.values())))
    return {"progress": {"stage": told.stage if told else LOADING, "value": round(share, 3)}}


def is_downloading(snapshot: Snapshot, model: ModelId) -> bool:
    download = snapshot.downloads.get(model)
    return download is not None and download.state is DownloadState.RUNNING


def download_progress(snapshot: Snapshot, model: ModelId) -> dict[str, object]:
    total_bytes = snapshot.downloads[model].total_bytes
    done_bytes = min(snapshot.downloaded_bytes.get(model, 0), total_bytes)
    return {
        "stage": "downloading",
        "value": round(done_bytes / max(1, total_bytes), 3),
        "done_bytes": done_bytes,
        "total_bytes": total_bytes,
    }


def used_bytes(snapshot: Snapshot, instance: Instance, device: DeviceId) -> int | None:
    """None where the device cannot be measured."""
    reading = snapshot.reading(device)
    return measured_use(instance, device, reading) if reading else None


def mib(size_bytes: int) -> int:
    return round(size_bytes / MIB)


def model_view(
    snapshot: Snapshot, model_id: ModelId, usage: Mapping[AttemptId, Usage] = NO_USAGE
) -> dict[str, object]:
    """One model with everything known of it."""
    model = snapshot.models.get(model_id)
    instance = snapshot.instance(model_id)
    view: dict[str, object] = {
        "id": model_id,
        "status": status_of(snapshot, model_id),
        "state": instance.state.value,
        "pinned": snapshot.is_pinned(model_id),
    }
    if model is not None:
        view |= {
            "service": model.launch.service,
            "aliases": list(model.aliases),
            "description": model.description,
            "priority": model.priority,
            "idle_after_s": model.idle_after_s,
            "footprint": own_footprint(model, instance),
            "problem": model.problem,
        }
    hold_s = snapshot.holds.get(model_id, 0.0) - snapshot.now_s
    if hold_s > 0:
        view["held_for_s"] = round(hold_s, 1)
    if instance.failure is not None:
        view["failure"] = failure_view(snapshot, instance)
    if instance.state not in AT_REST and instance.attempt:
        view["instance"] = instance_view(snapshot, instance, usage)
    return view


def own_footprint(model: Model, instance: Instance) -> dict[str, object]:
    """Of the way in which it runs; of one that is not placed, of the least."""
    gpus = sum(1 for device in instance.placement if device != HOST)
    variant = model.run_with(instance.parameters)
    is_least = bool(model.variants) and variant not in model.variants
    return footprint_view(variant.demand.over(gpus), is_least=is_least)


def footprint_view(demand: Demand, *, is_least: bool = False) -> dict[str, object]:
    return {
        "is_least": is_least,
        "gpu_mib": mib(demand.gpu_bytes),
        "host_mib": mib(demand.host_bytes),
        "source": demand.source,
        "breakdown": {
            device: {component: mib(size) for component, size in parts.items() if size}
            for device, parts in demand.breakdown.items()
        },
    }


def failure_view(snapshot: Snapshot, instance: Instance) -> dict[str, object]:
    failure = instance.failure
    assert failure is not None
    due_s = None if instance.retry_at_s is None else max(0.0, instance.retry_at_s - snapshot.now_s)
    return {
        "message": failure.message,
        "code": failure.code,
        "exit_code": failure.exit_code,
        "oom": failure.oom,
        "log_tail": list(failure.log_tail),
        "has_log": failure.has_log,
        "failures": instance.failures,
        "next_try_in_s": None if due_s is None else round(due_s, 1),
    }


def instance_view(
    snapshot: Snapshot, instance: Instance, usage: Mapping[AttemptId, Usage]
) -> dict[str, object]:
    counted = usage.get(instance.attempt or "", Usage())
    view: dict[str, object] = {
        "attempt": instance.attempt,
        "state": instance.state.value,
        "for_s": round(snapshot.now_s - instance.since_s, 3),
        "in_flight": counted.in_flight,
        "requests": counted.entered,
        "idle_s": idle_s(snapshot, instance, counted),
        "load_time_s": round(instance.load_time_s, 3) if instance.ready_at_s is not None else None,
        "address": f"{instance.host}:{instance.port}" if instance.port else None,
        "stop_reason": instance.stop_reason,
        "parameters": dict(instance.parameters),
        "memory": {
            device: held_view(size, used_bytes(snapshot, instance, device))
            for device, size in instance.placement.items()
        },
    }
    return view | progress_of(snapshot, instance)


def held_view(reserved_bytes: int, used_bytes: int | None) -> dict[str, int | None]:
    return {"reserved_mib": mib(reserved_bytes), "used_mib": None if used_bytes is None else mib(used_bytes)}


def idle_s(snapshot: Snapshot, instance: Instance, usage: Usage) -> float | None:
    """Since when nobody has used it; None while somebody does, or it does not serve."""
    if usage.in_flight or instance.state is not State.READY:
        return None
    return round(snapshot.now_s - max(instance.ready_at_s or 0.0, usage.last_ended_s or 0.0), 1)


def device_view(snapshot: Snapshot, device_id: DeviceId) -> dict[str, object]:
    """One device in MiB; `error` instead of numbers where it cannot be measured."""
    device = snapshot.devices[device_id]
    view: dict[str, object] = {
        "id": device.id,
        "index": device.index if device.kind is DeviceKind.GPU else None,
        "name": device.name,
        "kind": device.kind.value,
        "capacity_mib": mib(device.capacity_bytes),
        "headroom_mib": mib(device.headroom_bytes),
    }
    if device.kind is DeviceKind.GPU:
        view |= {
            "telemetry": telemetry_view(snapshot.sample.telemetry.get(device_id, Telemetry())),
            "incidents": incidents_view(snapshot, device_id),
        }
    reading = snapshot.reading(device_id)
    if reading is None:
        return view | {"error": snapshot.unmeasured().get(device_id, "it cannot be measured")}
    holders = [i for i in snapshot.instances.values() if device_id in i.placement and i.state not in AT_REST]
    available = available_bytes(device, reading, holders)
    return (
        view
        | room_view(available)
        | {
            "free_mib": mib(reading.free_bytes),
            "used_mib": mib(reading.used_bytes),
            "reserved_mib": mib(sum(i.placement[device_id] for i in holders if i.holds_reservation)),
            "kept_back_mib": mib(sum(kept_back(i, device_id, reading) for i in holders)),
            "foreign_mib": mib(sum(p.used_bytes for p in reading.foreign)),
            "unexplained_mib": mib(reading.unexplained_bytes),
            "attributed": reading.attributed,
            "foreign": [foreign_view(snapshot, process) for process in reading.foreign],
            "holders": [
                {
                    "holder": i.model,
                    "state": i.state.value,
                    "reserved_mib": mib(i.placement[device_id]),
                    "used_mib": mib(measured_use(i, device_id, reading)),
                }
                for i in holders
            ],
        }
    )


def room_view(available_bytes: int) -> dict[str, object]:
    """What is available, and by how much more is promised or kept free than there is."""
    return {
        "available_mib": mib(max(0, available_bytes)),
        "overcommitted_mib": mib(max(0, -available_bytes)),
    }


def telemetry_view(telemetry: Telemetry) -> dict[str, object]:
    return asdict(telemetry) | {"throttled_by": list(telemetry.throttled_by)}


def incidents_view(snapshot: Snapshot, device: DeviceId) -> list[dict[str, object]]:
    """What the GPU has reported since the server started, oldest first; the newest few."""
    return [
        {"at": reported.at, "xid": reported.incident.code, "text": reported.incident.text}
        for reported in snapshot.incidents
        if reported.incident.device == device
    ]


def foreign_view(snapshot: Snapshot, process: ForeignProcess) -> dict[str, object]:
    return {
        "pid": process.pid,
        "name": process.name,
        "container": process.container,
        "container_name": snapshot.container_names.get(process.container or ""),
        "used_mib": mib(process.used_bytes),
    }


def queue_view(snapshot: Snapshot) -> list[dict[str, object]]:
    """Who waits, oldest first, and for what."""
    return [
        {
            "model": entry.model,
            "waiting": len(entry.waiters),
            "for_s": round(snapshot.now_s - entry.since_s, 3),
            "reason": entry.reason,
        }
        for entry in sorted(snapshot.entries.values(), key=lambda entry: entry.since_s)
    ]


def operation_view(operation: Operation, snapshot: Snapshot | None = None) -> dict[str, object]:
    view: dict[str, object] = {
        "id": operation.id,
        "kind": operation.kind.value,
        "model": operation.model,
        "state": operation.state.value,
        "message": operation.message,
        "code": operation.code,
        "created_at": operation.created_at,
        "ended_at": operation.ended_at,
        "freed_mib": mib(operation.freed_bytes),
    }
    if snapshot is None or operation.ended_at is not None:
        return view
    if operation.kind is OperationKind.DOWNLOAD and is_downloading(snapshot, operation.model):
        view["progress"] = download_progress(snapshot, operation.model)
    elif operation.kind in (OperationKind.LOAD, OperationKind.UNLOAD):
        instance = snapshot.instance(operation.model)
        view["phase"] = instance.state.value
        entry = snapshot.entries.get(operation.model)
        if entry is not None and instance.state not in HAS_PROCESS:
            view["message"] = entry.reason
        view |= progress_of(snapshot, instance)
    return view


def state_view(snapshot: Snapshot, usage: Mapping[AttemptId, Usage]) -> dict[str, object]:
    """Everything, of one moment."""
    models = {*snapshot.models, *(m for m, i in snapshot.instances.items() if i.state not in AT_REST)}
    return {
        "version": snapshot.version,
        "sample_age_s": round(snapshot.now_s - snapshot.sample.taken_at_s, 3),
        "devices": [device_view(snapshot, device) for device in snapshot.devices],
        "models": [model_view(snapshot, model, usage) for model in sorted(models)],
        "instances": [
            instance_view(snapshot, i, usage) | {"model": i.model}
            for i in snapshot.instances.values()
            if i.state not in AT_REST and i.attempt
        ],
        "leases": [],
        "queue": queue_view(snapshot),
    }
