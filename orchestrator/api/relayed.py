"""How the gateway's paths look in the description at /openapi.json; they are no routes of FastAPI's.

What a service answers is its own, so `default` says no more than that.
"""

from __future__ import annotations

from typing import Any

from orchestrator.api.gateway import LLAMA_PATHS, LOOKS
from orchestrator.api.shapes import MEANINGS, Error

Described = dict[str, Any]

OUR_STATUSES = (400, 401, 403, 404, 408, 409, 413, 421, 502, 503, 504)
METHODS = ("get", "post", "put", "patch", "delete")
OPENAI_CALLS = {
    "/v1/chat/completions": "Answer in a chat",
    "/v1/completions": "Complete a text",
    "/v1/embeddings": "Embed texts",
}
TEXT: Described = {"type": "string"}
NAME: Described = {"type": "string", "minLength": 1}
ANYTHING: Described = {"description": "What the service answers, as it comes.", "content": {"*/*": {}}}
DEADLINE: Described = {
    "name": "X-Deadline-Seconds",
    "in": "header",
    "description": "How long it may take until the first byte of the answer.",
    "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 86400},
}
AUTOLOAD: Described = {
    "name": "autoload",
    "in": "query",
    "description": "`false` or `0`: only if the model is loaded.",
    "schema": TEXT,
}
NAMED: Described = {
    "type": "object",
    "required": ["model"],
    "properties": {
        "model": {
            "type": "string",
            "minLength": 1,
            "description": "A name or alias from GET /models.",
            "examples": ["demo"],
        }
    },
}
FORM: Described = {
    **NAMED,
    "properties": {**NAMED["properties"], "file": {"type": "string", "format": "binary"}},
}


def path_parameter(name: str, description: str) -> Described:
    return {"name": name, "in": "path", "required": True, "description": description, "schema": TEXT}


def query_model(*, required: bool) -> Described:
    description = "A name or alias from GET /models."
    return {"name": "model", "in": "query", "required": required, "description": description, "schema": NAME}


def answers() -> Described:
    """Ours have the one shape; a service may use the same statuses in its own way."""
    shape = {"anyOf": [{"$ref": f"#/components/schemas/{Error.__name__}"}, {}]}
    content = {"application/json": {"schema": shape}, "*/*": {}}
    ours = {
        str(status): {"description": f"{MEANINGS[status]} Or the service's own answer.", "content": content}
        for status in OUR_STATUSES
    }
    return {"default": ANYTHING, **ours}


def relayed(summary: str, key: str, *parameters: Described, body: Described | None = None) -> Described:
    operation: Described = {
        "tags": ["relayed"],
        "summary": summary,
        "operationId": f"relay_{key}",
        "parameters": [*parameters, DEADLINE],
        "responses": answers(),
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": body}
    return operation


def key_of(path: str, method: str) -> str:
    return "_".join([*path.replace("{", "").replace("}", "").replace("-", "_").strip("/").split("/"), method])


def named_call(path: str, summary: str) -> Described:
    """A POST whose JSON names the model."""
    body = {"application/json": {"schema": NAMED}}
    return {"post": relayed(summary, key_of(path, "post"), AUTOLOAD, body=body)}


def llama_calls() -> dict[str, Described]:
    calls = {path: named_call(path, "llama.cpp's own call") for path in sorted(LLAMA_PATHS - LOOKS)}
    saved = named_call("/slots/{slot}", "Save, restore or erase a slot")
    saved["post"]["parameters"].insert(0, path_parameter("slot", "The slot's number."))
    looks = {
        path: {"get": relayed("Of one model's instance", key_of(path, "get"), query_model(required=True))}
        for path in ("/metrics", "/slots")
    }
    return {**calls, **looks, "/slots/{slot}": saved}


def openai_calls() -> dict[str, Described]:
    calls = {path: named_call(path, summary) for path, summary in OPENAI_CALLS.items()}
    form = {"multipart/form-data": {"schema": FORM}}
    path = "/v1/audio/transcriptions"
    calls[path] = {"post": relayed("Speech to text", key_of(path, "post"), AUTOLOAD, body=form)}
    return calls


def any_calls() -> dict[str, Described]:
    """`/v1` by ?model= or the body's `model`, `/upstream` by its path; any method, body and answer."""
    v1 = "/v1/{path}"
    upstream = "/upstream/{model}/{path}"
    rest = path_parameter("path", "The path; it may have slashes.")
    model = path_parameter("model", "A name or alias from GET /models.")
    named = "Any other call of the OpenAI API, by the `model` of its body or query"
    return {
        v1: {m: relayed(named, key_of(v1, m), rest, query_model(required=False), AUTOLOAD) for m in METHODS},
        upstream: {
            m: relayed("Any path of the instance", key_of(upstream, m), model, rest, AUTOLOAD)
            for m in METHODS
        },
    }


def relayed_paths() -> dict[str, Described]:
    return {**openai_calls(), **any_calls(), **llama_calls()}
