"""What would happen, without doing it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.json_schema import SkipJsonSchema

from orchestrator.api.context import Context, context_of
from orchestrator.api.shapes import PlanView, answers
from orchestrator.control.forecast import preview_view
from orchestrator.core.entities import AttemptId, Model, Usage
from orchestrator.core.errors import UnknownModel
from orchestrator.core.preview import Fitting, preview, would_fit
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.verdicts import Refused

router = APIRouter(tags=["models"])


class PlanRequest(BaseModel):
    """Ask what a load of a model would do."""

    model_config = ConfigDict(extra="forbid", strict=True)

    load: str = Field(min_length=1, description="A name or alias from GET /models.", examples=["demo"])
    lease: SkipJsonSchema[Any] = None

    @field_validator("lease")
    @classmethod
    def _no_leases_yet(cls, _: object) -> None:
        raise ValueError("there are no leases yet, they come with a later version; plan a `load`")


@router.post(
    "/plan",
    summary="What a load would do, without doing it",
    response_model=None,
    responses=answers(PlanView, 400, 403, 404, 408, 413),
)
async def plan(request: Request, ask: PlanRequest) -> dict[str, object]:
    """Where the model would go, who would have to leave and why them, or why it would be refused and what
    would fit. It is the planner's own decision of this moment; nothing is changed by asking."""
    context = context_of(request)
    try:
        model = context.resolve(ask.load)
    except UnknownModel as error:
        error.param = "load"
        raise
    snapshot, usage = context.loop.as_of_now(), context.loop.usage()
    model = snapshot.models.get(model.id, model)
    found = preview(snapshot, usage, model)
    fitting: tuple[Fitting, ...] = ()
    if isinstance(found.verdict, Refused):  # this reads a file and takes a while
        parameters = found.verdict.parameters
        fitting = await asyncio.to_thread(fitting_ways, context, snapshot, usage, model, parameters)
    return preview_view(snapshot, found, fitting)


def fitting_ways(
    context: Context,
    snapshot: Snapshot,
    usage: Mapping[AttemptId, Usage],
    model: Model,
    parameters: Mapping[str, int],
) -> tuple[Fitting, ...]:
    """Other than with these parameters, which name the variant that was refused."""
    ways = context.alternatives(model, parameters)
    refused = model.as_variant(model.run_with(parameters))
    return would_fit(snapshot, usage, refused, ways) if ways else ()
