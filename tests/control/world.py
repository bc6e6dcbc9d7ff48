"""The real loop over an engine, a store and a clock that live in memory and do only what a test says.

The engine measures memory itself: what its processes hold, and what lingers after their end. Nothing
here reads the loop's own ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from orchestrator.control.effects import Effects
from orchestrator.control.gates import Gate
from orchestrator.control.loop import Loop
from orchestrator.control.ports import Changes, Exit, Found, LoggedEvent, Roots, StartOrder
from orchestrator.control.recovery import Recovered
from orchestrator.core.entities import (
    MIB,
    AttemptId,
    ContainerId,
    Demand,
    Device,
    DeviceKind,
    Download,
    Launch,
    Model,
    ModelId,
    Note,
    Operation,
    Progress,
    Reading,
    Sample,
)
from orchestrator.core.errors import Cancelled, EngineUnavailable, StoreError
from orchestrator.core.events import Sampled, Woken
from orchestrator.core.learned import Learned
from orchestrator.core.lifecycle import Instance
from orchestrator.core.snapshot import Snapshot

GPU = "GPU-0"
CAPACITY_MIB = 1000
PATIENCE_S = 5.0
NOBODY = Recovered({}, (), (), (), (), ())


class ManualClock:
    """Monotonic seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Process:
    """What the engine runs: `used_mib` is what the device sees of it."""

    order: StartOrder
    used_mib: int
    is_alive: bool = True
    is_asked_to_end: bool = False
    lingers_mib: int = 0  # of a dead one: what the device still shows
    is_lent: bool = False


class FakeEngine:
    """Starts at once and stops at once, unless `starting` or `stopping` are cleared to hold them.

    `names` are of others' containers; `naming` is cleared to hold its answers about them. `printed` is what
    every attempt has in its log, in pieces.

    While `problem` says why, it answers nobody. A stop gives up a start only while that is under way.
    """

    name = "fake"

    def __init__(self, sizes_mib: Mapping[ModelId, int]) -> None:
        self.sizes_mib = sizes_mib
        self.processes: dict[AttemptId, Process] = {}
        self.starting = asyncio.Event()
        self.stopping = asyncio.Event()
        self.starting.set()
        self.stopping.set()
        self.starts_held: set[AttemptId] = set()
        self.stops_held: set[AttemptId] = set()
        self.given_up: set[AttemptId] = set()
        self.lingers = False
        self.most_used_mib = 0
        self.most_of_a_model = 0
        self.stop_code: int | None = 0
        self.problem: str | None = None
        self.refused = 0
        self.names: dict[ContainerId, str] = {}
        self.printed: list[bytes] = []
        self.asked_names: list[ContainerId] = []
        self.naming = asyncio.Event()
        self.naming.set()
        self._on_exit: Callable[[AttemptId, Exit], None] = lambda attempt, exit_: None

    # --- measuring

    def used_mib(self) -> int:
        return sum(p.used_mib if p.is_alive else p.lingers_mib for p in self.processes.values())

    def alive(self, model: ModelId) -> list[AttemptId]:
        return [a for a, p in self.processes.items() if p.is_alive and p.order.model == model]

    def sample(self, now_s: float) -> Sample:
        alive = {a: p.used_mib * MIB for a, p in self.processes.items() if p.is_alive}
        lingering = sum(p.lingers_mib * MIB for p in self.processes.values() if not p.is_alive)
        used = sum(alive.values()) + lingering
        reading = Reading(CAPACITY_MIB * MIB - used, used, alive, unexplained_bytes=lingering)
        return Sample(now_s, {GPU: reading})

    def give_back(self) -> None:
        for process in self.processes.values():
            process.lingers_mib = 0

    # --- ports.Engine

    async def open(self, on_exit: Callable[[AttemptId, Exit], None]) -> None:
        self._on_exit = on_exit

    async def start(self, order: StartOrder, report: Callable[[Progress], None]) -> Found:
        self._answer()
        self.starts_held.add(order.attempt)
        await self.starting.wait()
        self.starts_held.discard(order.attempt)
        if order.attempt in self.given_up:
            self.given_up.discard(order.attempt)
            raise Cancelled("a stop was ordered meanwhile")
        known = self.processes.setdefault(order.attempt, Process(order, self.sizes_mib[order.model]))
        self.most_used_mib = max(self.most_used_mib, self.used_mib())
        self.most_of_a_model = max(self.most_of_a_model, len(self.alive(order.model)))
        if not known.is_alive:
            return Found(order.attempt, order.model, exit=Exit(None))
        return Found(order.attempt, order.model, "127.0.0.1", 1)

    async def stop(self, attempt: AttemptId, grace_s: float) -> Exit:
        self._answer()
        if attempt in self.starts_held:
            self.given_up.add(attempt)
        process = self.processes.get(attempt)
        if process is not None:
            process.is_asked_to_end = True
        self.stops_held.add(attempt)
        await self.stopping.wait()
        self.stops_held.discard(attempt)
        if process is None:
            return Exit(None)
        self._end(process)
        return Exit(self.stop_code)

    def crash(self, attempt: AttemptId, exit_: Exit) -> None:
        self._end(self.processes[attempt])
        self._on_exit(attempt, exit_)

    def _answer(self) -> None:
        if self.problem is not None:
            self.refused += 1
            raise EngineUnavailable(self.problem)

    def _end(self, process: Process) -> None:
        if process.is_alive:
            process.is_alive = False
            process.lingers_mib = process.used_mib if self.lingers else 0

    async def list(self) -> tuple[Found, ...]:
        alive = {attempt: process for attempt, process in self.processes.items() if process.is_alive}
        return tuple(Found(a, p.order.model, is_lent=p.is_lent) for a, p in alive.items())

    async def discard(self, attempt: AttemptId) -> None:
        if not self.processes[attempt].is_alive:
            self.processes[attempt].lingers_mib = 0

    def roots(self) -> Mapping[AttemptId, Roots]:
        return {}

    async def serves(self, attempt: AttemptId) -> bool:
        return True

    async def container_name(self, container: ContainerId) -> str | None:
        self.asked_names.append(container)
        self._answer()
        await self.naming.wait()
        return self.names.get(container)

    async def logs(
        self,
        model: ModelId,
        attempt: AttemptId | None,
        *,
        tail: int,
        follow: bool,
        previous: bool = False,
    ) -> AsyncIterator[bytes]:
        self._answer()
        for piece in self.printed:
            yield piece

    async def health(self) -> str | None:
        return None

    async def close(self) -> None:
        return None


