"""Callers who wait for an operation: until it is decided and saved, and until it has ended."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from orchestrator.core.entities import Operation, OperationId
from orchestrator.core.errors import OrchestratorError
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.verdicts import Verdict


@dataclass(frozen=True, slots=True)
class Outcome:
    """An operation as it stands, with the verdict that ended it, if one did."""

    operation: Operation
    verdict: Verdict | None = None


class Operations:
    """Futures by operation id; the loop settles them after each turn."""

    def __init__(self) -> None:
        self._accepted: dict[OperationId, asyncio.Future[Outcome]] = {}
        self._finished: dict[OperationId, list[asyncio.Future[Outcome]]] = {}
        self._outcomes: dict[OperationId, Outcome] = {}

    def accept(self, key: OperationId) -> asyncio.Future[Outcome]:
        """The answer to a command: its outcome once it is decided and saved."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._accepted[key] = future
        return future

    def refuse(self, key: OperationId, error: OrchestratorError) -> bool:
        """Tell the caller that the command did not happen; False if nobody is there to be told."""
        future = self._accepted.pop(key, None)
        if future is not None and not future.done():
            future.set_exception(error)
        return future is not None

    async def finished(self, key: OperationId, timeout_s: float) -> Outcome | None:
        """Wait for the operation's end, at most `timeout_s`; None if it goes on."""
        ended = self._outcomes.get(key)
        if ended is not None:
            return ended
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        waiting = self._finished.setdefault(key, [])
        waiting.append(future)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            return None
        finally:
            waiting.remove(future)
            if not waiting and self._finished.get(key) is waiting:
                del self._finished[key]

    def settle(self, before: Snapshot, after: Snapshot) -> None:
        """Answer whoever waits for what this turn has changed."""
        if before.operations is after.operations:
            return
        for key, operation in after.operations.items():
            if before.operations.get(key) is operation:
                continue
            outcome = Outcome(operation, after.verdicts.get(key))
            answer(self._accepted.pop(key, None), outcome)
            if operation.ended_at is not None:
                self._outcomes[key] = outcome
                for future in self._finished.get(key, ()):
                    answer(future, outcome)
        for gone in self._outcomes.keys() - after.operations.keys():
            del self._outcomes[gone]

    def close(self, error: OrchestratorError) -> None:
        """End every wait."""
        futures = [*self._accepted.values(), *(f for fs in self._finished.values() for f in fs)]
        for future in futures:
            if not future.done():
                future.set_exception(error)


def answer(future: asyncio.Future[Outcome] | None, outcome: Outcome) -> None:
    if future is not None and not future.done():
        future.set_result(outcome)
