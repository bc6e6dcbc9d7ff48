"""Models: list, load, unload, watch. llama.cpp's router API, and more."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.api.context import Context, context_of
from orchestrator.api.fields import PositiveDuration
from orchestrator.api.problems import BadRequest, problem_of_told, problem_of_verdict
from orchestrator.api.shapes import Accepted, ListedModel, ModelList, ModelView, Props, answers, server_sent
from orchestrator.api.streams import event_stream, statuses
from orchestrator.control.operations import Outcome
from orchestrator.control.status import mib, model_view, operation_view, status_of
from orchestrator.core.entities import Model, OperationKind, OperationState
from orchestrator.core.wording import Told

router = APIRouter(tags=["models"])

UNLOAD_MARGIN_S = 30.0
REMOVAL_LIMIT_S = 660.0
"""A drain and then some; what takes longer goes on by itself."""

ASKED_TO_CHANGE = (400, 403, 404, 408, 409, 413, 503)


class LoadRequest(BaseModel):
    """Load a model. One that is loaded is a success, one that is loading is joined."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(min_length=1, description="A name or alias from GET /models.", examples=["demo"])
    wait: bool = Field(False, description="Answer only when it is ready, or has failed.")
    pin: bool | None = Field(
        None, description="Never evict it, and load it again after a reboot; unloading it ends that."
    )


class UnloadRequest(BaseModel):
    """Unload a model. One that is not loaded is a success that says so."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(min_length=1, description="A name or alias from GET /models.", examples=["demo"])
    wait: bool = Field(True, description="Answer only once its memory is seen to be free.")
    force: bool = Field(False, description="Cut requests in flight instead of letting them end.")
    hold: PositiveDuration | None = Field(
        None, description="Keep it out this long, as '10m' or in seconds; a load ends that.", examples=["10m"]
    )


class DownloadRequest(BaseModel):
    """Download a model from the hub. One that is on its way is joined, one that is here is a success."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(
        min_length=1,
        description="OWNER/NAME or OWNER/NAME:QUANT, or a model of models.yaml whose source is the hub.",
        examples=["Qwen/Qwen3-VL-30B-A3B-Instruct-GGUF:Q4_K_M"],
    )


def listed(context: Context, model: Model) -> dict[str, object]:
    snapshot = context.loop.snapshot
    return {
        "id": model.id,
        "object": "model",
        "created": context.started_at,
        "owned_by": "model-orchestrator",
        "aliases": list(model.aliases),
        "status": status_of(snapshot, model.id),
        "can_remove": model.id in snapshot.downloads,
    }


def listing(context: Context, request: Request) -> dict[str, object]:
    models = context.hostnames.models_at(request.headers.get("host", ""))
    return {"object": "list", "data": [listed(context, models[key]) for key in sorted(models)]}


@router.get(
    "/models",
    summary="All models and their status",
    response_model=None,
    responses=answers(ModelList, 403, 409, 503),
)
async def get_models(
    request: Request,
    reload: Annotated[str | None, Query(description="`1`: read the catalogue's files again first.")] = None,
) -> dict[str, object]:
    """`data[].status.value` is `unloaded`, `loading`, `loaded` or `downloading`; a failed one also has
    `failed` and `exit_code`. Looking never loads anything."""
    context = context_of(request)
    if reload in ("1", "true"):
        await context.reload_catalogue()
    return listing(context, request)


@router.get(
    "/v1/models",
    summary="All models, as OpenAI clients ask",
    tags=["openai"],
    response_model=None,
    responses=answers(ModelList),
)
async def get_openai_models(request: Request) -> dict[str, object]:
    return listing(context_of(request), request)


@router.get(
    "/v1/models/{model:path}",
    summary="One model, as OpenAI clients ask",
    tags=["openai"],
    response_model=None,
    responses=answers(ListedModel, 404),
)
async def get_openai_model(request: Request, model: str) -> dict[str, object]:
    context = context_of(request)
    return listed(context, context.hostnames.check(request.scope, context.resolve(model)))


@router.post(
    "/models",
    summary="Download a model",
    response_model=None,
    responses=answers(Accepted, *ASKED_TO_CHANGE, 507),
)
async def download_model(request: Request, ask: DownloadRequest) -> Response:
    """Into the Hugging Face cache, without loading it; afterwards it can be loaded at once. Answers when it
    is accepted and saved; the operation follows it, also over a restart.

    404: no such repository or quantization. 409: gated, or not from the hub. 507: no room on the disk.
    """
    context = context_of(request)
    return answer(context, await context.downloads.ask(ask.model))


