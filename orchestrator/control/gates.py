"""Requests in flight, by attempt. Plain synchronous counting: a request to a ready model takes no turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from orchestrator.core.entities import AttemptId, Usage
from orchestrator.core.lifecycle import Instance


class Gate:
    """One attempt's door. Whoever `enter`s must `leave`, exactly once."""

    __slots__ = (
        "_clock",
        "_on_quiet",
        "closed",
        "entered",
        "in_flight",
        "instance",
        "is_open",
        "last_ended_s",
    )

    def __init__(
        self, instance: Instance, clock: Callable[[], float], on_quiet: Callable[[Gate], None]
    ) -> None:
        self.instance = instance
        self.in_flight = 0
        self.entered = 0
        self.last_ended_s: float | None = None
        self.is_open = True
        self.closed = asyncio.Event()
        self._clock = clock
        self._on_quiet = on_quiet

    def enter(self) -> bool:
        """Count the caller in, or say that the door is closed."""
        if not self.is_open:
            return False
        self.in_flight += 1
        self.entered += 1
        return True

    def leave(self) -> None:
        self.in_flight -= 1
        self.last_ended_s = self._clock()
        if self.in_flight == 0:
            self._on_quiet(self)

    def open(self, instance: Instance) -> None:
        self.instance = instance
        self.is_open = True
        self.closed.clear()

    def close(self) -> None:
        self.is_open = False
        self.closed.set()

    def usage(self) -> Usage:
        return Usage(self.in_flight, self.entered, self.last_ended_s)


class Gates:
    """The gates of all attempts that let anybody in, or still have somebody inside."""

    def __init__(self, clock: Callable[[], float], on_quiet: Callable[[Gate], None]) -> None:
        self._clock = clock
        self._on_quiet = on_quiet
        self._by_attempt: dict[AttemptId, Gate] = {}

    def of(self, attempt: AttemptId | None) -> Gate | None:
        return self._by_attempt.get(attempt or "")

    def open(self, instance: Instance) -> Gate:
        """Open the gate of a ready instance; a new one, or the same again."""
        assert instance.attempt is not None
        gate = self._by_attempt.get(instance.attempt)
        if gate is None:
            gate = Gate(instance, self._clock, self._on_quiet)
            self._by_attempt[instance.attempt] = gate
        gate.open(instance)
        return gate

    def close(self, attempts: frozenset[AttemptId]) -> None:
        for attempt in attempts:
            gate = self._by_attempt.get(attempt)
            if gate is not None:
                gate.close()

    def forget(self, attempt: AttemptId) -> None:
        """The attempt is over. Callers inside keep their gate object and leave it when they notice."""
        gate = self._by_attempt.pop(attempt, None)
        if gate is not None:
            gate.close()

    def counts(self) -> Mapping[AttemptId, Usage]:
        return {attempt: gate.usage() for attempt, gate in self._by_attempt.items()}
