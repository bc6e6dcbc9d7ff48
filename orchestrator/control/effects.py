"""What the loop has decided, performed. Every outcome goes back to the inbox as an event."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import assert_never

import structlog

from orchestrator.control.buffer_lines import logged_buffers
from orchestrator.control.ports import Engine, Exit, Found, Probe, StartOrder
from orchestrator.core.entities import (
    LOADING,
    NOBODY_LISTENS,
    Action,
    AttemptId,
    Device,
    DeviceId,
    DeviceKind,
    Model,
    ModelId,
    Progress,
    Start,
    Stop,
)
from orchestrator.core.errors import Cancelled, EngineError, EngineUnavailable
from orchestrator.core.events import BecameHealthy, BuffersLogged, Ended, Event, Progressed, Started

log = structlog.get_logger(__name__)

FIRST_PROBE_S = 0.02
LAST_PROBE_S = 0.25
PROBE_GROWTH = 1.02
ENGINE_RETRY_S = 1.0


class Effects:
    """Starts and stops, each a task of the group. What raises here is a bug and ends the process.

    `models` is asked at the time of the start, so a reloaded catalogue counts; of `devices` only the GPUs
    matter, which stay as they are.
    """

    def __init__(
        self,
        engine: Engine,
        probe: Probe,
        post: Callable[[Event], None],
        models: Callable[[], Mapping[ModelId, Model]],
        devices: Mapping[DeviceId, Device],
    ) -> None:
        self._engine = engine
        self._probe = probe
        self._post = post
        self._models = models
        self._devices = devices
        self._owners: dict[AttemptId, ModelId] = {}
        self._starts: set[AttemptId] = set()  # under way
        self._stops: set[AttemptId] = set()
        self._given_up: set[AttemptId] = set()  # to be stopped: no start of theirs may still happen
        self._gone: set[AttemptId] = set()  # seen to end before the engine has answered their start
        self._probing: dict[AttemptId, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None

    def attach(self, group: asyncio.TaskGroup) -> None:
        self._group = group

    def perform(self, action: Action) -> None:
        assert self._group is not None, "attach a task group first"
        self._owners[action.attempt] = action.model
        match action:
            case Start():
                self._group.create_task(self._start(action), name=f"start {action.model}")
            case Stop():
                self._group.create_task(self._stop(action), name=f"stop {action.model}")
            case _:
                assert_never(action)

    def know(self, attempt: AttemptId, model: ModelId) -> None:
        """An adopted attempt: its exit is news to us."""
        self._owners[attempt] = model

    def on_exit(self, attempt: AttemptId, exit_: Exit) -> None:
        """The engine saw an exit; of an attempt that is not ours it is no news."""
        self.end_probe(attempt)
        if attempt in self._starts:
            self._gone.add(attempt)
        model = self._owners.get(attempt)
        if model is not None:
            self._post(ended(model, attempt, exit_))

    def forget(self, attempt: AttemptId) -> None:
        """A newer attempt has taken its place; the engine drops its log when that one starts."""
        self.end_probe(attempt)
        self._owners.pop(attempt, None)

    async def _start(self, action: Start) -> None:
        self._starts.add(action.attempt)
        try:
            await self._start_and_probe(action)
        finally:
            self._starts.discard(action.attempt)
            self._gone.discard(action.attempt)
            self._tidy(action.attempt)

    def _tidy(self, attempt: AttemptId) -> None:
        if attempt not in self._starts and attempt not in self._stops:
            self._given_up.discard(attempt)

    async def _start_and_probe(self, action: Start) -> None:
        model = self._models().get(action.model)
        if model is None:
            self._post(Ended(action.model, action.attempt, message="it is no longer in the catalogue"))
            return
        try:
            found = await self._ensure(self._order(action, model))
        except Cancelled:
            return  # the stop that cancelled it reports the end
        except EngineError as error:
            self._post(Ended(action.model, action.attempt, message=error.message, code=error.code))
            return
        if found.exit is not None or found.host is None or found.port is None:
            self._post(ended(action.model, action.attempt, found.exit or Exit(None)))
            return
        if action.attempt in self._gone or action.attempt in self._given_up:
            return  # its end has been told already, or will be
        self._post(Started(action.model, action.attempt, found.host, found.port))
        assert self._group is not None
        self._probing[action.attempt] = self._group.create_task(
            self._await_health(action, model, found.host, found.port), name=f"probe {action.model}"
        )

    async def _ensure(self, order: StartOrder) -> Found:
        """An engine that does not answer may have started it all the same: ask again until it says."""

        def report(progress: Progress) -> None:
            self._post(Progressed(order.model, order.attempt, progress))

        while order.attempt not in self._given_up and order.attempt not in self._gone:
            try:
                return await self._engine.start(order, report)
            except EngineUnavailable as error:
                report(Progress("waiting for the engine", detail=error.message))
                await asyncio.sleep(ENGINE_RETRY_S)
        raise Cancelled(f"The start of '{order.model}' was given up: it was to be stopped.")

    def _order(self, action: Start, model: Model) -> StartOrder:
        placed = (self._devices.get(device) for device in action.placement)
        gpus = (device for device in placed if device is not None and device.kind is DeviceKind.GPU)
        ordered = tuple(sorted(gpus, key=lambda device: device.index))
        return StartOrder(action.attempt, action.model, model.run_with(action.parameters).launch, ordered)

    async def _await_health(self, action: Start, model: Model, host: str, port: int) -> None:
        """Probe every 20 ms at first, more slowly as it takes longer; the planner owns the time-out."""
        pause_s, last = FIRST_PROBE_S, NOBODY_LISTENS
        while (problem := await self._problem(action, model, host, port)) is not None:
            if problem != last:
                self._post(Progressed(action.model, action.attempt, Progress(LOADING, detail=problem)))
                last = problem
            await asyncio.sleep(pause_s)
            pause_s = min(LAST_PROBE_S, pause_s * PROBE_GROWTH)
        self._probing.pop(action.attempt, None)
        self._post(BecameHealthy(action.model, action.attempt))
        if model.recipe is not None:  # else nothing is learned of it
            await self._tell_buffers(action)

    async def _tell_buffers(self, action: Start) -> None:
        buffers = await logged_buffers(self._engine, action.model, action.attempt)
        if buffers:
            self._post(BuffersLogged(action.model, action.attempt, buffers))

    async def _problem(self, action: Start, model: Model, host: str, port: int) -> str | None:
        """None if it is healthy and really the attempt: a stranger may have been faster to take its port."""
        problem = await self._probe.problem(host, port, model.launch.health_path)
        if problem is not None or await self._engine.serves(action.attempt):
            return problem
        return "another program answers there"

    async def _stop(self, action: Stop) -> None:
        if action.attempt in self._stops:
            return  # under way already
        self._stops.add(action.attempt)
        self._given_up.add(action.attempt)
        self.end_probe(action.attempt)
        while True:
            try:
                exit_ = await self._engine.stop(action.attempt, action.grace_s)
                break
            except EngineError as error:
                log.warning("stop not confirmed, asking again", model=action.model, error=error.message)
                await asyncio.sleep(ENGINE_RETRY_S)
        self._stops.discard(action.attempt)
        self._tidy(action.attempt)
        self._post(ended(action.model, action.attempt, exit_))
        self._owners.pop(action.attempt, None)

    def end_probe(self, attempt: AttemptId) -> None:
        """It has ended, or is to end: it will not become healthy any more."""
        task = self._probing.pop(attempt, None)
        if task is not None:
            task.cancel()


def ended(model: ModelId, attempt: AttemptId, exit_: Exit) -> Ended:
    return Ended(model, attempt, exit_code=exit_.code, oom=exit_.oom, log_tail=exit_.log_tail)