class FakeProbe:
    """Healthy at once, unless `healthy` is cleared; then each thing put into `says` is its answer."""

    def __init__(self) -> None:
        self.healthy = asyncio.Event()
        self.healthy.set()
        self.says: asyncio.Queue[str] = asyncio.Queue()

    async def problem(self, host: str, port: int, path: str) -> str | None:
        if not self.healthy.is_set() and not self.says.empty():
            return self.says.get_nowait()
        await self.healthy.wait()
        return None


@dataclass
class FakeStore:
    """Remembers rows; fails while `problem` says why; `before_save` is awaited in each save."""

    problem: str | None = None
    before_save: Callable[[Changes], object] | None = None
    rows: dict[ModelId, Instance] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)
    downloads: dict[ModelId, Download | None] = field(default_factory=dict)
    learned: dict[str, Learned | None] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    refused: int = 0

    async def save(self, changes: Changes) -> None:
        if self.before_save is not None:
            waited = self.before_save(changes)
            if asyncio.iscoroutine(waited):
                await waited
        if self.problem is not None:
            await asyncio.sleep(0)  # a real one answers from a thread
            self.refused += 1
            raise StoreError(self.problem)
        self.rows |= changes.instances
        self.operations |= changes.operations
        self.downloads |= changes.downloads
        self.learned |= changes.learned

    async def log(self, notes: tuple[Note, ...]) -> None:
        if self.problem is not None:
            raise StoreError(self.problem)
        self.notes += notes

    async def operation(self, operation_id: str) -> Operation | None:
        return self.operations.get(operation_id)

    async def instances(self) -> Mapping[ModelId, Instance]:
        return dict(self.rows)

    async def events(self, *, limit: int, model: ModelId | None = None) -> tuple[LoggedEvent, ...]:
        return ()

    async def prune(self, *, keep_events: int, keep_operations: int, keep_attempts: int) -> None:
        return None

    async def health(self) -> str | None:
        return self.problem


