"""Models as processes of this machine, which outlive the orchestrator and are found again.

An attempt is a session of its own under a tiny shell that waits for the model and writes down its exit
code, so the code is known even if nobody of ours lived to see it. Everything else that is needed after
a restart is in the attempt's folder, or, should we have died before writing it, in the environment
of the process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
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
from orchestrator.core.entities import AttemptId, ModelId, Progress
from orchestrator.core.errors import Cancelled, EngineError, EngineUnavailable, NoLog, StartFailed
from orchestrator.drivers import process_tree as tree
from orchestrator.drivers.log_tail import last_lines_of, read_chunk, tail_offset
from orchestrator.drivers.process_folder import Folder, Meta, folders
from orchestrator.drivers.process_shell import SHELL, kill_at_once, wrapped_command

log = structlog.get_logger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

ADDRESS = "127.0.0.1"

_YOUNG_S = 1.0
_ASK_AGAIN_S = 0.1
_KILL_EVERY_S = 0.02
_KILL_SELDOM_S = 1.0  # for what survives: it hangs in the kernel, and asking often does not help
_SPARE_WRAPPER_S = 0.5  # how long after a kill the wrapper may take to write the code down
_FOLLOW_EVERY_S = 0.1


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
        self._is_closed = False

    async def open(self, on_exit: Callable[[AttemptId, Exit], None]) -> None:
        """Adopt what runs, and watch it. Raises EngineUnavailable where processes cannot be kept."""
        self._on_exit = on_exit
        await self._in_thread(self._prepare)
        await self._adopt_all()

    async def start(self, order: StartOrder, report: Callable[[Progress], None]) -> Found:
        known = self._attempts.get(order.attempt)
        if known is not None:
            return known.found
        starting = self._starting.get(order.attempt)
        if starting is None:
            port = self._free_port()
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
        self, model: ModelId, attempt: AttemptId | None, *, tail: int, follow: bool
    ) -> AsyncIterator[bytes]:
        known = await self._newest(model) if attempt is None else self._attempts.get(attempt)
        if known is None and attempt is not None:
            known = await self._adopt(attempt)
        if known is None:
            raise NoLog(f"There is no log of '{model}': no attempt of it was kept.")
        try:
            offset = await self._in_thread(tail_offset, known.folder.log, tail)
        except OSError as error:
            raise NoLog(f"There is no log of '{model}': {error.strerror}.") from error
        async for chunk in self._read_log(known, offset, follow):
            yield chunk

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
            child, meta = await self._in_thread(self._spawn, order, port)
            try:
                known = self._watch(meta, child)
            except OSError as error:
                self._attempts.pop(order.attempt, None)
                kill_at_once(child)
                raise StartFailed(f"'{order.model}' could not be watched: {error.strerror}.") from error
        finally:
            starting = self._starting.pop(order.attempt)
        if starting.is_given_up:
            raise Cancelled(f"The start of '{order.model}' was given up: it was to be stopped.")
        self._run(self._drop_older(known.meta))
        return known.found

    def _spawn(self, order: StartOrder, port: int) -> tuple[subprocess.Popen[bytes], Meta]:
        """Start the attempt's processes and write down who they are. Raises StartFailed."""
        folder = self._folder(order.attempt)
        environment = self._environment(order, port)
        command = wrapped_command(order, port, environment)
        try:
            folder.make()
            with folder.log.open("ab") as log:
                child = subprocess.Popen(
                    [*SHELL, str(folder.exit), *command],
                    stdin=subprocess.DEVNULL,
                    # A file, since a pipe's reader dies with us and its writer then dies of that.
                    stdout=log,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            folder.remove()
            raise StartFailed(f"'{order.model}' could not be started: {error}.") from error
        meta = Meta(
            attempt=order.attempt,
            model=order.model,
            owner=self._owner,
            pid=child.pid,
            started_ticks=tree.started_ticks(child.pid),
            boot_id=self._boot,
            port=port,
            created_at=time.time(),
        )
        try:
            folder.write(meta)
        except OSError as error:
            kill_at_once(child)
            raise StartFailed(f"'{order.model}' could not be written down: {error.strerror}.") from error
        return child, meta

    def _environment(self, order: StartOrder, port: int) -> dict[str, str]:
        """Ours, the launch's, then what the engine decides. Our own settings and keys stay with us."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ORCHESTRATOR_")}
        if sys.prefix != sys.base_prefix:  # in a virtual environment `python` means that one's
            bin_dir = str(Path(sys.executable).parent)
            environment["PATH"] = os.pathsep.join((bin_dir, environment.get("PATH", os.defpath)))
        environment |= {k: v.replace("{port}", str(port)) for k, v in order.launch.environment.items()}
        return environment | {
            "HOST": ADDRESS,
            "PORT": str(port),
            # Without a GPU in its placement a model has no bytes on one: it must not see any.
            "CUDA_VISIBLE_DEVICES": ",".join(gpu.id for gpu in order.gpus),
            tree.ATTEMPT_MARK: order.attempt,
            tree.OWNER_MARK: self._owner,
            tree.MODEL_MARK: order.model,
        }

    async def _drop_older(self, newest: Meta) -> None:
        """Keep the last log of each model only."""
        for known in list(self._attempts.values()):
            meta = known.meta
            if meta.model == newest.model and meta.attempt != newest.attempt and known.gone.done():
                await self.discard(meta.attempt)

    # Watching

    def _watch(self, meta: Meta, child: subprocess.Popen[bytes] | None = None) -> _Attempt:
        loop = asyncio.get_running_loop()
        known = _Attempt(meta, self._folder(meta.attempt), loop.create_future(), child)
        self._attempts[meta.attempt] = known
        self._show_roots()
        known.handle = self._open_handle(meta)
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
        ended = Exit(None)
        try:
            pause_s = _KILL_EVERY_S
            while await self._in_thread(self._kill_members, known.meta, True):
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _KILL_SELDOM_S)
            ended = await self._in_thread(_exit_of, known.folder, known.child)
        except OSError as error:  # out of file descriptors, say: that it ended must be told all the same
            log.warning("how a process ended could not be read", model=known.meta.model, error=str(error))
        known.gone.set_result(ended)
        self._show_roots()
        if known.is_news:
            self._on_exit(known.meta.attempt, ended)

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
        await self._in_thread(self._terminate, known.meta)
        # A shell that has just forked still swallows the signal in the child, until it has reset its
        # traps there. Only then ask twice: to some servers a second signal means to drop everything.
        if time.time() - known.meta.created_at < _YOUNG_S:
            await asyncio.wait({known.gone}, timeout=min(grace_s, _ASK_AGAIN_S))
            await self._in_thread(self._terminate, known.meta)

    def _terminate(self, meta: Meta) -> None:
        tree.send((p for p in self._members(meta) if p.group == meta.pid), signal.SIGTERM)

    async def _kill(self, known: _Attempt) -> None:
        """Kill until nothing of it is left; a process in the kernel's hands may keep us here for long."""
        begun_s = time.monotonic()
        pause_s = _KILL_EVERY_S
        while not known.gone.done():
            with_wrapper = time.monotonic() - begun_s > _SPARE_WRAPPER_S
            await self._in_thread(self._kill_members, known.meta, with_wrapper)
            await asyncio.wait({known.gone}, timeout=pause_s)
            pause_s = min(2 * pause_s, _KILL_SELDOM_S)

    def _kill_members(self, meta: Meta, with_wrapper: bool) -> int:
        """Kill every process of the attempt and return how many there were."""
        doomed = [p for p in self._members(meta) if with_wrapper or p.pid != meta.pid]
        tree.send(doomed, signal.SIGKILL)
        return len(doomed)

    def _members(self, meta: Meta) -> tuple[tree.Process, ...]:
        if meta.boot_id != self._boot:
            return ()  # nothing outlives a boot, and its numbers mean others now
        return tree.members(self._owner, meta.attempt, meta.pid, meta.started_ticks)

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
        for meta in await self._in_thread(self._survey):
            await self._take(meta)

    async def _adopt(self, attempt: AttemptId) -> _Attempt | None:
        """Look for one attempt that an earlier process of ours has started."""
        for meta in await self._in_thread(self._survey):
            if meta.attempt == attempt:
                await self._take(meta)
        return self._attempts.get(attempt)

    async def _take(self, meta: Meta) -> None:
        """Know and watch an attempt from now on, unless we do already."""
        if meta.attempt in self._attempts or meta.attempt in self._starting:
            return
        if not tree.is_same(meta.pid, meta.started_ticks) and not self._folder(meta.attempt).exists():
            return  # discarded since it was read
        known = self._watch(meta)
        if known.handle is None:
            # It ended while nobody watched: whoever looks for it is told now, but it is not news.
            known.is_news = False
            await asyncio.wait({known.gone}, timeout=_KILL_SELDOM_S)
            known.is_news = not known.gone.done()
        elif await self._in_thread(known.folder.read) is None:
            with suppress(OSError):  # a full disk: its marks are enough to find it again
                await self._in_thread(known.folder.write, meta)

    def _survey(self) -> tuple[Meta, ...]:
        """Every attempt of this owner in the folders, and those that run without a meta in theirs."""
        metas = [meta for folder in folders(self._root) if (meta := folder.read())]
        ours = {meta.attempt: meta for meta in metas if meta.owner == self._owner}
        for process, environment in tree.marked_processes(self._owner):
            attempt = environment[tree.ATTEMPT_MARK]
            is_wrapper = tree.read_command(process.pid)[:3] == SHELL
            if attempt not in ours and is_wrapper and process.pid == process.session:
                ours[attempt] = self._meta_of(process, environment)
        return tuple(ours.values())

    def _meta_of(self, process: tree.Process, environment: Mapping[str, str]) -> Meta:
        return Meta(
            attempt=environment[tree.ATTEMPT_MARK],
            model=environment.get(tree.MODEL_MARK, ""),
            owner=self._owner,
            pid=process.pid,
            started_ticks=process.started_ticks,
            boot_id=self._boot,
            port=int(environment.get("PORT", "0")),
            created_at=time.time(),
        )

    # Logs

    async def _newest(self, model: ModelId) -> _Attempt | None:
        await self._adopt_all()
        kept = [known for known in self._attempts.values() if known.meta.model == model]
        return max(kept, key=lambda known: known.meta.created_at, default=None)

    async def _read_log(self, known: _Attempt, offset: int, follow: bool) -> AsyncIterator[bytes]:
        while not self._is_closed:
            was_running = not known.gone.done()  # asked before reading: what it wrote last is read, too
            while chunk := await self._in_thread(read_chunk, known.folder.log, offset):
                offset += len(chunk)
                yield chunk
            if not (follow and was_running):
                return
            await asyncio.wait({known.gone}, timeout=_FOLLOW_EVERY_S)

    # Helpers

    def _folder(self, attempt: AttemptId) -> Folder:
        return Folder(self._root / attempt)

    def _free_port(self) -> int:
        """A port that nobody has, nor was promised by us. Raises StartFailed."""
        taken = {known.meta.port for known in self._attempts.values() if not known.gone.done()}
        taken |= {starting.port for starting in self._starting.values()}
        for _ in range(100):
            try:
                with socket.socket() as probe:
                    probe.bind((ADDRESS, 0))
                    port: int = probe.getsockname()[1]
            except OSError as error:
                raise StartFailed(f"No port could be had for the model: {error.strerror}.") from error
            if port not in taken:
                return port
        raise StartFailed("No free port was found for the model.")

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
    if code is None and child is not None and child.returncode < 0:
        code = 128 - child.returncode  # the wrapper itself was killed
    return Exit(code, log_tail=last_lines_of(folder.log))
