"""Models as containers of a Docker engine; see ports.Engine for the contract.

The engine is asked in threads: a general pool, one for stops, which wait for the whole grace, one thread
for events, and one for each pull and log that is followed. Nothing here waits for another of them.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import requests

from orchestrator.control.ports import Exit, Found, Roots, StartOrder
from orchestrator.core.entities import AttemptId, ContainerId, ModelId, Progress
from orchestrator.core.errors import EngineError, EngineUnavailable, NoLog, StartFailed
from orchestrator.drivers.docker_boxes import Box, Row
from orchestrator.drivers.docker_calls import Calls, Limits
from orchestrator.drivers.docker_errors import ImageNotHere, image_missing, was_given_up
from orchestrator.drivers.docker_gpu import AUTO, choose_mode
from orchestrator.drivers.docker_lent import Named
from orchestrator.drivers.docker_pull import STAGE, HeardLines, follow_pull
from orchestrator.drivers.docker_spec import (
    ATTEMPT_LABEL,
    MODEL_LABEL,
    is_built_here,
)
from orchestrator.drivers.docker_streams import EventWatcher, in_new_thread, read_stream

P = ParamSpec("P")
R = TypeVar("R")

_SUBSCRIBE_S = 10.0
_KILL_FIRST_S = 0.1
_KILL_LAST_S = 5.0
_LOOK_FIRST_S = 0.5
_LOOK_LAST_S = 5.0
_KILLED = 137
_REMEMBERED_ENDS = 1000


@dataclass(slots=True, eq=False)
class _Known:
    """An attempt's container as last seen. `exit` is set once, when it has ended."""

    box: Box
    exit: Exit | None = None

    @property
    def found(self) -> Found:
        if self.exit is not None:
            return Found(self.box.attempt, self.box.model, exit=self.exit, has_run=self.box.has_run)
        box = self.box
        return Found(box.attempt, box.model, box.host, box.port, is_lent=box.is_lent, gpus=box.gpus)


@dataclass(slots=True, eq=False)
class _Starting:
    task: asyncio.Task[Found] | None = None
    given_up: asyncio.Event = field(default_factory=asyncio.Event)