class World:
    def __init__(self, models: Mapping[ModelId, Model]) -> None:
        self.clock = ManualClock()
        self.store = FakeStore()
        self.probe = FakeProbe()
        self.engine = FakeEngine({m.id: m.demand.gpu_bytes // MIB for m in models.values()})
        device = Device(GPU, 0, "GPU 0", DeviceKind.GPU, CAPACITY_MIB * MIB)
        first = Snapshot(
            now_s=self.clock(),
            wall_s=0.0,
            seed="test",
            devices={GPU: device},
            models=models,
            sample=Sample(self.clock() - 1),
        )
        self.loop = Loop(
            first,
            self.store,
            lambda post, known: Effects(self.engine, self.probe, post, known, {GPU: device}),
            clock=self.clock,
            wall=lambda: 1_800_000_000.0 + self.clock(),
        )

    # --- making things happen

    def measure(self) -> None:
        """A sample of what the engine's memory is now."""
        self.loop.inbox.post(Sampled(self.engine.sample(self.clock())))

    async def pass_time(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.measure()
        await self.turns()

    async def turns(self, count: int = 1) -> None:
        """Let the loop take that many more turns, whether they can be saved or not."""
        for _ in range(count):
            before = self.loop.snapshot
            self.loop.inbox.post(Woken())
            await self.until(lambda before=before: self.loop.snapshot is not before)

    async def until(self, claim: Callable[[], object]) -> None:
        """Let everything run until the claim is true."""
        async with asyncio.timeout(PATIENCE_S):
            while not claim():  # noqa: ASYNC110 (a claim may be about anything)
                await asyncio.sleep(0)

    async def at_rest(self, model: ModelId) -> None:
        def is_at_rest() -> bool:
            self.measure()
            return self.loop.snapshot.instance(model).is_at_rest

        await self.until(is_at_rest)

    # --- asking

    def ask(self, model: ModelId, seconds: float = 60.0) -> asyncio.Task[Gate]:
        """A request that waits for the model; its result is an entered gate."""
        waiting = self.loop.wait_ready(model, self.clock() + seconds)
        return asyncio.create_task(waiting, name=f"wait for {model}")

    async def waiting(self, model: ModelId, count: int) -> None:
        def is_so() -> bool:
            entry = self.loop.snapshot.entries.get(model)
            return (len(entry.waiters) if entry else 0) == count

        await self.until(is_so)

    async def ready(self, model: ModelId) -> Gate:
        """Load it, and return its gate, not entered."""
        gate = await self.ask(model)
        gate.leave()
        return gate

    async def idle(self, model: ModelId) -> Gate:
        """Load it, and let its last request be long enough ago for it to count as idle."""
        gate = await self.ready(model)
        await self.pass_time(1.0)
        return gate

    def in_flight(self, model: ModelId) -> int:
        attempt = self.loop.snapshot.instance(model).attempt
        counted = self.loop.usage().get(attempt or "")
        return counted.in_flight if counted else 0

    def state(self, model: ModelId) -> str:
        return self.loop.snapshot.instance(model).state.value


def model(name: str, mib: int, **more: object) -> Model:
    made = Model(name, Demand(mib * MIB), Launch("test", command=("true",)))
    return replace(made, **more)  # type: ignore[arg-type]


@asynccontextmanager
async def running(*models: Model) -> AsyncIterator[World]:
    """A world whose loop turns, and that has been measured."""
    world = World({m.id: m for m in models})
    async with turning(world):
        world.measure()
        yield world


@asynccontextmanager
async def turning(
    world: World, recovered: Recovered = NOBODY, restore: Iterable[ModelId] = ()
) -> AsyncIterator[None]:
    """The world's loop turns; at the end it still does, and memory was never overbooked."""
    loop = asyncio.create_task(world.loop.run(recovered, restore))
    await world.engine.open(world.loop.effects.on_exit)
    try:
        yield
        assert not loop.done(), "the loop ended by itself"
        assert world.engine.most_used_mib <= CAPACITY_MIB
        assert world.engine.most_of_a_model <= 1
    finally:
        world.loop.close()
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)
