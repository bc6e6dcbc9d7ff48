"""The single writer: folds events into the snapshot, plans, saves, performs. Nothing else assigns it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import structlog

from orchestrator.control.changes import differences
from orchestrator.control.effects import Effects
from orchestrator.control.feed import Feed
from orchestrator.control.gates import Gate, Gates
from orchestrator.control.inbox import Inbox
from orchestrator.control.operations import Operations, Outcome
from orchestrator.control.ports import Store
from orchestrator.control.publisher import Publisher
from orchestrator.control.recovery import Recovered
from orchestrator.control.status import state_view
from orchestrator.control.vitals import Vitals
from orchestrator.core.entities import (
    AttemptId,
    Device,
    DeviceId,
    Model,
    ModelId,
    Note,
    OperationId,
    OperationKind,
    Sample,
    Usage,
    WaiterId,
)
from orchestrator.core.errors import DeadlineExceeded, OrchestratorError, ShuttingDown, StoreError
from orchestrator.core.events import (
    CatalogueRead,
    DownloadAsked,
    Event,
    ForgettingAsked,
    LoadAsked,
    NothingToDownload,
    RemovalAsked,
    UnloadAsked,
    WaiterCame,
    WaiterLeft,
    Woken,
)
from orchestrator.core.fold import fold
from orchestrator.core.lifecycle import AT_REST, Instance, State
from orchestrator.core.planner import make_plan
from orchestrator.core.snapshot import Snapshot, apply, finish_loads
from orchestrator.core.verdicts import Ready, Verdict
from orchestrator.core.wording import explain

log = structlog.get_logger(__name__)

STORE_RETRY_S = 1.0
COMMANDS = (LoadAsked, UnloadAsked, DownloadAsked, NothingToDownload, RemovalAsked)
INTENTS = (*COMMANDS, ForgettingAsked)
OF_MODELS = (LoadAsked, UnloadAsked)
ASKED = (*COMMANDS, WaiterCame)
TROUBLE = frozenset({"failed", "stuck", "leak", "unseen", "gpu_error", "unmeasured", "difference", "late"})
"""Kinds of lines that an owner should look at: warnings."""


class NotReady(OrchestratorError):
    """The wait for a ready instance ended otherwise; `verdict` says how."""

    def __init__(self, verdict: Verdict, now_s: float) -> None:
        super().__init__(explain(verdict, now_s).message)
        self.verdict = verdict
        self.now_s = now_s


@dataclass(slots=True)
class Waiter:
    model: ModelId
    deadline_s: float
    future: asyncio.Future[Gate]


class Loop:
    """Owns the snapshot. Everybody else reads it, posts events, or waits for a ready instance."""

    def __init__(
        self,
        snapshot: Snapshot,
        store: Store,
        effects: Callable[[Callable[[Event], None], Callable[[], Mapping[ModelId, Model]]], Effects],
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._snapshot = snapshot
        self._saved = snapshot
        self._store = store
        self._clock = clock
        self._wall = wall
        self.inbox = Inbox(clock)
        self.feed = Feed(first_id=int(wall() * 1e6))
        self.vitals = Vitals(clock)
        self.effects = effects(self.inbox.post, lambda: self._snapshot.models)
        self._gates = Gates(clock, self._on_quiet)
        self._open: dict[ModelId, Gate] = {}
        self._waiters: dict[WaiterId, Waiter] = {}
        self._operations = Operations()
        self._publisher = Publisher(self.feed)
        self._numbers = itertools.count(1)
        self._wake_at_s: float | None = None
        self._group: asyncio.TaskGroup | None = None
        self._renewals: list[asyncio.Future[None]] = []
        self._forgetting: list[tuple[ForgettingAsked, asyncio.Future[None]]] = []
        self._postponed: list[Event] = []  # commands for when the store works again
        self._retry_at_s = 0.0
        self._is_saving = False
        self._is_closing = False
        self.store_problem: str | None = None

    # --- reading

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    def as_of_now(self) -> Snapshot:
        """The snapshot by the time it is now: what is shown grows old also while no turn is taken."""
        return replace(self._snapshot, now_s=self._clock(), wall_s=self._wall())

    def usage(self) -> Mapping[AttemptId, Usage]:
        return self._gates.counts()

    def view(self) -> dict[str, object]:
        """Everything, of one moment, and how the loop itself is doing; ready for JSON."""
        return state_view(self.as_of_now(), self.usage()) | {"loop": self.vitals.view(len(self.inbox))}

    def tell(self, note: Note) -> None:
        """Write a line to the event log that no turn has brought about."""
        self._write_log((note,))
        self._publisher.publish_note(note)

    # --- asking

    def try_enter(self, model: ModelId) -> Gate | None:
        """The gate of a ready instance, entered; None if there is none to enter now. Takes no turn."""
        gate = self._open.get(model)
        return gate if gate is not None and gate.enter() else None

    async def wait_ready(self, model: ModelId, deadline_s: float) -> Gate:
        """Wait until an instance is ready, and return its gate, entered; the caller must leave it.

        Loads the model if need be. `deadline_s` is monotonic. Raises NotReady with the verdict,
        DeadlineExceeded with what it waited for, or ShuttingDown. A caller that is cancelled only ends
        its own wait.
        """
        if self._is_closing:
            raise ShuttingDown("The orchestrator is stopping.")
        came_s = self._clock()
        key = f"r{next(self._numbers)}"
        future: asyncio.Future[Gate] = asyncio.get_running_loop().create_future()
        self._waiters[key] = Waiter(model, deadline_s, future)
        self.inbox.post(WaiterCame(model, key, deadline_s))
        is_in = False
        try:
            async with asyncio.timeout(max(0.0, deadline_s - came_s)):
                gate = await future
                is_in = True
                return gate
        except TimeoutError:
            raise DeadlineExceeded(model, self._clock() - came_s, self._waiting_reason(model)) from None
        finally:
            self._end_wait(key, future, is_in)

    def _end_wait(self, key: WaiterId, future: asyncio.Future[Gate], is_in: bool) -> None:
        """Leave the queue, and leave the gate if we were let in at the very moment we gave up."""
        waiter = self._waiters.pop(key, None)
        if waiter is not None:
            self.inbox.post(WaiterLeft(waiter.model, key))
        if not is_in and future.done() and not future.cancelled() and future.exception() is None:
            future.result().leave()

    def _waiting_reason(self, model: ModelId) -> str:
        entry = self._snapshot.entries.get(model)
        instance = self._snapshot.instance(model)
        if entry is not None and instance.state in (State.QUEUED, State.CLAIMED, *AT_REST):
            return entry.reason
        return f"it is {instance.state}"

    async def load(self, model: ModelId, *, pin: bool | None = None) -> Outcome:
        """Ask for the model. Returns once that is decided and saved; it may have failed already."""
        return await self.command(lambda key: LoadAsked(model, key, pin))

    async def unload(self, model: ModelId, *, force: bool = False, hold_s: float | None = None) -> Outcome:
        """Ask for the model to go. Returns once that is decided and saved."""
        return await self.command(lambda key: UnloadAsked(model, key, force, hold_s))

    def _new_operation_id(self) -> OperationId:
        return f"op-{self._snapshot.seed}-{next(self._numbers)}"

    async def command(self, ask: Callable[[OperationId], Event]) -> Outcome:
        """Ask for something under an operation of its own. Returns once that is decided and saved."""
        if self._is_closing:
            raise ShuttingDown("The orchestrator is stopping.")
        key = self._new_operation_id()
        decided = self._operations.accept(key)
        self.inbox.post(ask(key))
        return await decided

    async def finished(self, outcome: Outcome, timeout_s: float) -> Outcome:
        """Wait for the operation's end, at most `timeout_s`; then it is returned as it stands."""
        operation = outcome.operation
        ended = await self._operations.finished(operation.id, timeout_s)
        return ended or Outcome(self._snapshot.operations.get(operation.id, operation))

    async def renew(
        self, models: Mapping[ModelId, Model], devices: Mapping[DeviceId, Device], *news: Event
    ) -> None:
        """Take in a catalogue that was read again, and the news that go with it; returns once it counts."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._renewals.append(future)
        for event in (CatalogueRead(models, devices), *news):  # one turn takes all of them
            self.inbox.post(event)
        await future

    async def forget(self, keys: Collection[str]) -> None:
        """Forget these rows of what was learned; returns once that is saved. Raises StoreError if it is not.

        What a model of theirs that is ready holds is noted anew with the next sample.
        """
        if self._is_closing:
            raise ShuttingDown("The orchestrator is stopping.")
        asked = ForgettingAsked(frozenset(keys))
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._forgetting.append((asked, future))
        self.inbox.post(asked)
        await future

    # --- turning

    async def run(self, recovered: Recovered, restore: Iterable[ModelId] = ()) -> None:
        """Turn until cancelled.

        First comes what was recovered, then the operations that had not ended (their users still ask),
        then the models to `restore`.
        """
        async with asyncio.TaskGroup() as group:
            self._group = group
            self.effects.attach(group)
            self._take_over(recovered)
            self._ask_again()
            for model in restore:
                self.inbox.post(LoadAsked(model, self._new_operation_id()))
            while True:
                events = await self.inbox.drain(self._wake_at_s)
                self.vitals.turn_begins(len(events))
                await self._turn(events)
                self.vitals.turn_ends()

    def _take_over(self, recovered: Recovered) -> None:
        for attempt in recovered.adopted:
            model = next(i.model for i in recovered.instances.values() if i.attempt == attempt)
            self.effects.know(attempt, model)
        # Measuring begins now, however long the engine took to answer.
        unmeasured = Sample(self._clock())
        self._snapshot = replace(self._snapshot, instances=recovered.instances, sample=unmeasured)
        for instance in recovered.instances.values():
            self._tend_gate(instance)
        for action in recovered.actions:
            self.effects.perform(action)
        # Whoever has asked already, asked a server that did not know of these ends yet.
        self.inbox.post_first(recovered.events)
        self._write_log(recovered.notes)
        self.inbox.post(Woken())

    def _ask_again(self) -> None:
        for operation in self._snapshot.operations.values():
            if operation.kind is OperationKind.UNLOAD:
                self.inbox.post(UnloadAsked(operation.model, operation.id))
            elif operation.kind is OperationKind.LOAD:  # downloads have rows of their own to go on from
                self.inbox.post(LoadAsked(operation.model, operation.id))

    async def _turn(self, events: list[Event]) -> None:
        now_s, wall_s = self._clock(), self._wall()
        if self._postponed and (now_s >= self._retry_at_s or any(isinstance(e, ASKED) for e in events)):
            events, self._postponed = [*self._postponed, *events], []  # what was asked first comes first
        folded = fold(self._snapshot, events, now_s=now_s, wall_s=wall_s)
        plan = make_plan(folded, self._gates.counts())
        self._gates.close(plan.closing)  # their counts were just read, with no await between
        decided = apply(folded, plan)
        try:
            await self._save(decided)
        except StoreError as error:
            self._undo(events, error, now_s, wall_s)
            return
        before, self._snapshot = self._snapshot, decided
        self._wake_at_s = plan.wake_at_s
        for action in plan.actions:
            self.effects.perform(action)
        self._settle_forgetting(events)
        self._after_turn(before, decided, events)

    async def _save(self, decided: Snapshot) -> None:
        changes = differences(self._saved, decided)
        if changes:
            self._is_saving = True
            self.vitals.enter("saving")
            try:
                await self._store.save(changes)
            finally:
                self._is_saving = False
                self.vitals.saved()
            self.vitals.enter("performing")
            self.store_problem = None
        self._saved = decided

    def _undo(self, events: list[Event], error: StoreError, now_s: float, wall_s: float) -> None:
        """Nothing was remembered, so nothing is done: observations count, commands are refused."""
        log.error("state not saved; nothing was started or stopped", error=error.message)
        self.store_problem = error.message
        observed = [event for event in events if not isinstance(event, INTENTS)]
        before = self._snapshot
        folded = fold(before, observed, now_s=now_s, wall_s=wall_s)
        ended = finish_loads(folded.operations, folded.verdicts, folded)
        self._snapshot = replace(folded, operations=ended)
        self._wake_at_s = self._retry_at_s = now_s + STORE_RETRY_S
        for event in events:
            if isinstance(event, COMMANDS) and not self._operations.refuse(
                event.operation, StoreError(error.message)
            ):
                self._postponed.append(event)  # nobody is there to be refused: asked before a restart
        self._settle_forgetting(events, StoreError(error.message))
        for instance in self._snapshot.instances.values():
            self._tend_gate(instance)  # those that were closing open again
        self._after_turn(before, self._snapshot, observed)

    def _after_turn(self, before: Snapshot, after: Snapshot, events: Iterable[Event]) -> None:
        changed = [
            instance
            for model, instance in after.instances.items()
            if before.instances.get(model) is not instance
        ]
        for instance in changed:
            self._tend_gate(instance)
            old = before.instances.get(instance.model)
            if old is not None and old.attempt and old.attempt != instance.attempt:
                self._gates.forget(old.attempt)
                self.effects.forget(old.attempt)
        for key, verdict in after.verdicts.items():
            self._deliver(key, verdict)
        self._operations.settle(before, after)
        if any(isinstance(event, CatalogueRead) for event in events):
            self._settle_renewals()
        self._write_log(after.notes)
        asked = {event.model for event in events if isinstance(event, OF_MODELS)}
        self._publisher.publish(before, after, asked, self._gates.counts())

    def _tend_gate(self, instance: Instance) -> None:
        """Open to a ready instance; closed to one that leaves; forgotten with one that is gone."""
        if instance.state is State.READY and instance.port is not None:
            self._open[instance.model] = self._gates.open(instance)
            return
        self._open.pop(instance.model, None)
        if instance.attempt and instance.state in (State.RECLAIMING, *AT_REST):
            self._gates.forget(instance.attempt)

    def _deliver(self, key: WaiterId, verdict: Verdict) -> None:
        waiter = self._waiters.get(key)
        if waiter is None or waiter.future.done():
            return
        if not isinstance(verdict, Ready):
            del self._waiters[key]
            waiter.future.set_exception(NotReady(verdict, self._snapshot.now_s))
            return
        gate = self.try_enter(waiter.model)
        if gate is None:  # closed again within this turn: wait on
            self.inbox.post(WaiterCame(waiter.model, key, waiter.deadline_s))
            return
        del self._waiters[key]
        waiter.future.set_result(gate)

    def _settle_renewals(self) -> None:
        for future in self._renewals:
            if not future.done():
                future.set_result(None)
        self._renewals.clear()

    def _settle_forgetting(self, events: list[Event], error: StoreError | None = None) -> None:
        """Tell those whose wish was among the events of a turn."""
        settled = [(asked, future) for asked, future in self._forgetting if asked in events]
        self._forgetting = [waiting for waiting in self._forgetting if waiting not in settled]
        for _, future in settled:
            if future.done():  # whoever asked has left
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def _write_log(self, notes: tuple[Note, ...]) -> None:
        for note in notes:
            (log.warning if note.kind in TROUBLE else log.info)(note.text)
        if notes and self._group is not None:
            self._group.create_task(self._log_to_store(notes))

    async def _log_to_store(self, notes: tuple[Note, ...]) -> None:
        try:
            await self._store.log(notes)
        except StoreError as error:
            log.error("event log not written", error=error.message)

    def _on_quiet(self, gate: Gate) -> None:
        """Nobody is inside any more: the planner wants to know if somebody waits for that."""
        if self._is_saving or self._snapshot.entries or not gate.is_open:
            self.inbox.post(Woken())

    # --- ending

    def close(self) -> None:
        """Take no new work and end every wait."""
        self._is_closing = True
        for waiter in self._waiters.values():
            if not waiter.future.done():
                waiter.future.set_exception(ShuttingDown("The orchestrator is stopping."))
        self._settle_renewals()
        for _, future in self._forgetting:
            if not future.done():
                future.set_exception(ShuttingDown("The orchestrator is stopping."))
        self._operations.close(ShuttingDown("The orchestrator is stopping."))
        self.feed.close()
