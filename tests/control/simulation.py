"""Lives of the real loop on a simulated machine, with clients, commands, faults and `kill -9`.

Everything runs in an event loop of manual time, so a test decides how far each task gets. The promises
that are checked on the way are in promises.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import inf

from orchestrator.control.checkup import Checkup
from orchestrator.control.effects import Effects
from orchestrator.control.gates import Gate
from orchestrator.control.loop import Loop, NotReady
from orchestrator.control.operations import Outcome
from orchestrator.control.ports import Changes, Exit, Found, Kept, StartOrder
from orchestrator.control.recovery import recover
from orchestrator.core.entities import (
    MIB,
    Action,
    AttemptId,
    Demand,
    Launch,
    Model,
    ModelId,
    Note,
    OperationState,
    Progress,
    Sample,
    Variant,
)
from orchestrator.core.errors import DeadlineExceeded, EngineUnavailable, ShuttingDown, StoreError
from orchestrator.core.events import Event, Sampled
from orchestrator.core.lifecycle import HAS_PROCESS, Instance, State
from orchestrator.core.snapshot import Snapshot
from tests.control.machine import DEVICES, GPU_SIZE, HOST_SIZE, Machine
from tests.control.manual_time import ManualEventLoop
from tests.control.promises import Promises
from tests.control.world import FakeEngine, FakeStore, ManualClock

WALL_S = 1_800_000_000.0
OWNER = "me"
ON_THE_MOVE = frozenset({State.CLAIMED, State.STARTING, State.STOPPING, State.RECLAIMING})


def model(name: str, gpu_mib: int, host_mib: int = 0, **more: object) -> Model:
    """A model whose launch tells its process how much to take, so that a reload can change it."""
    environment = {GPU_SIZE: str(gpu_mib), HOST_SIZE: str(host_mib)}
    launch = Launch("test", command=("true",), environment=environment)
    made = Model(
        name,
        Demand(gpu_mib * MIB, host_mib * MIB),
        launch,
        start_timeout_s=30.0,
        stop_grace_s=5.0,
        drain_limit_s=60.0,
        queue_limit=3,
    )
    return replace(made, **more)  # type: ignore[arg-type]


def flexible(name: str, *sizes_mib: int, **more: object) -> Model:
    """A model that is run with one of these sizes, the largest first; each has its own launch."""
    ways = [model(name, size) for size in sizes_mib]
    variants = tuple(Variant({"size": s}, m.demand, m.launch) for s, m in zip(sizes_mib, ways, strict=True))
    return replace(ways[-1], variants=variants, **more)  # type: ignore[arg-type]


@dataclass(eq=False)
class Client:
    """A request: it waits, is inside for `use_s` (None: until told), and leaves."""

    model: ModelId
    asked_s: float
    deadline_s: float
    use_s: float | None
    gate: Gate | None = None
    ended: str | None = None

    @property
    def is_waiting(self) -> bool:
        return self.gate is None and self.ended is None


class WatchedEffects(Effects):
    """The real effects; every order is shown to the promises before it is carried out."""

    life: Life

    def perform(self, action: Action) -> None:
        self.life.promises.ordered(self.life, action)
        super().perform(action)


class WatchedLoop(Loop):
    """The real loop; whoever is let in is shown to the promises at that moment."""

    life: Life

    def try_enter(self, model: ModelId) -> Gate | None:
        gate = super().try_enter(model)
        if gate is not None:
            self.life.promises.entered(gate)
        return gate


class LifeEngine(FakeEngine):
    """The machine's engine as one life of the server talks to it."""

    def __init__(self, life: Life) -> None:
        super().__init__({})
        self.life = life
        self.machine = life.machine

    async def start(self, order: StartOrder, report: Callable[[Progress], None]) -> Found:
        self.life.promises.started(self.life, order)
        return await self.machine.start(order, self.life)

    async def stop(self, attempt: AttemptId, grace_s: float) -> Exit:
        return await self.machine.stop(attempt, grace_s, self.life)

    async def list(self) -> tuple[Found, ...]:
        found = self.machine.list()
        if self.life.simulation.listing_takes_s:
            await asyncio.sleep(self.life.simulation.listing_takes_s)
        return found


class LifeProbe:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    async def problem(self, host: str, port: int, path: str) -> str | None:
        return None if self.machine.probe(port) else "HTTP 503"


