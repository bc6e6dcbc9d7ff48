"""What must hold at every moment, checked on the simulated machine: never on what the loop believes.

A failure here is an AssertionError, wherever in the simulation it happens.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from orchestrator.control.gates import Gate
from orchestrator.control.ports import StartOrder
from orchestrator.core.entities import (
    Action,
    AttemptId,
    DeviceId,
    Model,
    ModelId,
    OperationState,
    Sample,
    Start,
)
from orchestrator.core.lifecycle import AT_REST, State
from tests.control.machine import DEVICES, Process

if TYPE_CHECKING:
    from tests.control.simulation import Client, Life, Simulation

UNKNOWN_DRAIN_LIMIT_S = 600.0
ROUNDING_S = 0.01
OLDEST_SAMPLE_S = 3.0


class Promises:
    """Listens to the simulation, and looks at it after every step."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.decided_on: dict[AttemptId, Sample] = {}
        self.stop_ordered: set[AttemptId] = set()
        self.closed_at_s: dict[AttemptId, float] = {}
        self.may_be_forced: set[AttemptId] = set()
        self.may_leave: set[AttemptId] = set()  # somebody unloaded it, or its model left the catalogue
        self.pinned: set[ModelId] = set()
        self.unpinned: set[ModelId] = set()  # by a load that said so, whatever the catalogue says
        self.unpinnings: Counter[ModelId] = Counter()
        self.firmly_pinned: set[AttemptId] = set()
        self.unloads_under_way: list[ModelId] = []
        self.broken: list[str] = []
        self.seen: Counter[str] = Counter()  # how often what was checked has happened

    # --- what users do

    def asked(self, kind: str, model: ModelId, how: Mapping[str, object]) -> int:
        """Returns what `answered` wants to know: whether somebody has unpinned it in between."""
        self._asked(kind, model, how)
        return self.unpinnings[model]

    def _asked(self, kind: str, model: ModelId, how: Mapping[str, object]) -> None:
        if kind == "load":
            if how["pin"] is False:
                self._unpin(model)
                self.unpinned.add(model)
            return
        self._unpin(model)
        self.unloads_under_way.append(model)
        self.may_leave |= self._attempts_of(model)
        if how["force"]:
            self.may_be_forced |= self._attempts_of(model)

    def answered(
        self, kind: str, model: ModelId, how: Mapping[str, object], unpinnings: int, *, accepted: bool
    ) -> None:
        if kind == "unload":
            self.may_leave |= self._attempts_of(model)
            if how["force"]:
                self.may_be_forced |= self._attempts_of(model)
            self.unloads_under_way.remove(model)
            if accepted:
                self.unpinned.discard(model)
        elif how["pin"] and accepted and unpinnings == self.unpinnings[model]:
            self.pinned.add(model)
            self.unpinned.discard(model)

    def _unpin(self, model: ModelId) -> None:
        self.unpinnings[model] += 1
        self.pinned.discard(model)
        self.firmly_pinned -= self._attempts_of(model)

    def _attempts_of(self, model: ModelId) -> set[AttemptId]:
        machine = self.simulation.machine
        asked = {r.order.attempt for r in machine.requests if r.order.model == model}
        return asked | {p.attempt for p in machine.processes.values() if p.model == model}

    def reloaded(self, before: Mapping[ModelId, Model], after: Mapping[ModelId, Model]) -> None:
        for model in before.keys() - after.keys():
            self.may_leave |= self._attempts_of(model)

    def forget_life(self) -> None:
        self.closed_at_s.clear()
        self.firmly_pinned.clear()
        self.unloads_under_way.clear()

    # --- what the loop does

    def ordered(self, life: Life, action: Action) -> None:
        if isinstance(action, Start):
            sample = life.loop.snapshot.sample
            self.decided_on[action.attempt] = sample
            age_s = life.loop.snapshot.now_s - sample.taken_at_s
            is_young = age_s <= OLDEST_SAMPLE_S + ROUNDING_S
            self.claim(is_young, f"'{action.model}' was started on a sample that is {age_s} s old")
            return
        self.stop_ordered.add(action.attempt)
        self.seen["evicted" if action.reason.startswith("evicted") else "stopped"] += 1
        process = self.simulation.machine.processes.get(action.attempt)
        if process is None or not process.is_alive:
            return
        self._check_nobody_is_cut(process)
        if action.attempt in self.firmly_pinned:
            excused = action.attempt in self.may_leave or action.model in self.unloads_under_way
            self.claim(excused, f"pinned '{action.model}' was stopped: {action.reason}")

    def _check_nobody_is_cut(self, process: Process) -> None:
        inside = self.inside(process.attempt)
        if not inside:
            return
        self.seen["stopped with somebody inside"] += 1
        if process.attempt in self.may_be_forced:
            return
        model = self.simulation.models.get(process.model)
        limit_s = model.drain_limit_s if model else UNKNOWN_DRAIN_LIMIT_S
        closed_s = self.closed_at_s.get(process.attempt)
        has_drained = closed_s is not None and self.simulation.clock() - closed_s >= limit_s - ROUNDING_S
        self.claim(has_drained, f"'{process.model}' was stopped with {len(inside)} inside")

    def started(self, life: Life, order: StartOrder) -> None:
        row = life.machine.disk.instances.get(order.model)
        is_remembered = row is not None and row.attempt == order.attempt
        self.claim(is_remembered, f"'{order.model}' was started before it was remembered")

    def entered(self, gate: Gate) -> None:
        """Whoever is let in is let into something healthy that nobody has asked to end."""
        attempt = gate.instance.attempt or ""
        self.seen["entered"] += 1
        process = self.simulation.machine.processes.get(attempt)
        self.claim(process is not None and process.is_loaded, f"entered {attempt}, which is not healthy")
        self.claim(attempt not in self.stop_ordered, f"entered {attempt}, which is to be stopped")

    # --- what the machine does

    def really_started(self, process: Process) -> None:
        """At the very moment of an engine's start: one attempt per model, and room for all of it.

        The start was decided on a sample. Programs of others that came after that sample can take the
        room between the decision and the start, and nobody could have known; so of theirs counts what
        that sample showed and is still there. Of our own everything counts in full and as it is now,
        whatever the sample showed: also what they have not taken yet, and what the dead have not given
        back. What an engine starts late, for a caller that is dead or was told otherwise, was never
        decided: it is nobody's promise, and counts like the programs of others.
        """
        self.seen["started late" if process.is_late else "started"] += 1
        if process.is_late:
            return
        machine = self.simulation.machine
        twins = [p for p in machine.alive(process.model) if p is not process and not p.is_late]
        self.claim(not twins, f"'{process.model}' runs twice")
        sample = self.decided_on.get(process.attempt)
        if sample is None:
            self.claim(False, f"'{process.model}' was started and nobody had decided it")
            return
        for device, full in process.full.items():
            self.claim(device in sample.readings, f"'{process.model}' started on {device}, which is unknown")
            limit = DEVICES[device].usable_bytes
            total = full + self._occupied(device, process, sample)
            self.claim(total <= limit, f"{device} is overbooked by '{process.model}': {total} of {limit}")

    def _occupied(self, device: DeviceId, new: Process, sample: Sample) -> int:
        reading = sample.readings.get(device)
        then = {p.pid: p.used_bytes for p in reading.foreign} if reading else {}
        machine = self.simulation.machine
        total = sum(min(size, then.get(pid, 0)) for pid, (d, size) in machine.foreign.items() if d == device)
        for process in machine.processes.values():
            if process is new:
                continue
            if process.is_late:
                seen = reading.by_attempt.get(process.attempt, 0) if reading else 0
                total += min(seen, process.on_device(device))
            elif process.is_alive:
                total += process.full.get(device, 0)
            else:
                total += process.on_device(device)
        return total

    # --- at every step

    def inside(self, attempt: AttemptId) -> list[Client]:
        clients = self.simulation.clients
        return [c for c in clients if c.gate is not None and c.gate.instance.attempt == attempt]

    def check(self) -> None:
        """Between any two awaits."""
        simulation = self.simulation
        if simulation.running.done():
            simulation.running.result()
            raise AssertionError("the loop ended by itself")
        for client in simulation.clients:
            if client.gate is None:
                continue
            attempt = client.gate.instance.attempt or ""
            if client.gate.is_open:
                if self.closed_at_s.pop(attempt, None) is not None:
                    self.seen["opened again"] += 1
            else:
                self.closed_at_s.setdefault(attempt, simulation.clock())
        for device in DEVICES:
            self.claim(simulation.machine.free_bytes(device) >= 0, f"{device} holds more than it can")
        self.tell()

    def check_quiet(self) -> None:
        """When every task has gone as far as it can without time passing."""
        self.check()
        simulation = self.simulation
        for client, task in list(simulation.clients.items()):
            if task.done():
                if not task.cancelled():
                    task.result()
                del simulation.clients[client]
            elif client.is_waiting:
                late_s = simulation.clock() - client.deadline_s
                self.claim(late_s <= ROUNDING_S, f"a request for '{client.model}' waits {late_s} s too long")
        self._check_counts()
        self._check_pins()
        self._check_open_gates()
        self.tell()

    def _check_counts(self) -> None:
        for attempt, usage in self.simulation.life.loop.usage().items():
            inside = len(self.inside(attempt))
            self.claim(
                usage.in_flight == inside, f"{attempt} counts {usage.in_flight}, and has {inside} inside"
            )

    def _check_pins(self) -> None:
        """An instance that served while its pin counted stays pinned until somebody unpins it."""
        simulation = self.simulation
        snapshot = simulation.life.loop.snapshot
        for name, instance in snapshot.instances.items():
            model = simulation.models.get(name)
            by_catalogue = model is not None and model.pinned and name not in self.unpinned
            is_pinned = name in self.pinned or by_catalogue
            if (
                is_pinned
                and instance.attempt
                and instance.state is State.READY
                and not instance.unload_wanted
            ):
                self.firmly_pinned.add(instance.attempt)

    def _check_open_gates(self) -> None:
        """Nobody can enter what is known to be dead, and nobody waits for what is ready.

        Unless the loop is just busy saving that.
        """
        life = self.simulation.life
        if life.store.under_way is not None:
            return
        for name in self.simulation.models:
            instance = life.loop.snapshot.instance(name)
            process = self.simulation.machine.processes.get(instance.attempt or "")
            if process is not None and instance.state is State.READY:
                told = not process.is_alive and process.was_told
                self.claim(not told, f"'{name}' is dead, the loop was told, and it is still open")
            waits = any(c.is_waiting and c.model == name for c in self.simulation.clients)
            is_open = instance.state is State.READY and not instance.unload_wanted
            self.claim(not (waits and is_open), f"'{name}' is ready, and somebody still waits for it")

    # --- at the end

    def check_settled(self) -> None:
        """Faults are over and time has passed: nothing waits, and what is believed is what there is."""
        simulation = self.simulation
        loop = simulation.life.loop
        for client in simulation.clients:
            self.claim(not client.is_waiting, f"a request for '{client.model}' still waits")
        self.claim(not loop.snapshot.entries, f"somebody still waits: {dict(loop.snapshot.entries)}")
        for command in simulation.commands:
            self.claim(command.task.done(), f"the {command.kind} of '{command.model}' has not ended")
        for operation in loop.snapshot.operations.values():
            self.claim(operation.ended_at is not None, f"{operation} has not ended")
        for operation in simulation.machine.disk.operations.values():
            self.claim(operation.state is not OperationState.RUNNING, f"{operation} is open on the disk")
        living = {p.attempt for p in simulation.machine.alive()}
        held = {i.attempt: i for i in loop.snapshot.instances.values() if i.state not in AT_REST}
        self.claim(living <= held.keys(), f"nobody knows of {living - held.keys()}")
        self.claim(held.keys() <= living, f"nothing is behind {[held[a] for a in held.keys() - living]}")
        for instance in held.values():
            self.claim(instance.state is State.READY, f"'{instance.model}' is still {instance.state}")
        self._check_nothing_is_kept(set(held))
        differences = simulation.life.checkup.differences
        self.claim(not differences, f"the self-check still finds {differences}")
        self.tell()

    def _check_nothing_is_kept(self, held: set[AttemptId | None]) -> None:
        """Of attempts that are over and of waits that have ended nothing stays behind, whatever became of
        them: a server runs for months."""
        loop = self.simulation.life.loop
        snapshot, effects, operations = loop.snapshot, loop.effects, loop._operations
        newest = {instance.attempt for instance in snapshot.instances.values()}
        kept: dict[str, Iterable[object]] = {
            "measured": snapshot.measured.keys() - held,
            "started_as": snapshot.started_as.keys() - held,
            "logged": snapshot.logged.keys() - held,
            "progress": snapshot.progress,
            "usage": loop.usage().keys() - held,
            "owners": effects._owners.keys() - newest,
            "effects under way": effects._starts | effects._stops | effects._given_up | effects._gone,
            "probes": effects._probing,
            "waiters": loop._waiters,
            "commands": operations._accepted.keys() | operations._finished.keys(),
            "outcomes": operations._outcomes.keys() - snapshot.operations.keys(),
        }
        for what, left in kept.items():
            self.claim(not left, f"{what}: {list(left)} are kept")

    def check_empty(self) -> None:
        """Everything was unloaded: the devices hold what leaks and what others have, and no more."""
        simulation = self.simulation
        self.check_settled()
        self.claim(not simulation.machine.alive(), "something still runs")
        for attempt, usage in simulation.life.loop.usage().items():
            self.claim(usage.in_flight == 0, f"{attempt} still counts {usage.in_flight}")
        waiting = [task for task in asyncio.all_tasks(simulation.aio) if task is not simulation.running]
        self.claim(not waiting, f"tasks are left: {[task.get_name() for task in waiting]}")
        self.tell()

    # --- telling

    def claim(self, holds: bool, what: str) -> None:
        """Remember what is broken; it is told at the next check, outside of the loop's own tasks."""
        if not holds:
            self.broken.append(f"{what} (at {self.simulation.clock():.3f} s)")

    def tell(self) -> None:
        assert not self.broken, "; ".join(self.broken)
