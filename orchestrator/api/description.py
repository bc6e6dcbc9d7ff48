"""The description at /openapi.json: what FastAPI knows of the routes, and the gateway's paths beside it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from orchestrator.api.access import COOKIE
from orchestrator.api.relayed import answers, query_model, relayed_paths
from orchestrator.api.scopes import scopes_of
from orchestrator.api.shapes import MEANINGS, Error

NEVER_SENT = "422"
"""FastAPI's own status for what is invalid; ours is 400."""

KEY = "An API key. None is needed while there are none, nor from a trusted network."
SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": KEY},
    "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key", "description": KEY},
    "session": {"type": "apiKey", "in": "cookie", "name": COOKIE, "description": "A browser's, from /login."},
}

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
    document["components"]["securitySchemes"] = SCHEMES
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            add_access(operation, method.upper(), path)
    return document


def add_access(operation: dict[str, Any], method: str, path: str) -> None:
    """Which scope it needs, how to show a key, and what is said without one."""
    (needed,) = scopes_of(method, path)
    if needed is None:
        operation["security"] = []
        return
    operation["security"] = [{scheme: [needed]} for scheme in SCHEMES]
    shape = {"application/json": {"schema": {"$ref": f"#/components/schemas/{Error.__name__}"}}}
    for status in (401, 403):
        refused = {"description": MEANINGS[status], "content": shape}
        operation["responses"].setdefault(str(status), refused)


def add_one_models_props(operation: dict[str, Any]) -> None:
    """With ?model= it is the instance that answers."""
    operation["parameters"] = [query_model(required=False)]
    content = operation["responses"]["200"]["content"]["application/json"]
    content["schema"] = {"anyOf": [content["schema"], {}]}
    operation["responses"] |= answers()