class LifeStore(FakeStore):
    """Writes to the machine's disk, after a while if the store is slow."""

    def __init__(self, life: Life) -> None:
        super().__init__()
        self.life = life
        self.under_way: Changes | None = None

    async def save(self, changes: Changes) -> None:
        simulation = self.life.simulation
        self.under_way = changes
        try:
            await asyncio.sleep(simulation.store_takes_s)
            if simulation.store_problem is not None:
                raise StoreError(simulation.store_problem)
            self.life.machine.disk.write(changes)
        finally:
            if not self.life.is_dead:
                self.under_way = None

    async def instances(self) -> Mapping[ModelId, Instance]:
        if self.life.simulation.store_problem is not None:
            raise StoreError(self.life.simulation.store_problem)
        return dict(self.life.machine.disk.instances)

    async def log(self, notes: tuple[Note, ...]) -> None:
        if self.life.simulation.store_problem is not None:
            raise StoreError(self.life.simulation.store_problem)


class Life:
    """One run of the server, from opening its engine to the kill."""

    def __init__(self, simulation: Simulation, kept: Kept, number: int) -> None:
        self.simulation = simulation
        self.machine = simulation.machine
        self.promises = simulation.promises
        self.kept = kept
        self.is_dead = False
        self.is_turning = False
        self.engine = LifeEngine(self)
        self.store = LifeStore(self)
        self.clock = simulation.clock
        self.loop = WatchedLoop(
            self._first_snapshot(number),
            self.store,
            self._effects,
            clock=self.clock,
            wall=lambda: WALL_S + self.clock(),
        )
        self.loop.life = self
        self.checkup = Checkup(self.loop, self.engine, self.store)

    def _first_snapshot(self, number: int) -> Snapshot:
        now_s = self.clock()
        wall_s = WALL_S + now_s
        return Snapshot(
            now_s=now_s,
            wall_s=wall_s,
            seed=f"-{number}",
            devices=DEVICES,
            models=self.simulation.models,
            sample=Sample(now_s),
            operations=self.kept.operations,
            pins=self.kept.pins,
            holds={m: now_s + until - wall_s for m, until in self.kept.holds.items() if until > wall_s},
        )

    def _effects(
        self, post: Callable[[Event], None], models: Callable[[], Mapping[ModelId, Model]]
    ) -> Effects:
        effects = WatchedEffects(self.engine, LifeProbe(self.machine), post, models, DEVICES)
        effects.life = self
        return effects

    async def run(self) -> None:
        """As the application does: ask the engine until it answers, take over what runs, and turn."""
        found = await self._ask_engine()
        recovered = recover(self.kept, found, self.simulation.models, now_s=self.clock())
        self.is_turning = True
        snapshot = self.loop.snapshot
        running = {i.model for i in recovered.instances.values() if i.state in HAS_PROCESS}
        pinned = [m for m in snapshot.models if snapshot.is_pinned(m) and m not in snapshot.holds]
        await self.loop.run(recovered, [m for m in pinned if m not in running])

    async def _ask_engine(self) -> tuple[Found, ...]:
        while True:
            try:
                found = await self.engine.list()
            except EngineUnavailable:
                await asyncio.sleep(1.0)
                continue
            return found


@dataclass
class Command:
    kind: str
    model: ModelId
    task: asyncio.Task[Outcome | None]


