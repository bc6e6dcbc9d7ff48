"""Looking at the server: state, changes, devices, operations, logs, health. None of it changes anything."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from orchestrator.api.context import Context, context_of
from orchestrator.api.fields import ATTEMPT
from orchestrator.api.problems import BadRequest
from orchestrator.api.shapes import (
    DeviceList,
    Diagnosis,
    Health,
    LogLines,
    OperationView,
    Readiness,
    StateView,
    answers,
    plain_text,
    server_sent,
)
from orchestrator.api.streams import begin, changes, event_stream
from orchestrator.control.status import device_view, operation_view

router = APIRouter(tags=["server"])

FIRST_LINES_S = 1.0
"""A service that prints nothing must not keep a follower waiting for so much as a status line."""

NOT_READY: dict[str, Any] = {"model": Readiness, "description": "One of the checks says what is wrong."}


@router.get(
    "/state",
    summary="Everything, of one moment",
    response_model=None,
    responses=answers(StateView),
)
async def get_state(request: Request) -> dict[str, object]:
    """Devices with capacity, measured use, reservations and foreign use; models, instances, leases, queue.
    All memory is in MiB."""
    context = context_of(request)
    return context.loop.view()


@router.get(
    "/events",
    summary="Changes as they happen (SSE)",
    response_class=StreamingResponse,
    responses=server_sent("snapshot", "model", "operation", "log"),
)
async def get_events(
    request: Request, last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None
) -> StreamingResponse:
    """First an event `snapshot` as /state has it, then `model`, `operation` and `log` events with ids.
    A client that sends `Last-Event-ID` gets what it missed."""
    context = context_of(request)
    text = last_event_id or ""
    last_id = int(text) if text.isascii() and text.isdecimal() else None
    loop = context.loop
    return event_stream(changes(loop.feed, loop.view, last_id))


@router.get(
    "/log",
    summary="The event log: what happened, and why",
    response_model=None,
    responses=answers(LogLines, 400, 404, 503),
)
async def get_log(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000, description="The newest so many.")] = 100,
    model: Annotated[str | None, Query(description="Of this model only.")] = None,
) -> dict[str, object]:
    context = context_of(request)
    name = context.resolve(model).id if model else None
    events = await context.store.events(limit=limit, model=name)
    return {
        "events": [
            {
                "id": e.id,
                "at": e.at,
                "kind": e.kind,
                "text": e.text,
                "model": e.model,
                "attempt": e.attempt,
                "data": dict(e.data),
            }
            for e in events
        ]
    }


@router.get(
    "/devices",
    summary="GPUs and RAM, in MiB",
    response_model=None,
    responses=answers(DeviceList),
)
async def get_devices(request: Request) -> dict[str, object]:
    snapshot = context_of(request).loop.as_of_now()
    return {"devices": [device_view(snapshot, device) for device in snapshot.devices]}


@router.get(
    "/operations/{operation_id}",
    summary="How a load or unload is going",
    response_model=None,
    responses=answers(OperationView, 404, 503),
)
async def get_operation(request: Request, operation_id: str) -> dict[str, object]:
    context = context_of(request)
    snapshot = context.loop.as_of_now()
    operation = snapshot.operations.get(operation_id) or await context.store.operation(operation_id)
    if operation is None:
        raise BadRequest(
            f"There is no operation '{operation_id}'.", "operation_id", "operation_not_found", 404
        )
    return operation_view(operation, snapshot)


@router.get(
    "/logs/{model:path}",
    summary="What a model's service printed",
    response_class=StreamingResponse,
    responses=plain_text(400, 404, 503),
)
async def get_logs(
    request: Request,
    model: str,
    follow: Annotated[bool, Query(description="Go on with what it prints next.")] = False,
    tail: Annotated[int, Query(ge=0, le=100_000, description="Begin with the last so many lines.")] = 200,
    attempt: Annotated[
        str | None, Query(pattern=ATTEMPT, description="Of this attempt instead of the newest.")
    ] = None,
    previous: Annotated[
        bool, Query(description="Of the attempt before the newest: why it ended, while the next one runs.")
    ] = False,
) -> StreamingResponse:
    """Also of the last attempt that failed or was stopped."""
    context = context_of(request)
    found = context.resolve(model)
    chunks = context.engine.logs(found.id, attempt, tail=tail, follow=follow, previous=previous)
    begun = await begin(chunks, FIRST_LINES_S if follow else None)
    return StreamingResponse(begun, media_type="text/plain; charset=utf-8")


@router.get("/health", summary="The process is up", response_model=None, responses=answers(Health))
@router.get("/healthz", summary="The process is up", response_model=None, responses=answers(Health))
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get(
    "/readyz",
    summary="Engine, devices and store can be reached",
    response_model=None,
    responses={**answers(Readiness), 503: NOT_READY},
)
async def readyz(request: Request) -> Response:
    context = context_of(request)
    checks = await readiness(context)
    is_ready = all(problem is None for problem in checks.values())
    body = {
        "ready": is_ready,
        "checks": {name: problem or "ok" for name, problem in checks.items()},
        "found": context.found,
    }
    return JSONResponse(body, 200 if is_ready else 503)


async def readiness(context: Context) -> dict[str, str | None]:
    """What is wrong with each of the things a load needs, or None."""
    unmeasured = context.loop.as_of_now().unmeasured()
    devices = "; ".join(f"{device}: {why}" for device, why in unmeasured.items()) or None
    return {
        "engine": context.engine_problem or await context.engine.health(),
        "devices": devices,
        "store": context.loop.store_problem or await context.store.health(),
    }


@router.get(
    "/doctor",
    summary="What was found, what is wrong, and what to do about it",
    response_model=None,
    responses=answers(Diagnosis),
)
async def doctor(request: Request) -> dict[str, object]:
    return await context_of(request).diagnose()
