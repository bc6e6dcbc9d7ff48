"""What the routers share: the loop, the catalogue, and what was found at the start."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from fastapi import Request

from orchestrator.api.hostnames import Hostnames
from orchestrator.control.checkup import Checkup
from orchestrator.control.downloads import Downloads
from orchestrator.control.keyring import KeyRing
from orchestrator.control.loop import Loop
from orchestrator.control.ports import Engine, Store
from orchestrator.core.entities import Model
from orchestrator.core.preview import Alternatives


@dataclass(slots=True)
class Context:
    """One running server. `found` says in words what was picked at the start, and why."""

    loop: Loop
    downloads: Downloads
    checkup: Checkup
    engine: Engine
    store: Store
    keyring: KeyRing
    hostnames: Hostnames
    resolve: Callable[[str], Model]
    alternatives: Callable[[Model, Mapping[str, int]], Alternatives | None]
    reload_catalogue: Callable[[], Awaitable[None]]
    diagnose: Callable[[], Awaitable[dict[str, object]]]
    version: str
    started_at: int
    found: list[str] = field(default_factory=list)
    engine_problem: str | None = None
    catalogue_problem: str | None = None


def context_of(request: Request) -> Context:
    context: Context = request.app.state.context
    return context
