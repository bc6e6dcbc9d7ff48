"""Asks the engine for the names of containers that foreign processes run in, outside of the turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from orchestrator.control.loop import Loop
from orchestrator.control.ports import Engine
from orchestrator.core.entities import ContainerId
from orchestrator.core.errors import EngineError
from orchestrator.core.events import ContainerNamed
from orchestrator.core.foreign import containers_in

log = structlog.get_logger(__name__)

LOOK_S = 0.5
KEPT_S = 60.0
"""An answer counts for as long; then the container may have another name."""

RETRY_S = 10.0
"""After an error nothing is asked for so long."""


@dataclass(frozen=True, slots=True)
class _Answer:
    name: str | None
    until_s: float


class ContainerNames:
    """Looks at the newest sample, and tells the loop the names that its snapshot lacks.

    One question at a time: however many containers there are, a bad engine is asked once in `RETRY_S`.
    """

    def __init__(self, loop: Loop, engine: Engine, clock: Callable[[], float]) -> None:
        self._loop = loop
        self._engine = engine
        self._clock = clock
        self._answers: dict[ContainerId, _Answer] = {}
        self._retry_at_s = 0.0
        self._is_failing = False

    async def run(self) -> None:
        """Look twice a second until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Ask for each name that is not known, or was told long ago."""
        shown, now_s = containers_in(self._loop.snapshot.sample), self._clock()
        # Also one that is not shown: a device which cannot be read for a moment is no reason to ask again.
        self._answers = {c: a for c, a in self._answers.items() if c in shown or now_s < a.until_s}
        for container in sorted(shown):
            name = await self._name_of(container)
            if name is not None and self._loop.snapshot.container_names.get(container) != name:
                self._loop.inbox.post(ContainerNamed(container, name))

    async def _name_of(self, container: ContainerId) -> str | None:
        now_s = self._clock()
        known = self._answers.get(container)
        name = known.name if known else None
        if now_s < self._retry_at_s or (known and now_s < known.until_s):
            return name
        try:
            # One that is gone keeps its name for as long as its memory is shown.
            name = await self._engine.container_name(container) or name
        except EngineError as error:
            self._put_off(error)
            return name
        self._is_failing = False
        self._answers[container] = _Answer(name, self._clock() + KEPT_S)
        return name

    def _put_off(self, error: EngineError) -> None:
        self._retry_at_s = self._clock() + RETRY_S
        if not self._is_failing:
            log.warning("containers of others cannot be named now", error=error.message)
        self._is_failing = True
