"""Models as processes of this machine, which outlive the orchestrator and are found again.

An attempt is a session of its own under a tiny shell that waits for the model and writes down its exit
code, so the code is known even if nobody of ours lived to see it. Everything else that is needed after
a restart is in the attempt's folder, or, should we have died before writing it, in the environment
of the process.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import ParamSpec, TypeVar

import structlog

from orchestrator.control.ports import Exit, Found, Roots, StartOrder
from orchestrator.core.entities import AttemptId, ContainerId, ModelId, Progress
from orchestrator.core.errors import Cancelled, EngineError, EngineUnavailable, NoLog, StartFailed
from orchestrator.drivers import process_tree as tree
from orchestrator.drivers.process_folder import Folder, Meta
from orchestrator.drivers.process_ports import ADDRESS, free_port, is_answered_by
from orchestrator.drivers.process_spawn import kill_at_once, spawn, survey

log = structlog.get_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_YOUNG_S = 1.0
_ASK_AGAIN_S = 0.1
_KILL_EVERY_S = 0.02
_KILL_SELDOM_S = 1.0  # for what survives: it hangs in the kernel, and asking often does not help
_SPARE_WRAPPER_S = 0.5  # how long after a kill the wrapper may take to write the code down
_FOLLOW_EVERY_S = 0.1
_CUT_EVERY_S = 1.0
_LOOKS = 8  # over some three seconds


@dataclass(slots=True, eq=False)
class _Attempt:
    """One attempt as this process knows it. `gone` ends with its Exit once no process of it is left."""

    meta: Meta
    folder: Folder
    gone: asyncio.Future[Exit]
    child: subprocess.Popen[bytes] | None = None
    handle: int | None = None  # a pidfd, while the wrapper lives
    is_asked_to_end: bool = False
    is_news: bool = True  # whether its end is still to be told
    was_seen: bool = False  # whether we have met its wrapper alive, so its number is known to be its own

    @property
    def found(self) -> Found:
        if self.gone.done():
            return Found(self.meta.attempt, self.meta.model, exit=self.gone.result())
        return Found(self.meta.attempt, self.meta.model, ADDRESS, self.meta.port)


@dataclass(slots=True, eq=False)
class _Starting:
    """A start that is under way; its port is nobody else's although nothing listens there yet."""

    task: asyncio.Task[Found]
    port: int
    is_given_up: bool = False


