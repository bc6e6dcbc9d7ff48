"""The periodic look at everything: correct what events did not tell, and say what does not agree."""

from __future__ import annotations

import structlog

from orchestrator.control.loop import Loop
from orchestrator.control.ports import Engine, Store
from orchestrator.control.resync import corrections
from orchestrator.control.selfcheck import Difference, compare
from orchestrator.core.entities import ModelId, Note, Start
from orchestrator.core.errors import EngineError, StoreError
from orchestrator.core.events import Adopted, Strayed
from orchestrator.core.lifecycle import Instance

log = structlog.get_logger(__name__)


class Checkup:
    """Run by the clock. `differences` are those of the last run; each is told once while it lasts."""

    def __init__(self, loop: Loop, engine: Engine, store: Store) -> None:
        self._loop = loop
        self._engine = engine
        self._store = store
        self.differences: tuple[Difference, ...] = ()

    async def run(self) -> None:
        before = self._loop.snapshot
        try:
            found = await self._engine.list()
        except EngineError as error:
            log.warning("resync: the engine does not answer", error=error.message)
            return
        rows = await self._rows()
        after = self._loop.snapshot
        self._tell(compare(before, found, rows, after))
        wrong = corrections(before, found, after)
        for event in wrong.events:
            self._loop.effects.end_probe(event.attempt)
            self._loop.inbox.post(event)
        for orphan in wrong.orphans:
            self._loop.inbox.post(Strayed(orphan.model, orphan.attempt))
            self._loop.effects.perform(orphan)
        for item in wrong.lent:
            self._loop.inbox.post(Adopted(item.model, item.attempt, item.gpus))
            self._loop.effects.perform(Start(item.attempt, item.model, {}))

    async def _rows(self) -> dict[ModelId, Instance] | None:
        if self._loop.store_problem is not None:
            return None  # what could not be saved differs, and is known to
        try:
            return dict(await self._store.instances())
        except StoreError as error:
            log.warning("resync: the store cannot be read", error=error.message)
            return None

    def _tell(self, differences: tuple[Difference, ...]) -> None:
        known = {difference.key for difference in self.differences}
        self.differences = differences
        for difference in differences:
            if difference.key not in known:
                self._loop.tell(Note("difference", f"self-check: {difference.text}", difference.model))
