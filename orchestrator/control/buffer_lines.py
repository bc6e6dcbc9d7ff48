"""Reads what a service that is ready has printed of its buffers, outside of the turns."""

from __future__ import annotations

import asyncio

import structlog

from orchestrator.control.ports import Engine
from orchestrator.core.buffers import Buffers, buffers_in
from orchestrator.core.entities import AttemptId, ModelId
from orchestrator.core.errors import EngineError

log = structlog.get_logger(__name__)

SETTLES_S = 1.0
"""After a service is ready; an engine may be late in writing down what was printed."""

LIMIT_S = 10.0
LINES = 5000
MOST_BYTES = 1 << 20


async def logged_buffers(engine: Engine, model: ModelId, attempt: AttemptId) -> Buffers:
    """Empty where nothing is said of them, and where the log cannot be read: then only less is known."""
    await asyncio.sleep(SETTLES_S)
    try:
        async with asyncio.timeout(LIMIT_S):
            return buffers_in(await _text(engine, model, attempt))
    except (EngineError, TimeoutError) as error:
        log.debug("a log was not read for its buffers", model=model, error=str(error))
        return {}


async def _text(engine: Engine, model: ModelId, attempt: AttemptId) -> str:
    found = bytearray()
    async for chunk in engine.logs(model, attempt, tail=LINES, follow=False):
        found += chunk[: MOST_BYTES - len(found)]  # all is read, as a stream is best left at its end
    return found.decode(errors="replace")