class DockerEngine:
    """Engine for containers labelled with `owner`, on a bridge network of their own.

    `gpu_access` is `auto` or a GpuMode. Without `base_url` DOCKER_HOST and its relatives are used, else
    the local socket. `named` are the catalogue's fixed container names: of these, containers that somebody
    else has started may be taken over.
    """

    name = "docker"

    def __init__(
        self,
        owner: str,
        network: str,
        gpu_access: str = AUTO,
        base_url: str | None = None,
        limits: Limits = Limits(),
        named: Named = dict,
    ) -> None:
        self._limits = limits
        self._calls = Calls(owner, network, base_url, limits, named)
        self._where = base_url or "its usual socket (or DOCKER_HOST)"
        self._choose_mode = partial(choose_mode, gpu_access)
        self._known: dict[AttemptId, _Known] = {}
        self._starting: dict[AttemptId, _Starting] = {}
        self._ended_early: deque[AttemptId] = deque(maxlen=_REMEMBERED_ENDS)
        self._ran_out: deque[AttemptId] = deque(maxlen=_REMEMBERED_ENDS)  # also of who is never known
        self._roots: Mapping[AttemptId, Roots] = MappingProxyType({})
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_comparing = False
        self._is_connected = False
        self._pool = ThreadPoolExecutor(8, "docker")
        self._stops = ThreadPoolExecutor(16, "docker-stop")
        self._pings = ThreadPoolExecutor(1, "docker-ping")
        self._watcher: EventWatcher | None = None
        self._on_exit: Callable[[AttemptId, Exit], None] = lambda attempt, ended: None

    async def open(self, on_exit: Callable[[AttemptId, Exit], None]) -> None:
        """Raises EngineUnavailable with what to do; it may be tried again."""
        self._on_exit = on_exit
        try:
            await self._in_thread(self._pool, self._calls.connect, self._choose_mode)
            self._is_connected = True
            await self._watch()
        except EngineError as error:
            raise EngineUnavailable(
                f"No Docker engine answers at {self._where} ({error.message.rstrip('.')}). Start it "
                "(`systemctl start docker`), make sure that this user may use its socket (group "
                "`docker`), or choose `engine: process`."
            ) from error
        await self._adopt_all()

    async def start(self, order: StartOrder, report: Callable[[Progress], None]) -> Found:
        known = self._known.get(order.attempt)
        if known is not None and known.box.has_run:
            return known.found
        starting = self._starting.get(order.attempt)
        if starting is None:
            starting = self._starting[order.attempt] = _Starting()
            starting.task = asyncio.create_task(self._start(order, report, starting))
        assert starting.task is not None
        # Shielded: a thread cannot be called back, and what it starts must be known to us.
        return await asyncio.shield(starting.task)

    async def stop(self, attempt: AttemptId, grace_s: float) -> Exit:
        starting = self._starting.get(attempt)
        if starting is not None and starting.task is not None:
            starting.given_up.set()
            await asyncio.wait({starting.task})
        known = self._known.get(attempt) or await self._look_up(attempt)
        if known is None:
            return Exit(None)
        if not known.box.has_run and not await self._drop_unstarted(known):
            return Exit(None)
        pause_s = _KILL_FIRST_S
        if known.exit is None:
            await self._ask_in(self._stops, self._calls.stop, known.box.id, grace_s)
        while (ended := await self._settle(known)) is None:
            # Rare: the engine did not answer in time, or the process hangs in the kernel.
            await self._ask_in(self._stops, self._calls.stop, known.box.id, 0)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _KILL_LAST_S)
        return ended

    async def _drop_unstarted(self, known: _Known) -> bool:
        """Remove what was created and never started, so that a late engine finds nothing to start.

        True if it is there all the same and has to be stopped as others are.
        """
        await self._ask(self._calls.remove, known.box.id, force=True)
        box = await self._ask(self._calls.inspect, known.box.id)
        if box is not None and box.is_running:
            known.box, known.exit = box, None
            return True
        self._known.pop(known.box.attempt, None)
        return False

    async def list(self) -> tuple[Found, ...]:
        await self._adopt_all()
        return tuple(known.found for known in self._known.values())

    async def discard(self, attempt: AttemptId) -> None:
        """A running attempt is left alone: stop it first."""
        known = self._known.get(attempt) or await self._look_up(attempt)
        if known is None or known.exit is None or attempt in self._starting:
            return
        await self._ask(self._calls.remove, known.box.id)
        self._known.pop(attempt, None)

    def roots(self) -> Mapping[AttemptId, Roots]:
        return self._roots

    async def logs(
        self,
        model: ModelId,
        attempt: AttemptId | None,
        *,
        tail: int,
        follow: bool,
        previous: bool = False,
    ) -> AsyncIterator[bytes]:
        rows = await self._ask(self._calls.rows, f"{MODEL_LABEL}={model}")
        asked = (row for row in rows if attempt in (None, row.attempt))
        kept = sorted(asked, key=lambda row: -row.created_s)  # within a second in the engine's order
        if attempt is None and previous:
            kept = kept[1:]
        if not kept:
            which = "earlier container" if previous else "container"
            raise NoLog(f"There is no log of '{model}': no {which} of it was kept.")
        open_stream = partial(self._calls.log_stream, kept[0].id, tail, follow)
        async for chunk in read_stream(f"docker-log-{kept[0].attempt[:8]}", open_stream):
            yield chunk

    async def serves(self, attempt: AttemptId) -> bool:
        """A container has an address of its own: who answers there is the attempt, while it runs."""
        known = self._known.get(attempt)
        return known is not None and known.exit is None

    async def container_name(self, container: ContainerId) -> str | None:
        return await self._ask(self._calls.name_of, container)

    async def health(self) -> str | None:
        try:
            await self._ask_in(self._pings, self._calls.ping)
        except EngineError as error:
            return error.message
        return None

    async def close(self) -> None:
        await self._unwatch()
        tasks: set[asyncio.Task[Any]] = set(self._tasks)
        for starting in self._starting.values():
            # A pull is not waited for; what a thread makes all the same has our labels and is found again.
            starting.given_up.set()
            if starting.task is not None:
                tasks.add(starting.task)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pool in (self._pool, self._stops, self._pings):
            pool.shutdown(wait=False)

    # Starting

    async def _start(
        self, order: StartOrder, report: Callable[[Progress], None], starting: _Starting
    ) -> Found:
        try:
            box = await self._bring_up(order, report, starting)
        finally:
            self._starting.pop(order.attempt)
        known = self._know(box)
        if starting.given_up.is_set():
            raise was_given_up(order)  # whoever gave it up stops the container, which is known now
        self._run(self._drop_older(order))
        if not box.is_running:
            await self._settle(known)
        return known.found

    async def _bring_up(
        self, order: StartOrder, report: Callable[[Progress], None], starting: _Starting
    ) -> Box:
        image = order.launch.image
        if not image:
            where = f"services/{order.launch.service}/service.yaml"
            raise StartFailed(f"'{order.model}' cannot run in a container: {where} has no `image`.")
        is_given_up = starting.given_up.is_set
        try:
            return await self._ask(self._calls.bring_up, order, image, is_given_up)
        except ImageNotHere:
            await self._pull(order, image, report, starting)
        try:
            return await self._ask(self._calls.bring_up, order, image, is_given_up)
        except ImageNotHere as error:
            raise image_missing(order, image, "it was gone right after the pull") from error

    async def _pull(
        self, order: StartOrder, image: str, report: Callable[[Progress], None], starting: _Starting
    ) -> None:
        """Raises ImageMissing, Cancelled or EngineUnavailable."""
        if is_built_here(image):
            raise image_missing(order, image, "it is built here, and was not yet")
        report(Progress(STAGE, None, image))
        loop = asyncio.get_running_loop()

        def tell(progress: Progress) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(report, progress)

        lines = HeardLines(self._calls.pull_lines(image))
        is_left = threading.Event()
        pull = in_new_thread("docker-pull", follow_pull, lines, image, tell, is_left.is_set)
        given_up = asyncio.create_task(starting.given_up.wait())
        try:
            while not (pull.done() or given_up.done()) and lines.silent_s < self._limits.pull_s:
                left_s = self._limits.pull_s - lines.silent_s
                await asyncio.wait((pull, given_up), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # A registry that hangs says nothing for long: then the thread is left to itself.
            is_left.set()
            given_up.cancel()
        if starting.given_up.is_set():
            pull.cancel()
            raise was_given_up(order)
        if not pull.done():
            pull.cancel()
            raise EngineUnavailable(
                f"The pull of '{image}' has shown no progress for {lines.silent_s:.0f} s."
            )
        try:
            pull.result()
        except EngineUnavailable:
            raise
        except EngineError as error:
            raise image_missing(order, image, error.message.rstrip(".")) from error

    async def _drop_older(self, order: StartOrder) -> None:
        """Keep one ended container of the model beside this one, for its log, and name it so."""
        with suppress(EngineError):
            rows = await self._ask(self._calls.rows, f"{MODEL_LABEL}={order.model}")
            others = [row for row in rows if row.attempt not in (order.attempt, *self._starting)]
            ended = sorted((row for row in others if row.has_ended), key=lambda row: -row.created_s)
            now_s = max((row.created_s for row in rows), default=0)  # by the engine's clock
            for row in others:
                # What nobody can be about to start any more was left by a caller that died.
                is_left = not row.is_running and row.created_s < now_s - self._limits.change_s
                if row in ended[1:] or (is_left and row not in ended):
                    await self._ask(self._calls.remove, row.id)
                    self._known.pop(row.attempt, None)
            for row in ended[:1]:
                await self._ask(self._calls.set_previous, row.id, order)

    # Watching

    async def _unwatch(self) -> None:
        if self._watcher is not None:
            await asyncio.to_thread(self._watcher.close)
            self._watcher = None

    async def _watch(self) -> None:
        await self._unwatch()
        loop = asyncio.get_running_loop()
        connected = asyncio.Event()

        def on_connected() -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(connected.set if not connected.is_set() else self._compare)

        def on_lost() -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._compare)

        def on_event(event: Mapping[str, Any]) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._heard, event)

        self._watcher = EventWatcher(self._calls.events, on_event, on_connected, on_lost)
        self._watcher.start()
        try:
            await asyncio.wait_for(connected.wait(), _SUBSCRIBE_S)
        except TimeoutError as error:
            raise EngineUnavailable("The Docker engine tells no events.") from error

    def _compare(self) -> None:
        """The events were interrupted: see for ourselves what has ended meanwhile."""

        async def look() -> None:
            pause_s = _LOOK_FIRST_S
            try:
                while not await self._could_look():
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _LOOK_LAST_S)
            finally:
                self._is_comparing = False

        if not self._is_comparing:
            self._is_comparing = True
            self._run(look())

    async def _could_look(self) -> bool:
        try:
            await self._adopt_all()
        except EngineError:
            return False
        return True

    def _heard(self, event: Mapping[str, Any]) -> None:
        attributes = event["Actor"]["Attributes"]
        attempt: AttemptId = attributes.get(ATTEMPT_LABEL, "")
        if event["Action"] == "oom":
            if attempt not in self._ran_out:
                self._ran_out.append(attempt)
            return
        known = self._known.get(attempt)
        if known is None:
            self._ended_early.append(attempt)
        elif known.exit is None and known.box.id == event["Actor"]["ID"]:
            code = attributes.get("exitCode")
            self._run(self._see_end(known, int(code) if code else None))

    async def _see_end(self, known: _Known, code: int | None) -> None:
        try:
            await self._settle(known, code)
        except EngineError:
            self._compare()

    async def _settle(self, known: _Known, code: int | None = None) -> Exit | None:
        """Ask whether it has ended, and if so, take that in and tell; `code` is for one already removed.

        None while it runs. Raises EngineUnavailable.
        """
        if known.exit is None:
            ended = await self._ask(self._end_of, known.box, code)
            if ended is not None and known.exit is None:
                self._take_in(known, ended)
                self._on_exit(known.box.attempt, known.exit or ended)
        return known.exit

    def _end_of(self, old: Box, code: int | None) -> Exit | None:
        box = self._calls.inspect(old.id)
        if box is None or (box.is_running and box.is_another_life_of(old)):
            return Exit(code)
        return None if box.is_running else self._calls.exit_of(box)

    def _take_in(self, known: _Known, ended: Exit) -> None:
        was_killed_for_memory = known.box.attempt in self._ran_out and ended.code == _KILLED
        known.exit = replace(ended, oom=ended.oom or was_killed_for_memory)
        with suppress(ValueError):
            self._ran_out.remove(known.box.attempt)
        self._show_roots()

    # Finding

    async def _adopt_all(self) -> None:
        """Make what we know agree with the engine's list."""
        before = dict(self._known)
        rows = {row.attempt: row for row in await self._ask(self._calls.rows)}
        for attempt, row in rows.items():
            if attempt not in self._starting:
                await self._adopt(row)
        for attempt, known in before.items():
            if attempt not in rows and known.exit is None:
                await self._settle(known)
            elif attempt not in rows:
                self._known.pop(attempt, None)

    async def _look_up(self, attempt: AttemptId) -> _Known | None:
        for row in await self._ask(self._calls.rows, f"{ATTEMPT_LABEL}={attempt}"):
            await self._adopt(row)
        return self._known.get(attempt)

    async def _adopt(self, row: Row) -> None:
        known = self._known.get(row.attempt)
        if known is not None and row.is_running and known.exit is not None:
            del self._known[row.attempt]  # the engine has started it late
        elif known is not None:
            if not row.is_running or row.is_lent:
                await self._settle(known)
            return
        box = await self._ask(self._calls.inspect, row.id)
        if box is None:
            return
        ended = None if box.is_running else await self._ask(self._calls.exit_of, box)
        if row.attempt not in self._known and row.attempt not in self._starting:
            known = self._know(box)
            if ended is not None:  # nobody waits for this news: whoever looks for it is told now
                self._take_in(known, ended)

    def _know(self, box: Box) -> _Known:
        known = self._known[box.attempt] = _Known(box)
        self._show_roots()
        if box.attempt in self._ended_early:  # between our asking the engine and now
            self._run(self._see_end(known, None))
        return known

    def _show_roots(self) -> None:
        """A new mapping each time, so that a reader in another thread never sees one change."""
        running = (known.box for known in self._known.values() if known.exit is None and known.box.pid)
        self._roots = MappingProxyType({box.attempt: Roots(box.pid, box.id) for box in running})

    # Threads

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._ask_in(self._pool, call, *args, **kwargs)

    async def _ask_in(self, pool: Executor, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._is_connected:
            raise EngineUnavailable("The Docker engine has not answered yet; ask again in a moment.")
        return await self._in_thread(pool, call, *args, **kwargs)

    async def _in_thread(self, pool: Executor, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(pool, partial(_twice, partial(call, *args, **kwargs)))


def _twice(call: Callable[[], R]) -> R:
    """Ask again if the connection broke: after an engine's restart the kept ones are all dead."""
    try:
        return call()
    except EngineUnavailable as error:
        if not isinstance(error.__cause__, requests.exceptions.ConnectionError):
            raise
    return call()