class ProcessEngine:
    """Engine for host processes; `owner` and `state_dir` together decide what is ours."""

    name = "process"

    def __init__(self, state_dir: Path, owner: str) -> None:
        self._root = state_dir.resolve() / "attempts"
        self._owner = owner
        self._boot = ""
        self._attempts: dict[AttemptId, _Attempt] = {}
        self._starting: dict[AttemptId, _Starting] = {}
        self._roots: Mapping[AttemptId, Roots] = MappingProxyType({})
        self._tasks: set[asyncio.Task[None]] = set()
        self._pool = ThreadPoolExecutor(8, "process-engine")
        self._on_exit: Callable[[AttemptId, Exit], None] = lambda attempt, ended: None
        self._cutting: asyncio.Task[None] | None = None
        self._is_closed = False

    async def open(self, on_exit: Callable[[AttemptId, Exit], None]) -> None:
        """Adopt what runs, and watch it. Raises EngineUnavailable where processes cannot be kept."""
        self._on_exit = on_exit
        await self._in_thread(self._prepare)
        await self._adopt_all()
        if self._cutting is None:
            self._cutting = asyncio.create_task(self._cut_logs())
            self._tasks.add(self._cutting)

    async def start(self, order: StartOrder, report: Callable[[Progress], None]) -> Found:
        known = self._attempts.get(order.attempt)
        if known is not None:
            return known.found
        starting = self._starting.get(order.attempt)
        if starting is None:
            taken = {known.meta.port for known in self._attempts.values() if not known.gone.done()}
            port = free_port(taken | {other.port for other in self._starting.values()})
            starting = _Starting(asyncio.create_task(self._start(order, port)), port)
            self._starting[order.attempt] = starting
        # Shielded: the process must be known to us even if the caller no longer wants to hear of it.
        return await asyncio.shield(starting.task)

    async def stop(self, attempt: AttemptId, grace_s: float) -> Exit:
        if starting := self._starting.get(attempt):
            starting.is_given_up = True
            await asyncio.wait({starting.task})
        known = self._attempts.get(attempt) or await self._adopt(attempt)
        if known is None:
            return Exit(None)
        if not known.gone.done():
            try:
                await self._end(known, grace_s)
            except OSError as error:  # out of file descriptors, say: it is asked for again
                known.is_asked_to_end = False
                raise EngineError(f"'{known.meta.model}' could not be stopped: {error.strerror}.") from error
        return known.gone.result()

    async def list(self) -> tuple[Found, ...]:
        await self._adopt_all()
        return tuple(known.found for known in self._attempts.values())

    async def discard(self, attempt: AttemptId) -> None:
        """A running attempt is left alone: stop it first."""
        known = self._attempts.get(attempt) or await self._adopt(attempt)
        if attempt in self._starting or (known is not None and not known.gone.done()):
            return
        await self._in_thread(self._folder(attempt).remove)
        self._attempts.pop(attempt, None)  # after its folder: a survey that has read it must not know it anew

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
        if attempt is None:
            known = await self._newest(model, previous)
        else:
            known = self._attempts.get(attempt) or await self._adopt(attempt)
        if known is None or known.meta.model != model:
            which = "earlier attempt" if previous else "attempt"
            raise NoLog(f"There is no log of '{model}': no {which} of it was kept.")
        try:
            position = await self._in_thread(known.folder.log.tail, tail)
        except OSError as error:
            raise NoLog(f"There is no log of '{model}': {error.strerror}.") from error
        async for chunk in self._read_log(known, position, follow):
            yield chunk

    async def serves(self, attempt: AttemptId) -> bool:
        """Whether what listens on the attempt's port is the attempt; True also where /proc does not tell."""
        known = self._attempts.get(attempt)
        if known is None or known.gone.done():
            return False
        return await self._in_thread(self._is_listening, known)

    def _is_listening(self, known: _Attempt) -> bool:
        try:
            return is_answered_by(known.meta.port, [p.pid for p in self._members(known)])
        except OSError:
            return True

    async def container_name(self, container: ContainerId) -> str | None:
        return None

    async def health(self) -> str | None:
        if await self._in_thread(os.access, self._root, os.W_OK):
            return None
        return f"the folder {self._root} cannot be written"

    async def close(self) -> None:
        self._is_closed = True
        spawning = [starting.task for starting in self._starting.values()]
        await asyncio.gather(*spawning, return_exceptions=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for known in self._attempts.values():
            self._unwatch(known)
            if known.child is not None and known.child.returncode is None:
                known.child.returncode = 0  # it is meant to go on: its destructor need not warn
        self._pool.shutdown(wait=False)

    # Starting

    async def _start(self, order: StartOrder, port: int) -> Found:
        try:
            folder = self._folder(order.attempt)
            spawning = self._in_thread(spawn, order, folder, port, self._owner, self._boot)
            child, meta = await spawning
            try:
                known = self._watch(meta, child)
            except OSError as error:
                kill_at_once(child)
                raise StartFailed(f"'{order.model}' could not be watched: {error.strerror}.") from error
        finally:
            starting = self._starting.pop(order.attempt)
        if starting.is_given_up:
            raise Cancelled(f"The start of '{order.model}' was given up: it was to be stopped.")
        self._run(self._drop_older(known.meta))
        return known.found

    async def _drop_older(self, newest: Meta) -> None:
        """Keep the log of one ended attempt of each model beside the newest."""
        ended = [
            known.meta
            for known in self._attempts.values()
            if known.meta.model == newest.model and known.meta.attempt != newest.attempt and known.gone.done()
        ]
        for meta in sorted(ended, key=lambda meta: meta.created_at)[:-1]:
            await self.discard(meta.attempt)

    # Watching

    def _watch(self, meta: Meta, child: subprocess.Popen[bytes] | None = None) -> _Attempt:
        """Raises OSError, and then it is neither known nor watched."""
        loop = asyncio.get_running_loop()
        handle = self._open_handle(meta)
        known = _Attempt(meta, self._folder(meta.attempt), loop.create_future(), child, handle)
        known.was_seen = handle is not None or child is not None
        self._attempts[meta.attempt] = known
        self._show_roots()
        if known.handle is None:
            self._seen_ending(known)
        else:
            loop.add_reader(known.handle, self._seen_ending, known)
        return known

    def _open_handle(self, meta: Meta) -> int | None:
        """A pidfd of the attempt's wrapper, or None if that is gone."""
        if meta.boot_id != self._boot:
            return None
        try:
            handle = os.pidfd_open(meta.pid)
        except ProcessLookupError:
            return None
        # Only now is the number sure not to change hands.
        if tree.is_same(meta.pid, meta.started_ticks):
            return handle
        os.close(handle)
        return None

    def _unwatch(self, known: _Attempt) -> None:
        if known.handle is not None:
            asyncio.get_running_loop().remove_reader(known.handle)
            os.close(known.handle)
            known.handle = None

    def _seen_ending(self, known: _Attempt) -> None:
        self._unwatch(known)
        self._run(self._ended(known))

    async def _ended(self, known: _Attempt) -> None:
        """The wrapper is gone: end what it left behind, then tell."""
        if known.child is not None:
            known.child.wait()  # returns at once, and leaves no zombie
        await self._kill_the_rest(known, _LOOKS)
        ended = Exit(None)
        try:
            await self._in_thread(known.folder.log.cut)
            ended = await self._in_thread(_exit_of, known.folder, known.child)
        except OSError as error:  # out of file descriptors, say: that it ended must be told all the same
            log.warning("how a process ended could not be read", model=known.meta.model, error=str(error))
        known.gone.set_result(ended)
        self._show_roots()
        if known.is_news:
            self._on_exit(known.meta.attempt, ended)

    async def _kill_the_rest(self, known: _Attempt, looks: float) -> None:
        """Return once nothing is left, or when nothing could be seen so many times: the wrapper has ended,
        which is to be told. What it left is then ended whenever it can be seen again."""
        pause_s = _KILL_EVERY_S
        while looks > 0:
            try:
                if not await self._in_thread(self._kill_members, known, True):
                    return
            except OSError as error:
                looks -= 1
                if looks == 0:
                    log.warning(
                        "what a process left cannot be seen", model=known.meta.model, error=str(error)
                    )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _KILL_SELDOM_S)
        known.was_seen = False  # from now on its number may become somebody else's
        self._run(self._kill_the_rest(known, math.inf))

    def _show_roots(self) -> None:
        """A new mapping each time, so that a reader in another thread never sees one change."""
        living = (known.meta for known in self._attempts.values() if not known.gone.done())
        self._roots = MappingProxyType({meta.attempt: Roots(meta.pid) for meta in living})

    # Stopping

    async def _end(self, known: _Attempt, grace_s: float) -> None:
        begun_s = time.monotonic()
        if not known.is_asked_to_end:
            known.is_asked_to_end = True
            await self._ask_to_end(known, grace_s)
        left_s = begun_s + grace_s - time.monotonic()
        ended, _ = await asyncio.wait({known.gone}, timeout=max(0.0, left_s))
        if not ended:
            await self._kill(known)

    async def _ask_to_end(self, known: _Attempt, grace_s: float) -> None:
        await self._in_thread(self._terminate, known)
        # A shell that has just forked still swallows the signal in the child, until it has reset its
        # traps there. Only then ask twice: to some servers a second signal means to drop everything.
        if time.time() - known.meta.created_at < _YOUNG_S:
            await asyncio.wait({known.gone}, timeout=min(grace_s, _ASK_AGAIN_S))
            await self._in_thread(self._terminate, known)

    def _terminate(self, known: _Attempt) -> None:
        tree.send((p for p in self._members(known) if p.group == known.meta.pid), signal.SIGTERM)

    async def _kill(self, known: _Attempt) -> None:
        """Kill until nothing of it is left; a process in the kernel's hands may keep us here for long."""
        begun_s = time.monotonic()
        pause_s = _KILL_EVERY_S
        while not known.gone.done():
            with_wrapper = time.monotonic() - begun_s > _SPARE_WRAPPER_S
            await self._in_thread(self._kill_members, known, with_wrapper)
            await asyncio.wait({known.gone}, timeout=pause_s)
            pause_s = min(2 * pause_s, _KILL_SELDOM_S)

    def _kill_members(self, known: _Attempt, with_wrapper: bool) -> int:
        """Kill every process of the attempt and return how many there were."""
        doomed = [p for p in self._members(known) if with_wrapper or p.pid != known.meta.pid]
        tree.send(doomed, signal.SIGKILL)
        return len(doomed)

    def _members(self, known: _Attempt) -> tuple[tree.Process, ...]:
        meta = known.meta
        if meta.boot_id != self._boot:
            return ()  # nothing outlives a boot, and its numbers mean others now
        return tree.members(
            self._owner, meta.attempt, meta.pid, meta.started_ticks, saw_root_end=known.was_seen
        )

    # Finding

    def _prepare(self) -> None:
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._boot = tree.boot_id()
            os.close(os.pidfd_open(os.getpid()))
        except OSError as error:
            raise EngineUnavailable(
                f"Models cannot be run as processes: {error}. The process engine needs Linux 5.3 or newer, "
                f"/proc, and a folder it may write at {self._root}."
            ) from error

    async def _adopt_all(self) -> None:
        for meta in await self._look():
            await self._take(meta)

    async def _adopt(self, attempt: AttemptId) -> _Attempt | None:
        """Look for one attempt that an earlier process of ours has started."""
        for meta in await self._look():
            if meta.attempt == attempt:
                await self._take(meta)
        return self._attempts.get(attempt)

    async def _look(self) -> tuple[Meta, ...]:
        """Raises EngineUnavailable: nothing is known then."""
        try:
            return await self._in_thread(survey, self._root, self._owner, self._boot)
        except OSError as error:
            raise EngineUnavailable(f"The processes cannot be listed: {error.strerror}.") from error

    async def _take(self, meta: Meta) -> None:
        """Know and watch an attempt from now on, unless we do already."""
        if meta.attempt in self._attempts or meta.attempt in self._starting:
            return
        if not tree.is_same(meta.pid, meta.started_ticks) and not self._folder(meta.attempt).exists():
            return  # discarded since it was read
        try:
            known = self._watch(meta)
        except OSError as error:
            raise EngineUnavailable(f"A process cannot be watched: {error.strerror}.") from error
        if known.handle is None:
            # It ended while nobody watched: whoever looks for it is told now, but it is not news.
            known.is_news = False
            await asyncio.wait({known.gone}, timeout=_KILL_SELDOM_S)
            known.is_news = not known.gone.done()
            return
        with suppress(OSError):  # a full disk: its marks are enough to find it again
            if await self._in_thread(known.folder.read) is None:
                await self._in_thread(known.folder.write, meta)

    # Logs

    async def _newest(self, model: ModelId, previous: bool) -> _Attempt | None:
        """The newest attempt that was kept, or the one before it."""
        await self._adopt_all()
        kept = [known for known in self._attempts.values() if known.meta.model == model]
        kept.sort(key=lambda known: known.meta.created_at, reverse=True)
        return next(iter(kept[1:] if previous else kept), None)

    async def _read_log(self, known: _Attempt, position: int, follow: bool) -> AsyncIterator[bytes]:
        while not self._is_closed:
            was_running = not known.gone.done()  # asked before reading: what it wrote last is read, too
            while True:
                try:
                    chunk, position = await self._in_thread(known.folder.log.read, position)
                except OSError as error:
                    raise EngineUnavailable(f"The log broke off: {error.strerror}.") from error
                if not chunk:
                    break
                yield chunk
            if not (follow and was_running):
                return
            await asyncio.wait({known.gone}, timeout=_FOLLOW_EVERY_S)

    async def _cut_logs(self) -> None:
        """Nobody cuts them while we are away: what has grown until then is cut when we are back."""
        while True:
            for known in list(self._attempts.values()):
                if not known.gone.done():
                    with suppress(OSError):  # at the next time then
                        await self._in_thread(known.folder.log.cut)
            await asyncio.sleep(_CUT_EVERY_S)

    # Helpers

    def _folder(self, attempt: AttemptId) -> Folder:
        return Folder(self._root / attempt)

    def _run(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _in_thread(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Awaitable[R]:
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._pool, partial(call, *args, **kwargs))


def _exit_of(folder: Folder, child: subprocess.Popen[bytes] | None) -> Exit:
    """128 + n stands for signal n, as in a shell. Whether memory ran out cannot be known here."""
    code = folder.exit_code()
    if code is None and child is not None:  # the disk is full, or the wrapper itself was killed
        code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    return Exit(code, log_tail=folder.log.last_lines())