class Simulation:
    """The machine, the current life of the server, and who uses it."""

    def __init__(self, models: Mapping[ModelId, Model]) -> None:
        self.clock = ManualClock()
        self.aio = ManualEventLoop(self.clock)
        self.machine = Machine(self.clock, self.aio)
        self.models = models
        self.promises = Promises(self)
        self.machine.on_start = self.promises.really_started
        self.machine.on_exit = self._tell_exit
        self.clients: dict[Client, asyncio.Task[None]] = {}
        self.commands: list[Command] = []
        self.store_problem: str | None = None
        self.store_takes_s = 0.0
        self.listing_takes_s = 0.0
        self.samples_lag_s: float | None = 0.0  # None: nobody measures
        self._under_way: list[Sample] = []
        self._lives = 0
        self.life = self._begin(same_boot=True)

    # --- lives

    def _begin(self, *, same_boot: bool) -> Life:
        disk = self.machine.disk
        self._lives += 1
        operations = {k: o for k, o in disk.operations.items() if o.state is OperationState.RUNNING}
        kept = Kept(OWNER, same_boot, operations, dict(disk.instances), dict(disk.pins), dict(disk.holds))

        async def make() -> Life:
            return Life(self, kept, self._lives)

        self.life = self.aio.run_until_complete(make())
        self.machine.caller = self.life
        self.running = self.aio.create_task(self.life.run(), name="life")
        return self.life

    def kill(self, *, is_saved: bool, reboot: bool = False) -> None:
        """`kill -9`, wherever every task is; a save under way may have reached the disk or not."""
        self.life.is_dead = True
        self.machine.caller = None
        changes = self.life.store.under_way
        if changes is not None and is_saved and self.store_problem is None:
            self.machine.disk.write(changes)
        tasks = asyncio.all_tasks(self.aio)
        for task in tasks:
            task.cancel()
        while not all(task.done() for task in tasks):
            self.aio.run_round()
        for client in self.clients:
            client.ended = client.ended or "cut"
        self.clients.clear()
        self.commands.clear()
        self._under_way.clear()
        self.promises.forget_life()
        if reboot:
            self.machine.reboot()
        self._begin(same_boot=not reboot)

    def _tell_exit(self, attempt: AttemptId, exit_: Exit) -> bool:
        """True if there was somebody to hear it."""
        if not self.life.is_turning or self.life.is_dead:
            return False
        self.life.loop.effects.on_exit(attempt, exit_)
        return True

    # --- using it

    def ask(self, model: ModelId, seconds: float, use_s: float | None) -> Client:
        now_s = self.clock()
        client = Client(model, now_s, now_s + seconds, use_s)
        self.clients[client] = self.aio.create_task(self._be(client, self.life.loop))
        return client

    async def _be(self, client: Client, loop: Loop) -> None:
        try:
            gate = loop.try_enter(client.model) or await loop.wait_ready(client.model, client.deadline_s)
        except (NotReady, DeadlineExceeded, ShuttingDown) as error:
            client.ended = type(error).__name__
            return
        except asyncio.CancelledError:
            client.ended = "left"
            raise
        client.gate = gate
        try:
            process = self.machine.processes.get(gate.instance.attempt or "")
            if process is not None:
                await asyncio.wait({process.death}, timeout=client.use_s)
        finally:
            client.gate = None
            client.ended = "served"
            gate.leave()

    def leave(self, client: Client) -> None:
        self.clients[client].cancel()

    def command(self, kind: str, model: ModelId, **how: object) -> None:
        unpinnings = self.promises.asked(kind, model, how)
        task = self.aio.create_task(self._command(kind, model, how, unpinnings))
        self.commands.append(Command(kind, model, task))

    async def _command(
        self, kind: str, model: ModelId, how: Mapping[str, object], unpinnings: int
    ) -> Outcome | None:
        loop = self.life.loop
        try:
            if kind == "load":
                outcome = await loop.load(model, pin=how["pin"])  # type: ignore[arg-type]
            else:
                outcome = await loop.unload(model, **how)  # type: ignore[arg-type]
        except (StoreError, ShuttingDown):
            self.promises.answered(kind, model, how, unpinnings, accepted=False)
            return None
        self.promises.answered(kind, model, how, unpinnings, accepted=True)
        return await loop.finished(outcome, 100_000.0)

    def reload(self, models: Mapping[ModelId, Model]) -> None:
        self.promises.reloaded(self.models, models)
        self.models = models
        self.aio.create_task(self.life.loop.renew(models, DEVICES))

    def resync(self) -> None:
        """As the application does it every 30 s."""
        if self.life.is_turning:
            self.aio.create_task(self.life.checkup.run())

    # --- time

    def measure(self) -> None:
        """A sample of now is on its way, and those that have lagged enough arrive."""
        if self.samples_lag_s is None:
            return
        self._under_way.append(self.machine.sample())
        while self._under_way and self._under_way[0].taken_at_s <= self.clock() - self.samples_lag_s:
            sample = self._under_way.pop(0)
            if self.life.is_turning:
                self.life.loop.inbox.post(Sampled(sample))

    def _sampling_s(self) -> float:
        """Often while memory is on the move, as the monitor does it; else only when a timer is due."""
        states = (instance.state for instance in self.life.loop.snapshot.instances.values())
        return 0.5 if any(state in ON_THE_MOVE for state in states) else inf

    def progress(self, rounds: int | None) -> None:
        """Let every task go that many awaits further; None: as far as it can, measuring once."""
        self.promises.seen["step"] += 1
        if rounds is None:
            self.aio.run_until_quiet()
            self.promises.check_quiet()
            self.measure()
            self.aio.run_until_quiet()
            self.promises.check_quiet()
            return
        for _ in range(rounds):
            self.aio.run_round()
        self.promises.check()

    def pass_time(self, seconds: float) -> None:
        """From timer to timer, measuring at each."""
        self.progress(None)
        until_s = self.clock() + seconds
        while self.clock() < until_s:
            due_s = self.aio.next_due_s()
            next_s = min(until_s, self.clock() + self._sampling_s(), until_s if due_s is None else due_s)
            self.clock.now_s = max(self.clock(), next_s)
            self.measure()
            self.aio.run_until_quiet()
            self.promises.check_quiet()

    def close(self) -> None:
        """End the life and the event loop."""
        self.life.is_dead = True
        tasks = asyncio.all_tasks(self.aio)
        for task in tasks:
            task.cancel()
        while not all(task.done() for task in tasks):
            self.aio.run_round()
        self.aio.close()
