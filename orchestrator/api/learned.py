"""What loads have shown of models' memory: looking at it, and forgetting it."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from orchestrator.api.context import context_of
from orchestrator.api.problems import BadRequest
from orchestrator.api.shapes import answers
from orchestrator.core.learned import learned_view, models_by_recipe

router = APIRouter(tags=["server"])


class RecipeView(BaseModel):
    """What decides a model's memory beside the card; `content` stands for its files, `service` for image,
    command and environment."""

    content: str
    service: str
    context_size: int
    n_gpu_layers: int
    parallel: int
    cache_type_k: str
    cache_type_v: str
    gpus: int


class LearnedLoad(BaseModel):
    attempt: str
    ready_bytes: int = Field(description="What it held when it was ready.")
    peak_bytes: int = Field(description="The most until now.")
    at: float
    buffers: dict[str, dict[str, int]] = Field(
        description="What its log says of llama.cpp's buffers, by device and kind; empty where it has none."
    )


class LearnedRow(BaseModel):
    """The newest loads of one recipe on one kind of card. Bytes are of one GPU: of the one that held most."""

    key: str
    models: list[str] = Field(description="Models of the catalogue that it is of.")
    recipe: RecipeView
    card: str = Field(description="The card's name and its driver.")
    predicted_bytes: int = Field(description="What was predicted at the newest load, or is declared.")
    loads: list[LearnedLoad] = Field(description="Oldest first.")
    floor_bytes: int = Field(description="So much is needed at least, since a start ran out of memory; or 0.")
    believed_loads: int = Field(
        description="So many of the loads count; one that is far off the prediction must be seen twice."
    )


class LearnedList(BaseModel):
    learned: list[LearnedRow]


class Forgotten(BaseModel):
    success: Literal[True]
    forgotten: list[str] = Field(description="Keys of the rows that are gone.")


@router.get(
    "/learned",
    summary="What loads have shown of models' memory, in bytes",
    response_model=None,
    responses=answers(LearnedList),
)
async def get_learned(request: Request) -> dict[str, object]:
    """The newest first; the same as `orchestrator learned list --json` prints."""
    snapshot = context_of(request).loop.snapshot
    return {"learned": learned_view(snapshot.learned, models_by_recipe(snapshot.models.values()))}


@router.delete(
    "/learned",
    summary="Forget all that was learned of a model",
    response_model=None,
    responses=answers(Forgotten, 400, 403, 404, 503),
)
async def forget_model(
    request: Request, model: Annotated[str, Query(min_length=1, description="Its name or alias.")]
) -> dict[str, object]:
    """Its footprint is predicted again. What it holds while it is loaded is noted anew."""
    context = context_of(request)
    found, snapshot = context.resolve(model), context.loop.snapshot
    names = models_by_recipe(snapshot.models.values())
    keys = [key for key, row in snapshot.learned.items() if found.id in names.get(row.recipe, [])]
    if not keys:
        raise BadRequest(f"Nothing was learned of '{found.id}'.", "model", "learned_not_found", 404)
    await context.loop.forget(keys)
    return {"success": True, "forgotten": keys}


@router.delete(
    "/learned/{key}",
    summary="Forget one row of what was learned",
    response_model=None,
    responses=answers(Forgotten, 403, 404, 503),
)
async def forget_row(request: Request, key: str) -> dict[str, object]:
    """By its whole `key`."""
    context = context_of(request)
    if key not in context.loop.snapshot.learned:
        raise BadRequest(
            f"Nothing was learned under the key '{key}'. GET /learned lists the keys.",
            "key",
            "learned_not_found",
            404,
        )
    await context.loop.forget([key])
    return {"success": True, "forgotten": [key]}
