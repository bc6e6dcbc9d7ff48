"""The FastAPI application: routers, one error shape, and descriptions that a person can use."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.status import HTTP_405_METHOD_NOT_ALLOWED

from orchestrator.api import admin, keys, learned, login, models, plan
from orchestrator.api.context import Context
from orchestrator.api.description import describe
from orchestrator.api.fields import FORMS
from orchestrator.api.problems import Problem, problem_of
from orchestrator.api.shapes import errors
from orchestrator.core.errors import OrchestratorError
from orchestrator.core.mistakes import refused

ROUTERS = (models.router, plan.router, admin.router, learned.router, keys.router, login.router)
DESCRIPTION = """\
Owns the memory of your GPUs: starts and stops the services that need it, loads what a request names,
evicts what is idle.

* **OpenAI API** under `/v1/…`: chat, completions, embeddings, audio; routed by `model`, loaded on demand.
* **Any other HTTP** of a service under `/upstream/{model}/…`.
* **llama.cpp's router API**: `/models`, `/models/load`, `/models/unload`, `/models/sse`.

Every error has the shape `{"error": {"message", "type", "code", "param", …}}`, and its message says what
happened and what to do. Long waits are held open, not bounced.
"""


def build_api(
    context: Context, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None
) -> FastAPI:
    api = FastAPIOffline(  # its pages bring their scripts along: the machine may have no internet
        static_url="/docs/static",
        title="Model orchestrator",
        version=context.version,
        description=DESCRIPTION,
        lifespan=lifespan,
        openapi_tags=[
            {"name": "models", "description": "List, plan, load, unload, watch."},
            {
                "name": "openai",
                "description": "What OpenAI clients ask besides /v1/chat/completions and its like.",
            },
            {"name": "server", "description": "State, changes, devices, logs, health."},
            {"name": "keys", "description": "API keys: make, list, revoke."},
            {"name": "relayed", "description": "What a model's own service answers; it is loaded first."},
        ],
    )
    api.state.context = context
    for router in ROUTERS:
        api.include_router(router, responses=errors(421))
    api.add_exception_handler(OrchestratorError, handler(problem_of))
    api.add_exception_handler(RequestValidationError, handler(problem_of_validation))
    api.add_exception_handler(HTTPException, handler(problem_of_http))
    api.add_exception_handler(Exception, handler(problem_of))
    document = functools.cache(functools.partial(describe, api))
    api.openapi = document  # type: ignore[method-assign]
    return api


def handler(
    translate: Callable[[Any], Problem],
) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        problem = translate(error)
        return Response(problem.body(), problem.status, {**problem.headers(), **allowed(request, error)})

    return handle


def allowed(request: Request, error: Exception) -> dict[str, str]:
    """The methods that a path does take, all routes together, which a 405 must name (RFC 9110, 15.5.6)."""
    if not isinstance(error, HTTPException) or error.status_code != HTTP_405_METHOD_NOT_ALLOWED:
        return {}
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    found = (route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    return {"allow": ", ".join(sorted({method for methods in found for method in methods}))}


def problem_of_validation(error: RequestValidationError) -> Problem:
    """The first thing that is wrong, with its field, its value and what is allowed."""
    found = error.errors()[0]
    where = [str(part) for part in found["loc"] if part not in ("body", "query", "path", "header")]
    if found["type"] == "json_invalid":
        why = found.get("ctx", {}).get("error", "")
        return Problem(400, f"The body is not valid JSON: {why}.", "invalid_json")
    if not where:
        return Problem(400, 'The body must be a JSON object, such as {"model": "demo"}.', "invalid_json")
    field = where[0]  # our bodies are flat; what follows names pydantic's tries at a union
    return Problem(400, f"`{field}`: {refused(found, FORMS)}.", "invalid_value", field)


def problem_of_http(error: HTTPException) -> Problem:
    match error.status_code:
        case 404:
            message = "There is nothing at this path; GET /docs lists what there is."
            return Problem(404, message, "not_found")
        case 405:
            return Problem(405, "This path does not take that method.", "method_not_allowed")
        case status:
            return Problem(status, str(error.detail), "http_error")
