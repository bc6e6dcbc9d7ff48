"""API keys: make, list, revoke. A key's text is in the answer that makes it, and never again."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from orchestrator.api.context import context_of
from orchestrator.api.fields import KEY_NAME, PositiveDuration
from orchestrator.api.shapes import KeyList, NewKey, RevokedKey, answers, errors
from orchestrator.core.keys import Scope, key_view

router = APIRouter(tags=["keys"])

ASKED_TO_CHANGE = (400, 403, 408, 409, 413, 503)


class KeyRequest(BaseModel):
    """A key to make. The first one must have the scope `admin`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=KEY_NAME, description="What to call it, and to revoke it by.")
    scopes: list[Annotated[Scope, Field(strict=False)]] = Field(
        min_length=1, description="What it may do; `admin` implies the others."
    )
    expires_in: PositiveDuration | None = Field(
        None, description="From when on it is refused, as '90d' or in seconds; by default never."
    )


@router.post(
    "/keys",
    summary="Make an API key",
    status_code=201,
    response_model=None,
    responses={201: {"model": NewKey, "description": "The key, told this once."}, **errors(*ASKED_TO_CHANGE)},
)
async def make_key(request: Request, ask: KeyRequest) -> Response:
    """The answer's `key` is not kept, only a digest of it. From the first key on every call needs one."""
    key, token = await context_of(request).keyring.create(ask.name, ask.scopes, ask.expires_in)
    return JSONResponse({**key_view(key), "key": token}, 201, {"cache-control": "no-store"})


@router.get(
    "/keys", summary="All API keys, without their texts", response_model=None, responses=answers(KeyList)
)
async def list_keys(request: Request) -> dict[str, object]:
    return {"keys": [key_view(key) for key in context_of(request).keyring.known()]}


@router.delete(
    "/keys/{name}",
    summary="Revoke an API key",
    response_model=None,
    responses=answers(RevokedKey, *ASKED_TO_CHANGE, 404),
)
async def revoke_key(
    request: Request, name: Annotated[str, Path(description="The key's name.")]
) -> dict[str, object]:
    """It counts no more at once, nor do the browsers that logged in with it."""
    key = await context_of(request).keyring.revoke(name)
    return {"success": True, **key_view(key)}
