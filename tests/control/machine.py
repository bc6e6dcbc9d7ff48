"""A simulated machine for the loop: devices with real occupancy, an engine full of faults, rows on a disk.

It outlives the server that uses it. Memory is counted here and nowhere else; what the loop believes is
never read.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil, inf

from orchestrator.control.ports import Changes, Exit, Found, StartOrder
from orchestrator.core.entities import (
    HOST,
    MIB,
    AttemptId,
    Device,
    DeviceId,
    DeviceKind,
    ForeignProcess,
    ModelId,
    Operation,
    Reading,
    Sample,
)
from orchestrator.core.errors import Cancelled, EngineUnavailable
from orchestrator.core.lifecycle import Instance
from tests.control.manual_time import ManualEventLoop
from tests.control.world import ManualClock

GPU_0 = Device("GPU-0", 0, "GPU 0", DeviceKind.GPU, 1000 * MIB, 50 * MIB)
GPU_1 = Device("GPU-1", 1, "GPU 1", DeviceKind.GPU, 800 * MIB)
RAM = Device(HOST, -1, "RAM", DeviceKind.HOST, 1000 * MIB)
DEVICES: Mapping[DeviceId, Device] = {device.id: device for device in (GPU_0, GPU_1, RAM)}

GPU_SIZE, HOST_SIZE = "GPU_MIB", "HOST_MIB"
"""How a launch says what its process will really take: the truth, whatever was reserved for it."""


@dataclass(frozen=True)
class Manner:
    """How the next process of a model behaves.

    `load_s` until healthy (inf: never), with half of its memory taken from `load_s / 2` on;
    `exits_after_s` is a crash while it loads. It obeys a stop at once, after its `grace`, or when told
    (`stuck`). Its memory comes back `lingers_s` after its end (inf: never).
    """

    load_s: float = 0.0
    exits_after_s: float | None = None
    obeys: str = "at once"
    lingers_s: float = 0.0
    exit_is_told: bool = True
    oom: bool = False


@dataclass
class Process:
    """One attempt as it really is. `full` is what it will take, `used` what it has taken."""

    order: StartOrder
    manner: Manner
    port: int
    full: Mapping[DeviceId, int]
    death: asyncio.Future[None]
    used: dict[DeviceId, int] = field(default_factory=dict)
    lingering: dict[DeviceId, int] = field(default_factory=dict)
    is_loaded: bool = False
    exit: Exit | None = None
    is_late: bool = False  # started for a caller that had died, or had been told that it was away
    is_asked_to_end: bool = False
    was_told: bool = False  # its exit, to the server that lives now

    @property
    def attempt(self) -> AttemptId:
        return self.order.attempt

    @property
    def model(self) -> ModelId:
        return self.order.model

    @property
    def is_alive(self) -> bool:
        return self.exit is None

    def on_device(self, device: DeviceId) -> int:
        """Bytes of it that the device really holds."""
        return (self.used if self.is_alive else self.lingering).get(device, 0)

    def found(self) -> Found:
        if self.exit is not None:
            return Found(self.attempt, self.model, exit=self.exit)
        return Found(self.attempt, self.model, "127.0.0.1", self.port)


@dataclass(eq=False)
class StartRequest:
    order: StartOrder
    caller: object
    answer: asyncio.Future[Found]
    is_given_up: bool = False


@dataclass
class Disk:
    """The rows that survive."""

    instances: dict[ModelId, Instance] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)
    pins: dict[ModelId, bool] = field(default_factory=dict)
    holds: dict[ModelId, float] = field(default_factory=dict)

    def write(self, changes: Changes) -> None:
        self.instances |= changes.instances
        self.operations |= changes.operations
        for model, pinned in changes.pins.items():
            self.pins.pop(model, None)
            if pinned is not None:
                self.pins[model] = pinned
        for model, until in changes.holds.items():
            self.holds.pop(model, None)
            if until is not None:
                self.holds[model] = until


class Machine:
    """Devices, processes, other programs, and the engine's own view. `caller` is the server's life."""

    def __init__(self, clock: ManualClock, aio: ManualEventLoop) -> None:
        self.clock = clock
        self.aio = aio
        self.disk = Disk()
        self.processes: dict[AttemptId, Process] = {}
        self.manners: dict[ModelId, Manner] = {}
        self.requests: list[StartRequest] = []
        self.foreign: dict[int, tuple[DeviceId, int]] = {}
        self.broken: dict[DeviceId, str] = {}
        self.away: str | None = None
        self.is_slow = False  # starts wait for `go_on`
        self.tells_little = False  # of its devices only what is free and what is used
        self.caller: object = None
        self.stopped: set[AttemptId] = set()  # a stop was asked for, by whomever
        self.requested: dict[AttemptId, object] = {}  # by whom last
        self.on_start: Callable[[Process], None] = lambda process: None
        self.on_exit: Callable[[AttemptId, Exit], bool] = lambda attempt, exit_: False
        self._ports = itertools.count(1)
        self._pids = itertools.count(1)

    # --- what is true

    def alive(self, model: ModelId | None = None) -> list[Process]:
        return [p for p in self.processes.values() if p.is_alive and model in (None, p.model)]

    def used_bytes(self, device: DeviceId) -> int:
        own = sum(process.on_device(device) for process in self.processes.values())
        return own + sum(size for place, size in self.foreign.values() if place == device)

    def free_bytes(self, device: DeviceId) -> int:
        return DEVICES[device].capacity_bytes - self.used_bytes(device)

    def sample(self) -> Sample:
        readings = {d: self._reading(d) for d in DEVICES if d not in self.broken}
        return Sample(self.clock(), readings, dict(self.broken))

    def _reading(self, device: DeviceId) -> Reading:
        by_attempt = {p.attempt: p.used[device] for p in self.alive() if p.used.get(device)}
        others = tuple(
            ForeignProcess(pid, "game", size) for pid, (d, size) in self.foreign.items() if d == device
        )
        lingering = sum(p.on_device(device) for p in self.processes.values() if not p.is_alive)
        used = self.used_bytes(device)
        if self.tells_little:
            return Reading(self.free_bytes(device), used, unexplained_bytes=used, attributed=False)
        return Reading(self.free_bytes(device), used, by_attempt, others, unexplained_bytes=lingering)

    # --- the engine

    def answer(self) -> None:
        if self.away is not None:
            raise EngineUnavailable(self.away)

    async def start(self, order: StartOrder, caller: object) -> Found:
        self.answer()
        self.requested[order.attempt] = caller
        known = self.processes.get(order.attempt)
        if known is not None:
            known.is_late = False
            return known.found()
        request = StartRequest(order, caller, self.aio.create_future())
        self.requests.append(request)
        if not self.is_slow:
            self.aio.call_soon(self.go_on)
        return await request.answer

    def go_on(self, *, answers: bool = True) -> None:
        """Do what was asked for; without an answer its caller takes the engine to be away."""
        requests, self.requests = self.requests, []
        for request in requests:
            if request.is_given_up:
                result: Found | Exception = Cancelled("it was to be stopped")
            else:
                result = self._start(request).found()
            if request.answer.done():
                continue
            if not answers:
                result = EngineUnavailable("it did not answer in time")
            if isinstance(result, Exception):
                request.answer.set_exception(result)
            else:
                request.answer.set_result(result)

    def _start(self, request: StartRequest) -> Process:
        order = request.order
        known = self.processes.get(order.attempt)
        if known is not None:
            return known
        manner = self.manners.get(order.model, Manner())
        process = Process(order, manner, next(self._ports), sizes(order), self.aio.create_future())
        asked_by = self.requested.get(order.attempt)
        process.is_late = order.attempt in self.stopped or asked_by is not self.caller
        self.processes[order.attempt] = process
        self.on_start(process)
        if manner.exits_after_s is not None:
            self.aio.call_later(manner.exits_after_s, self.end, process, Exit(1, oom=manner.oom))
        if manner.load_s == 0:
            self._take(process, 1.0)
        elif manner.load_s < inf:
            self.aio.call_later(manner.load_s / 2, self._take, process, 0.5)
            self.aio.call_later(manner.load_s, self._take, process, 1.0)
        return process

    def _take(self, process: Process, share: float) -> None:
        """Take memory as far as there is any; who gets none dies of it, as with a real driver."""
        if not process.is_alive:
            return
        for device, full in process.full.items():
            wanted = int(full * share)
            if wanted - process.used.get(device, 0) > self.free_bytes(device):
                self.end(process, Exit(1, oom=True, log_tail=("out of memory",)))
                return
            process.used[device] = wanted
        process.is_loaded = share == 1.0

    async def stop(self, attempt: AttemptId, grace_s: float, caller: object) -> Exit:
        self.answer()
        self.stopped.add(attempt)
        for request in self.requests:
            if request.order.attempt == attempt and request.caller is caller and not request.answer.done():
                request.is_given_up = True
        process = self.processes.get(attempt)
        if process is None:
            return Exit(None)
        self._ask_to_end(process, grace_s)
        await asyncio.wait({process.death})
        self.answer()
        return process.exit or Exit(None)

    def _ask_to_end(self, process: Process, grace_s: float) -> None:
        if not process.is_alive or process.is_asked_to_end:
            return
        process.is_asked_to_end = True
        if process.manner.obeys == "at once":
            self.aio.call_soon(self.end, process, Exit(0))
        elif process.manner.obeys == "grace":
            self.aio.call_later(grace_s, self.end, process, Exit(-9))

    def end(self, process: Process, exit_: Exit) -> None:
        if not process.is_alive:
            return
        process.lingering = dict(process.used) if process.manner.lingers_s else {}
        process.exit = exit_
        process.death.set_result(None)
        if 0 < process.manner.lingers_s < inf:
            self.aio.call_later(process.manner.lingers_s, process.lingering.clear)
        if process.manner.exit_is_told and self.away is None:
            process.was_told = self.on_exit(process.attempt, exit_)

    def list(self) -> tuple[Found, ...]:
        self.answer()
        return tuple(process.found() for process in self.processes.values())

    def probe(self, port: int) -> bool:
        return any(p.port == port and p.is_alive and p.is_loaded for p in self.processes.values())

    # --- faults

    def go_away(self, *, cuts: bool) -> None:
        """`cuts` ends the calls under way without an answer; what they asked for may still be done."""
        self.away = "The engine is away."
        for request in self.requests if cuts else ():
            if not request.answer.done():
                request.answer.set_exception(EngineUnavailable(self.away))

    def come_back(self) -> None:
        self.away = None
        self.is_slow = False
        self.go_on()

    def release(self) -> None:
        """What survived its kill dies now, and late memory comes back."""
        for process in self.processes.values():
            process.manner = replace(process.manner, obeys="at once")
            if process.is_alive and process.is_asked_to_end:
                self.end(process, Exit(-9))

    def admit_foreign(self, device: DeviceId, size: int) -> None:
        self.foreign[next(self._pids)] = (device, min(size, max(0, self.free_bytes(device))))

    def reboot(self) -> None:
        """Everything that ran is gone, and so is every trace of it."""
        for process in self.alive():
            process.exit = Exit(None)
            process.death.set_result(None)
        self.processes.clear()
        self.requests.clear()
        self.foreign.clear()


def sizes(order: StartOrder) -> dict[DeviceId, int]:
    """What the process really takes: split evenly over its GPUs, or all of it in RAM."""
    on_gpus = int(order.launch.environment[GPU_SIZE]) * MIB
    on_host = int(order.launch.environment[HOST_SIZE]) * MIB
    if not order.gpus:
        return {HOST: on_gpus + on_host}
    share = ceil(on_gpus / len(order.gpus))
    return {gpu.id: share for gpu in order.gpus} | ({HOST: on_host} if on_host else {})
