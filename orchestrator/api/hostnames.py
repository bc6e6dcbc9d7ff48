"""Hostnames of services: requests to `llama.lan` are the OpenAI API of the service that has this name.

There a request needs no model where there is no choice, and a model of another service is refused. Lists
have that service's models only, and GET /metrics has what its instances measure. All else is as on any name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import aiohttp

from orchestrator.api.asgi import Scope, Send, header, query_value
from orchestrator.api.metrics import TEXT, merged
from orchestrator.api.problems import BadRequest
from orchestrator.api.relay import upstream_url
from orchestrator.api.safety import name_of
from orchestrator.control.loop import Loop
from orchestrator.core.entities import Model, ModelId
from orchestrator.core.lifecycle import Instance, State

SCRAPE_S = 5.0


class Hostnames:
    """`names` gives the services' names by hostname, as the catalogue has them now."""

    def __init__(self, loop: Loop, names: Callable[[], Mapping[str, str]]) -> None:
        self._loop = loop
        self._names = names

    def __contains__(self, host: object) -> bool:
        return isinstance(host, str) and name_of(host) in self._names()

    def service_of(self, host: str) -> str | None:
        """The service that a Host header names, its port aside."""
        return self._names().get(name_of(host))

    def models_at(self, host: str) -> dict[ModelId, Model]:
        """The models that are listed there: the service's, or all of them."""
        models, service = self._loop.snapshot.models, self.service_of(host)
        return {m: model for m, model in models.items() if service in (None, model.launch.service)}

    def check(self, scope: Scope, model: Model) -> Model:
        """The model, if it may be asked for by this name. Raises BadRequest."""
        host = host_of(scope)
        service = self.service_of(host)
        if service in (None, model.launch.service):
            return model
        raise BadRequest(
            f"'{model.id}' is a model of '{model.launch.service}', and {name_of(host)} is '{service}' alone, "
            f"which has {listed(self.models_at(host))}. Ask for it by another name of this server.",
            "model",
            "other_service",
        )

    def only_model(self, scope: Scope) -> Model | None:
        """Who is meant where no model is named: the one that is ready, or the only one there is.

        None where the name is no service's. Raises BadRequest where there is a choice.
        """
        host = host_of(scope)
        if self.service_of(host) is None:
            return None
        models = self.models_at(host)
        ready = [models[instance.model] for instance in self._ready(models)]
        for choice in (ready, list(models.values())):
            if len(choice) == 1:
                return choice[0]
        raise BadRequest(f"Name a model in the field `model`: {name_of(host)} has {listed(models)}.", "model")

    def _ready(self, models: Mapping[ModelId, Model]) -> list[Instance]:
        instances = (self._loop.snapshot.instance(model) for model in sorted(models))
        return [instance for instance in instances if instance.state is State.READY]

    # --- metrics

    def wants(self, scope: Scope) -> bool:
        """True for what is answered here: the metrics of a whole service."""
        is_metrics = scope["path"] == "/metrics" and scope["method"] in ("GET", "HEAD")
        return is_metrics and query_value(scope, "model") is None and host_of(scope) in self

    async def metrics(self, session: aiohttp.ClientSession, scope: Scope, send: Send) -> None:
        """Loads nothing, and does not count as use."""
        ready = self._ready(self.models_at(host_of(scope)))
        texts = await asyncio.gather(*(scrape(session, instance) for instance in ready))
        body = merged({instance.model: text for instance, text in zip(ready, texts, strict=True)})
        headers = [(b"content-type", TEXT), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body if scope["method"] == "GET" else b""})


async def scrape(session: aiohttp.ClientSession, instance: Instance) -> bytes | None:
    """What the instance answers; None if it does not, or has no metrics."""
    assert instance.host is not None and instance.port is not None, "a ready instance has an address"
    url = upstream_url(instance.host, instance.port, b"/metrics", b"")
    try:
        async with session.get(url, timeout=aiohttp.ClientTimeout(total=SCRAPE_S)) as answer:
            return await answer.read() if answer.status == 200 else None
    except (aiohttp.ClientError, OSError, TimeoutError):
        return None


def host_of(scope: Scope) -> str:
    return header(scope, b"host").decode("latin-1")


def listed(models: Mapping[ModelId, Model]) -> str:
    return ", ".join(sorted(models)) or "no model"
