"""The description at /openapi.json: what FastAPI knows of the routes, and the gateway's paths beside it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from orchestrator.api.relayed import answers, query_model, relayed_paths

NEVER_SENT = "422"
"""FastAPI's own status for what is invalid; ours is 400."""

FASTAPI_SHAPES = ("HTTPValidationError", "ValidationError")


def describe(api: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of everything that is served."""
    document = get_openapi(
        title=api.title,
        version=api.version,
        description=api.description,
        tags=api.openapi_tags,
        routes=api.routes,
    )
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop(NEVER_SENT, None)
    for name in FASTAPI_SHAPES:
        document["components"]["schemas"].pop(name, None)
    add_one_models_props(document["paths"]["/props"]["get"])
    document["paths"] |= relayed_paths()
    return document


def add_one_models_props(operation: dict[str, Any]) -> None:
    """With ?model= it is the instance that answers."""
    operation["parameters"] = [query_model(required=False)]
    content = operation["responses"]["200"]["content"]["application/json"]
    content["schema"] = {"anyOf": [content["schema"], {}]}
    operation["responses"] |= answers()