@router.delete(
    "/models",
    summary="Remove a downloaded model, or cancel its download",
    response_model=None,
    responses=answers(Accepted, *ASKED_TO_CHANGE),
)
async def remove_model(
    request: Request, model: Annotated[str, Query(min_length=1, description="Its name or alias.")]
) -> Response:
    """With its files, but for those that another model uses. One that is loaded is unloaded first: requests
    in flight may end. 409: it was not downloaded through this server.
    """
    context = context_of(request)
    outcome = await context.downloads.remove(model)
    if outcome.operation.ended_at is None:
        outcome = await context.loop.finished(outcome, REMOVAL_LIMIT_S)
        if outcome.operation.ended_at is None:
            raise still_running(outcome)
    return answer(context, outcome)


@router.post(
    "/models/load",
    summary="Load a model",
    response_model=None,
    responses=answers(Accepted, *ASKED_TO_CHANGE),
)
async def load_model(request: Request, ask: LoadRequest) -> Response:
    """Makes room if it must: idle models leave, busy ones are let finish, pinned ones stay.

    409: it can never fit. 503: it cannot now, with the numbers and who holds the rest.
    """
    context = context_of(request)
    model = context.resolve(ask.model)
    outcome = await context.loop.load(model.id, pin=ask.pin)
    if ask.wait and outcome.operation.ended_at is None:
        outcome = await context.loop.finished(outcome, max(model.deadline_s, model.start_timeout_s))
        if outcome.operation.ended_at is None:
            raise still_running(outcome)
    return answer(context, outcome)


@router.post(
    "/models/unload",
    summary="Unload a model",
    response_model=None,
    responses=answers(Accepted, *ASKED_TO_CHANGE),
)
async def unload_model(request: Request, ask: UnloadRequest) -> Response:
    """Lets requests in flight end, stops the service, and answers once its memory is seen to be free;
    `freed_mib` says how much came back."""
    context = context_of(request)
    model = context.resolve(ask.model)
    outcome = await context.loop.unload(model.id, force=ask.force, hold_s=ask.hold)
    if ask.wait and outcome.operation.ended_at is None:
        limit_s = model.drain_limit_s + model.stop_grace_s + UNLOAD_MARGIN_S
        outcome = await context.loop.finished(outcome, limit_s)
        if outcome.operation.ended_at is None:
            raise still_running(outcome)
    return answer(context, outcome)


def still_running(outcome: Outcome) -> BadRequest:
    operation = outcome.operation
    return BadRequest(
        f"The {operation.kind} of '{operation.model}' still goes on; "
        f"GET /operations/{operation.id} follows it.",
        code="still_running",
        status=503,
    )


def answer(context: Context, outcome: Outcome) -> Response:
    operation = outcome.operation
    if operation.state is OperationState.FAILED:
        return failed(context, outcome)
    view = operation_view(operation, context.loop.snapshot)
    body: dict[str, Any] = {"success": True, "message": view["message"], "operation": view}
    if operation.ended_at is not None and operation.kind in (OperationKind.LOAD, OperationKind.UNLOAD):
        body["freed_mib"] = mib(operation.freed_bytes)
    return JSONResponse(body)


def failed(context: Context, outcome: Outcome) -> Response:
    operation = outcome.operation
    if outcome.verdict is not None:
        problem = problem_of_verdict(outcome.verdict, context.loop.snapshot.now_s)
    else:
        problem = problem_of_told(Told(operation.message, operation.code or "failed", 503))
    return Response(problem.body(), problem.status, problem.headers())


@router.get(
    "/models/sse",
    summary="Status changes of models, as llama.cpp's router tells them",
    response_class=StreamingResponse,
    responses=server_sent(),
)
async def model_events(request: Request) -> StreamingResponse:
    return event_stream(statuses(context_of(request).loop.feed))


@router.get(
    "/models/{model:path}",
    summary="One model with everything known of it",
    response_model=None,
    responses=answers(ModelView, 404),
)
async def get_model(request: Request, model: str) -> dict[str, object]:
    context = context_of(request)
    found = context.resolve(model)
    return model_view(context.loop.snapshot, found.id, context.loop.usage())


@router.get(
    "/props",
    summary="What llama.cpp clients ask of a router",
    response_model=None,
    responses=answers(Props),
)
async def get_props(request: Request) -> dict[str, object]:
    return {
        "role": "router",
        "models_autoload": True,
        "build_info": f"model-orchestrator {context_of(request).version}",
        "default_generation_settings": {},
        "total_slots": 0,
        "chat_template": "",
    }
