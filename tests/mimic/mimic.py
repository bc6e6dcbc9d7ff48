"""A GPU service that has no GPU: claims simulated memory, loads, serves, streams, crashes on command.

Standard library only, starts as `python3 -S -E mimic.py`. Everything is set in the environment:

    HOST, PORT           where to listen (127.0.0.1, 8000; port 0 takes a free one, see the log's first line)
    MIMIC_NAME           the model's name, which its answers carry
    MIMIC_MIB            simulated memory to hold, split evenly over the GPUs named (UUID or index, commas)
                         in CUDA_VISIBLE_DEVICES, else NVIDIA_VISIBLE_DEVICES; none without SIMULATED_NVML_DIR
    MIMIC_RAM_MIB        real anonymous RAM to allocate and touch
    MIMIC_LOAD_S         seconds over which both grow; until then /health and the API say 503
    MIMIC_BIND_S         seconds before it listens at all
    MIMIC_START          exit:<code>[:<message>] ends at once, with the message on stderr
    MIMIC_NEVER_HEALTHY  1: loads, but stays at 503
    MIMIC_IGNORE_SIGTERM 1: only SIGKILL helps
    MIMIC_RELEASE_S      seconds from SIGTERM, when serving ends, to the exit, when the memory returns
    MIMIC_LATE_S         seconds from SIGTERM for which the memory stays in use, but is nobody's any more
    MIMIC_CRASH_AFTER    answers this many requests and kills itself in the middle of the next answer
    MIMIC_TOKENS, MIMIC_TOKENS_PER_S    length of an answer (8) and its pace (0: as fast as possible)
    MIMIC_SLOTS          what /slots shows (4)
    MIMIC_SAYS           text to print while it loads, as of buffers
    MIMIC_HOLD_ONLY      1: no server; log `ready` once the memory is held, then wait to be ended

One request may say otherwise, in the JSON body's "mimic" or in the query's `mimic={...}`:

    tokens, tokens_per_s    as above
    delay_s                 seconds before the first byte
    status                  answer with this HTTP error
    cut_after               close without warning after n chunks; 0: before the first byte
    cut_if_reused           close without an answer if the connection has served a request before

A claim that does not fit ends the process as CUDA would ("CUDA error: out of memory", exit code 1) and
adds a line to overbooked.log in the simulated directory. All claims grow under one lock, so two of them
cannot take the same room.
"""

import asyncio
import base64
import fcntl
import hashlib
import json
import mmap
import os
import signal
import struct
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

MIB = 1024 * 1024
LOAD_STEPS = 20
FLOCK = struct.Struct("hhqqi4x")  # struct flock of Linux on 64 bits: type, whence, start, length, pid
STATUS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


def log(line: str) -> None:
    print(line, flush=True)


# ---- settings ----


@dataclass(frozen=True)
class Settings:
    host: str
    port: int
    name: str
    root: Path | None
    gpus: tuple[str, ...]
    mib: int
    ram_mib: int
    load_s: float
    bind_s: float
    start: str
    never_healthy: bool
    ignore_sigterm: bool
    release_s: float
    late_s: float
    crash_after: int | None
    tokens: int
    tokens_per_s: float
    slots: int
    says: str
    hold_only: bool


def read_settings(env: dict[str, str]) -> Settings:
    root = env.get("SIMULATED_NVML_DIR")
    named = env.get("CUDA_VISIBLE_DEVICES", env.get("NVIDIA_VISIBLE_DEVICES", ""))
    return Settings(
        host=env.get("HOST", "127.0.0.1"),
        port=int(env.get("PORT", "8000")),
        name=env.get("MIMIC_NAME", "mimic"),
        root=Path(root) if root else None,
        gpus=tuple(part.strip() for part in named.split(",") if part.strip()),
        mib=int(env.get("MIMIC_MIB", "0")),
        ram_mib=int(env.get("MIMIC_RAM_MIB", "0")),
        load_s=float(env.get("MIMIC_LOAD_S", "0")),
        bind_s=float(env.get("MIMIC_BIND_S", "0")),
        start=env.get("MIMIC_START", ""),
        never_healthy=env.get("MIMIC_NEVER_HEALTHY") == "1",
        ignore_sigterm=env.get("MIMIC_IGNORE_SIGTERM") == "1",
        release_s=float(env.get("MIMIC_RELEASE_S", "0")),
        late_s=float(env.get("MIMIC_LATE_S", "0")),
        crash_after=int(env["MIMIC_CRASH_AFTER"]) if env.get("MIMIC_CRASH_AFTER") else None,
        tokens=int(env.get("MIMIC_TOKENS", "8")),
        tokens_per_s=float(env.get("MIMIC_TOKENS_PER_S", "0")),
        slots=int(env.get("MIMIC_SLOTS", "4")),
        says=env.get("MIMIC_SAYS", ""),
        hold_only=env.get("MIMIC_HOLD_ONLY") == "1",
    )


# ---- simulated GPU memory ----


class OutOfMemory(Exception):
    """The simulated GPU has less free memory than was asked of it."""


@dataclass(frozen=True)
class Gpu:
    index: int
    uuid: str
    usable_mib: int  # without the driver's reserve
    extra_used_mib: int


def read_gpus(root: Path) -> list[Gpu]:
    gpus: list[Gpu] = []
    while (path := root / f"gpu{len(gpus)}").exists():
        values = dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
        usable_mib = int(values["total_mib"]) - int(values.get("reserved_mib", 0))
        gpus.append(Gpu(len(gpus), values["uuid"], usable_mib, int(values.get("extra_used_mib", 0))))
    return gpus


def choose_gpus(gpus: list[Gpu], wanted: tuple[str, ...]) -> list[Gpu]:
    """The GPUs that `wanted` names, in that order; an unknown name ends the list, as in CUDA."""
    if wanted == ("all",):
        return gpus
    by_name = {gpu.uuid: gpu for gpu in gpus} | {str(gpu.index): gpu for gpu in gpus}
    chosen = []
    for name in wanted:
        if name not in by_name:
            break
        chosen.append(by_name[name])
    return chosen


class Claim:
    """This process's file of claimed memory, locked until the process ends.

    The file must not be opened a second time in this process: closing any descriptor of it would
    drop the lock.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self.path = root / "claims" / f"{os.getpid()}-{os.urandom(6).hex()}"
        self._fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def hold(self, mib_by_uuid: dict[str, int]) -> None:
        """Hold exactly this much from now on, all or nothing. Raises OutOfMemory."""
        with self._alone():
            for gpu in read_gpus(self._root):
                used_mib = gpu.extra_used_mib + self._used_by_others(gpu)
                if used_mib + mib_by_uuid.get(gpu.uuid, 0) > gpu.usable_mib and gpu.uuid in mib_by_uuid:
                    self._complain(gpu, used_mib, mib_by_uuid[gpu.uuid])
            lines = "".join(f"{uuid} {mib:10d}\n" for uuid, mib in mib_by_uuid.items()).encode()
            os.pwrite(self._fd, lines + b"sum %08x\n" % zlib.adler32(lines), 0)

    def release(self, late_s: float = 0) -> None:
        """Hold nothing from now on; the memory stays in use for `late_s`, belonging to nobody."""
        with self._alone() if late_s else nullcontext():
            if late_s:
                self._stay_in_use(time.time() + late_s)
            self.path.unlink(missing_ok=True)

    def _stay_in_use(self, until_s: float) -> None:
        lines = os.pread(self._fd, 4096, 0).decode().splitlines()[:-1]
        half_done = self._root / "late" / f".{self.path.name}"
        half_done.write_text("\n".join([f"until {until_s:.3f}", *lines, ""]))
        half_done.rename(self._root / "late" / self.path.name)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self._root / "alloc.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _used_by_others(self, gpu: Gpu) -> int:
        others = [path for path in self.path.parent.iterdir() if path.name != self.path.name]
        held = [*map(read_claim, others), *map(read_late, (self._root / "late").glob("[!.]*"))]
        return sum(claim.get(name, 0) for claim in held for name in (gpu.uuid, str(gpu.index)))

    def _complain(self, gpu: Gpu, used_mib: int, wanted_mib: int) -> None:
        line = f"gpu{gpu.index}: wants {wanted_mib} MiB, others use {used_mib} of {gpu.usable_mib}\n"
        with (self._root / "overbooked.log").open("a") as complaints:
            complaints.write(f"pid {os.getpid()} {line}")
        raise OutOfMemory(line)


def read_claim(path: Path) -> dict[str, int]:
    """MiB by GPU name that another process holds through `path`; nothing if it is not locked.

    To be called while no claim can grow, so that the file is whole.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    try:
        asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        if FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))[0] == fcntl.F_UNLCK:
            return {}
        lines = os.pread(fd, 4096, 0).decode().splitlines()[:-1]
    finally:
        os.close(fd)
    return {name: int(mib) for name, mib in (line.split() for line in lines)}


def read_late(path: Path) -> dict[str, int]:
    """MiB by GPU name that an ended process's memory still takes."""
    try:
        until, *lines = path.read_text().splitlines()
    except FileNotFoundError:
        return {}
    if float(until.removeprefix("until ")) <= int(time.time()):
        return {}
    return {name: int(mib) for name, mib in (line.split() for line in lines)}


@dataclass
class Memory:
    """What the service holds, as a share of what it wants."""

    settings: Settings
    claim: Claim | None = None
    gpus: list[Gpu] = field(default_factory=list)
    ram: mmap.mmap | None = None
    touched: int = 0  # bytes of `ram`

    def open(self) -> None:
        if self.settings.root and self.settings.mib:
            self.gpus = choose_gpus(read_gpus(self.settings.root), self.settings.gpus)
            if not self.gpus:
                raise OutOfMemory("no CUDA-capable device is detected")
            self.claim = Claim(self.settings.root)
        if self.settings.ram_mib:
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self.ram = mmap.mmap(-1, self.settings.ram_mib * MIB, flags=private)

    def hold(self, share: float) -> None:
        """Hold `share` (0 to 1) of everything. Raises OutOfMemory."""
        if self.claim:
            each_mib, rest_mib = divmod(int(self.settings.mib * share), len(self.gpus))
            self.claim.hold({gpu.uuid: each_mib + (i < rest_mib) for i, gpu in enumerate(self.gpus)})
        if self.ram:
            until = int(len(self.ram) * share)
            pages = range(self.touched, until, mmap.PAGESIZE)
            self.ram[self.touched : until : mmap.PAGESIZE] = b"\x01" * len(pages)
            self.touched = until

    def release(self, late_s: float = 0) -> None:
        if self.claim:
            self.claim.release(late_s)


# ---- HTTP ----


class ClientLeft(Exception):
    """The client closed its connection while it was being served."""


class HungUp(Exception):
    """We close the connection without another byte."""


class WatchedReader(asyncio.StreamReader):
    """A reader that tells at once when the peer is gone, without reading what it still sent."""

    def __init__(self) -> None:
        super().__init__(limit=MIB)
        self.gone = asyncio.Event()

    def feed_eof(self) -> None:
        super().feed_eof()
        self.gone.set()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        self.gone.set()


@dataclass
class Request:
    method: str
    target: str
    headers: list[tuple[str, str]]  # names in lower case
    reader: WatchedReader
    writer: asyncio.StreamWriter
    is_reused: bool = False  # the connection has served another request
    answer_started: bool = False
    json: dict[str, Any] = field(default_factory=dict)
    body_left: bool = True

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)

    @property
    def query(self) -> dict[str, str]:
        return {key: values[-1] for key, values in parse_qs(urlsplit(self.target).query).items()}

    def header(self, name: str) -> str:
        return ", ".join(value for key, value in self.headers if key == name)

    @property
    def keeps_alive(self) -> bool:
        return self.header("connection").lower() != "close"

    @property
    def wishes(self) -> dict[str, Any]:
        """The request's own "mimic" settings."""
        wishes = self.json.get("mimic") or json.loads(self.query.get("mimic", "{}"))
        return wishes if isinstance(wishes, dict) else {}

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes as they come in."""
        if not self.body_left:
            return
        self.body_left = False
        if self.header("expect").lower() == "100-continue":
            self.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.header("transfer-encoding").lower() == "chunked":
            while size := int((await self.reader.readline()).split(b";")[0], 16):
                yield await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            while (await self.reader.readline()).strip():
                pass
            return
        left = int(self.header("content-length") or 0)
        while left > 0:
            chunk = await self.reader.read(min(left, MIB))
            if not chunk:
                raise ClientLeft
            left -= len(chunk)
            yield chunk

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    async def wait(self, seconds: float) -> None:
        """Raises ClientLeft as soon as the client is gone."""
        if not self.reader.gone.is_set():
            try:
                await asyncio.wait_for(self.reader.gone.wait(), seconds)
            except TimeoutError:
                return
        raise ClientLeft

    async def send(self, data: bytes) -> None:
        if self.reader.gone.is_set():
            raise ClientLeft
        self.answer_started = True
        self.writer.write(data)
        await self.writer.drain()

    def head(self, status: int, *headers: str) -> bytes:
        connection = "keep-alive" if self.keeps_alive else "close"
        lines = [f"HTTP/1.1 {status} {STATUS.get(status, 'Status')}", *headers, f"Connection: {connection}"]
        return "\r\n".join([*lines, "", ""]).encode()

    async def answer(self, content: bytes, *, status: int = 200, kind: str = "application/json") -> None:
        head = self.head(status, f"Content-Type: {kind}", f"Content-Length: {len(content)}")
        await self.send(head if self.method == "HEAD" else head + content)

    async def answer_json(self, content: object, *, status: int = 200) -> None:
        await self.answer(json.dumps(content).encode(), status=status)

    async def answer_error(self, status: int, message: str, kind: str = "mimic_error") -> None:
        await self.answer_json({"error": {"message": message, "type": kind, "code": status}}, status=status)

    async def send_event(self, content: object) -> None:
        """One server-sent event as one HTTP chunk."""
        text = content if isinstance(content, str) else json.dumps(content)
        data = f"data: {text}\n\n".encode()
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))


async def read_request(reader: WatchedReader, writer: asyncio.StreamWriter) -> Request | None:
    """The next request of a connection; None when the client has no more."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    first, *rest = head.strip("\r\n").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = [
        (name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in rest)
    ]
    return Request(method, target, headers, reader, writer)


def form_field(body: bytes, content_type: str, name: str) -> str:
    """A text field of a multipart form, or the empty string."""
    boundary = content_type.partition("boundary=")[2].split(";")[0].strip('"')
    for part in body.split(f"--{boundary}".encode()):
        head, _, value = part.partition(b"\r\n\r\n")
        if boundary and f'name="{name}"'.encode() in head:
            return value.removesuffix(b"\r\n").decode()
    return ""


# ---- the service ----


@dataclass
class Stats:
    """Counts of API requests; looking (health, models, metrics, stats, ...) is not counted."""

    requests: int = 0
    streams: int = 0
    client_left: int = 0
    in_flight: int = 0


Handler = Callable[[Request], Awaitable[None]]
ECHOED = ("/completion", "/infill", "/tokenize", "/detokenize", "/apply-template", "/embedding", "/rerank")
LOADING = "Loading model"


class Service:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stats = Stats()
        self.is_loaded = False
        self.flowing = asyncio.Event()  # cleared: every stream stands still
        self.flowing.set()
        self.connections: set[asyncio.StreamWriter] = set()
        self._views: dict[str, Handler] = {
            "/health": self._health,
            "/v1/models": self._models,
            "/models": self._models,
            "/metrics": self._metrics,
            "/slots": self._slots,
            "/props": self._props,
            "/stats": self._stats,
            "/die": self._die,
            "/control/stream-hold": self._hold_streams,
        }
        self._work: dict[str, Handler] = {
            "/v1/chat/completions": self._complete,
            "/v1/completions": self._complete,
            "/v1/embeddings": self._embed,
            "/v1/audio/transcriptions": self._transcribe,
            "/ws": self._echo_messages,
        }
        self._reads_json = {path for path in self._work if path.endswith(("completions", "embeddings"))}

    async def serve_connection(self, reader: WatchedReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request after the other until the client leaves."""
        served = 0
        self.connections.add(writer)
        try:
            while request := await read_request(reader, writer):
                request.is_reused = served > 0
                await self._serve(request)
                served += 1
                if not request.keeps_alive:
                    break
        except (ClientLeft, HungUp, ConnectionError, asyncio.IncompleteReadError):
            writer.transport.abort()
        finally:
            self.connections.discard(writer)
            writer.close()

    async def _serve(self, request: Request) -> None:
        if view := self._views.get(request.path):
            await view(request)
        elif handler := self._find_work(request.path):
            await self._count(request, handler)
        else:
            await request.answer_error(404, f"no such path: {request.path}", "not_found_error")
        if request.body_left:
            await request.body()

    def _find_work(self, path: str) -> Handler | None:
        is_echoed = path in ECHOED or path == "/echo" or path.startswith("/echo/")
        return self._echo if is_echoed else self._work.get(path)

    async def _count(self, request: Request, handler: Handler) -> None:
        """Do work that counts as a request in flight, and see clients that leave."""
        self.stats.requests += 1
        self.stats.in_flight += 1
        log(f"request {request.method} {request.path}")
        try:
            await self._prepare(request)
            if not await self._refuse(request):
                await handler(request)
        except ValueError as error:
            await request.answer_error(400, f"not JSON: {error}")
        except (ClientLeft, ConnectionError, asyncio.IncompleteReadError):
            self.stats.client_left += 1
            log("client left")
            raise ClientLeft from None
        except HungUp:
            log("hung up")
            raise
        finally:
            self.stats.in_flight -= 1

    async def _prepare(self, request: Request) -> None:
        """Read a JSON body and do what the request wishes to happen before its answer."""
        if request.path in self._reads_json:
            request.json = json.loads(await request.body() or b"{}")
        wishes = request.wishes
        if delay_s := wishes.get("delay_s"):
            await request.wait(delay_s)
        if wishes.get("cut_after") == 0 or (wishes.get("cut_if_reused") and request.is_reused):
            raise HungUp

    async def _refuse(self, request: Request) -> bool:
        """Answer with an error where one is due; says whether it did."""
        if not self.is_loaded:
            await request.answer_error(503, LOADING, "unavailable_error")
        elif status := request.wishes.get("status"):
            await request.answer_error(status, f"asked to answer {status}")
        else:
            return False
        return True

    @property
    def _is_last(self) -> bool:
        return self.settings.crash_after is not None and self.stats.requests > self.settings.crash_after

    # -- looking --

    async def _health(self, request: Request) -> None:
        if self.is_loaded:
            await request.answer_json({"status": "ok"})
        else:
            await request.answer_error(503, LOADING, "unavailable_error")

    async def _models(self, request: Request) -> None:
        card = {"id": self.settings.name, "object": "model", "created": 0, "owned_by": "mimic"}
        await request.answer_json({"object": "list", "data": [card]})

    async def _metrics(self, request: Request) -> None:
        text = (
            "# TYPE llamacpp:requests_processing gauge\n"
            f"llamacpp:requests_processing {self.stats.in_flight}\n"
            "# TYPE llamacpp:requests_deferred gauge\n"
            "llamacpp:requests_deferred 0\n"
            "# TYPE mimic_requests_total counter\n"
            f"mimic_requests_total {self.stats.requests}\n"
        )
        await request.answer(text.encode(), kind="text/plain; version=0.0.4")

    async def _slots(self, request: Request) -> None:
        busy = self.stats.in_flight
        await request.answer_json([{"id": i, "is_processing": i < busy} for i in range(self.settings.slots)])

    async def _props(self, request: Request) -> None:
        await request.answer_json({"total_slots": self.settings.slots, "model_path": self.settings.name})

    async def _stats(self, request: Request) -> None:
        await request.answer_json(vars(self.stats))

    async def _die(self, request: Request) -> None:
        os._exit(int(json.loads(await request.body() or b"{}").get("code", 1)))

    async def _hold_streams(self, request: Request) -> None:
        """{"hold": true}: no stream sends another token until {"hold": false}."""
        hold = json.loads(await request.body()).get("hold", True)
        (self.flowing.clear if hold else self.flowing.set)()
        await request.answer_json({"hold": hold})

    # -- working --

    async def _complete(self, request: Request) -> None:
        completion = Completion(self.settings, request)
        if request.json.get("stream"):
            self.stats.streams += 1
            await self._stream(request, completion)
            return
        for number in range(len(completion.tokens)):
            await self._pace(request, completion, number)
        await self._answer_whole(request, json.dumps(completion.whole()).encode())

    async def _pace(self, request: Request, completion: "Completion", number: int) -> None:
        """Wait until token `number` is due. Raises ClientLeft as soon as the client is gone."""
        await asyncio.sleep(0)
        if completion.tokens_per_s:
            due_s = completion.started_s + number / completion.tokens_per_s
            await request.wait(due_s - time.monotonic())
        while not self.flowing.is_set():
            await request.wait(0.005)

    async def _stream(self, request: Request, completion: "Completion") -> None:
        head = request.head(200, "Content-Type: text/event-stream", "Transfer-Encoding: chunked")
        await request.send(head)
        for number, token in enumerate(completion.tokens):
            await self._pace(request, completion, number)
            await request.send_event(completion.chunk(token, is_first=number == 0))
            if number + 1 == request.wishes.get("cut_after"):
                raise HungUp
            if self._is_last and number >= len(completion.tokens) // 2:
                os.kill(os.getpid(), signal.SIGKILL)
        for event in completion.last_events():
            await request.send_event(event)
        await request.send(b"0\r\n\r\n")

    async def _answer_whole(self, request: Request, content: bytes) -> None:
        """Send one JSON answer, or only half of it where it is to be cut or to crash."""
        cut = request.wishes.get("cut_after") is not None
        if not (cut or self._is_last):
            await request.answer(content)
            return
        head = request.head(200, "Content-Type: application/json", f"Content-Length: {len(content)}")
        await request.send(head + content[: len(content) // 2])
        if cut:
            raise HungUp
        os.kill(os.getpid(), signal.SIGKILL)

    async def _embed(self, request: Request) -> None:
        given = request.json.get("input", "")
        texts = given if isinstance(given, list) else [given]
        data = [
            {"object": "embedding", "index": i, "embedding": embedding(text)} for i, text in enumerate(texts)
        ]
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        model = request.json.get("model", self.settings.name)
        await self._answer_whole(
            request, json.dumps({"object": "list", "data": data, "model": model, "usage": usage}).encode()
        )

    async def _transcribe(self, request: Request) -> None:
        body = await request.body()
        model = form_field(body, request.header("content-type"), "model")
        text = f"{self.settings.name} heard {len(body)} bytes"
        await self._answer_whole(
            request, json.dumps({"text": text, "bytes": len(body), "model": model}).encode()
        )

    async def _echo(self, request: Request) -> None:
        digest, size = hashlib.sha256(), 0
        async for chunk in request.chunks():
            digest.update(chunk)
            size += len(chunk)
        content = {
            "method": request.method,
            "path": urlsplit(request.target).path,
            "query": urlsplit(request.target).query,
            "headers": {name: request.header(name) for name, _ in request.headers},
            "body_bytes": size,
            "sha256": digest.hexdigest(),
        }
        await self._answer_whole(request, json.dumps(content).encode())

    # -- WebSocket --

    async def _echo_messages(self, request: Request) -> None:
        key = request.header("sec-websocket-key")
        if not key:
            await request.answer_error(400, "this path speaks WebSocket")
            return
        accept = base64.b64encode(
            hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
        )
        protocol = request.header("sec-websocket-protocol").split(",")[0].strip()
        lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Accept: {accept.decode()}"]
        lines += [f"Sec-WebSocket-Protocol: {protocol}"] if protocol else []
        await request.send("\r\n".join([*lines, "", ""]).encode())
        while True:
            first, payload = await read_frame(request.reader)
            opcode = first & 0x0F
            if opcode != PONG:
                await request.send(frame(PONG | FINAL if opcode == PING else first, payload))
            if opcode == CLOSE:
                raise HungUp


CLOSE, PING, PONG, FINAL = 0x8, 0x9, 0xA, 0x80


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """One WebSocket frame: its first byte (final bit and opcode) and its unmasked payload."""
    first, second = await reader.readexactly(2)
    size = second & 0x7F
    if size >= 126:
        size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
    mask = await reader.readexactly(4) if second & 0x80 else bytes(4)
    payload = await reader.readexactly(size)
    repeated = (mask * (size // 4 + 1))[:size]
    plain = int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")
    return first, plain.to_bytes(size, "big")


def frame(first: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return bytes([first, size]) + payload
    if size < 65536:
        return bytes([first, 126]) + size.to_bytes(2, "big") + payload
    return bytes([first, 127]) + size.to_bytes(8, "big") + payload


def embedding(text: object) -> list[float]:
    """Eight numbers between -1 and 1 that depend on nothing but the text."""
    return [byte / 127.5 - 1 for byte in hashlib.sha256(str(text).encode()).digest()[:8]]


class Completion:
    """One answer in OpenAI's shapes: the model's name, then counted words."""

    def __init__(self, settings: Settings, request: Request) -> None:
        wishes, asked = request.wishes, request.json
        count = int(wishes.get("tokens", settings.tokens))
        limit = asked.get("max_completion_tokens") or asked.get("max_tokens") or count
        self.tokens = [settings.name, *(f" {number}" for number in range(1, count))][: min(count, limit)]
        self.tokens_per_s = float(wishes.get("tokens_per_s", settings.tokens_per_s))
        self.started_s = time.monotonic()
        self._finish_reason = "length" if limit < count else "stop"
        self._is_chat = request.path.endswith("/chat/completions")
        self._wants_usage = bool((asked.get("stream_options") or {}).get("include_usage"))
        self._base = {
            "id": f"mimic-{os.urandom(6).hex()}",
            "created": int(time.time()),
            "model": asked.get("model", settings.name),
        }

    @property
    def usage(self) -> dict[str, int]:
        count = len(self.tokens)
        return {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1}

    def whole(self) -> dict[str, Any]:
        text = "".join(self.tokens)
        said = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        choice = {"index": 0, **said, "finish_reason": self._finish_reason}
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._base, "object": kind, "choices": [choice], "usage": self.usage}

    def chunk(self, text: str, *, is_first: bool = False, finish_reason: str | None = None) -> dict[str, Any]:
        delta = {"role": "assistant"} if is_first else {}
        delta |= {"content": text} if text else {}
        said = {"delta": delta} if self._is_chat else {"text": text}
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return {
            **self._base,
            "object": kind,
            "choices": [{"index": 0, **said, "finish_reason": finish_reason}],
        }

    def last_events(self) -> list[object]:
        events: list[object] = [self.chunk("", finish_reason=self._finish_reason)]
        if self._wants_usage:
            events.append({**self.chunk(""), "choices": [], "usage": self.usage})
        return [*events, "[DONE]"]


# ---- life and death ----


def fail(message: str, code: int = 1) -> None:
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


def fail_as_asked(start: str) -> None:
    """Do what MIMIC_START says: `exit:<code>[:<message>]`."""
    if start:
        _, code, message = (start + "::").split(":", 2)
        fail(message.rstrip(":"), int(code or 1))


def grow(memory: Memory, share: float) -> None:
    try:
        memory.hold(share)
    except OutOfMemory as error:
        memory.release()
        fail(f"CUDA error: out of memory\n  {error}".rstrip())


async def load(memory: Memory) -> None:
    steps = LOAD_STEPS if memory.settings.load_s else 1
    for step in range(1, steps + 1):
        await asyncio.sleep(memory.settings.load_s / steps)
        grow(memory, step / steps)


async def run(settings: Settings, memory: Memory) -> None:
    """Serve until SIGTERM, then end the process."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, (lambda: None) if settings.ignore_sigterm else ended.set)
    service = Service(settings)

    def connection() -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(WatchedReader(), service.serve_connection)  # type: ignore[arg-type]

    await asyncio.sleep(settings.bind_s)
    server = await loop.create_server(connection, settings.host, settings.port, backlog=1024)
    log(f"listening on {server.sockets[0].getsockname()[1]}")
    loading = asyncio.create_task(become_ready(service, memory))
    await ended.wait()
    log("stopping")
    server.close()
    loading.cancel()
    for writer in service.connections:
        writer.transport.abort()
    if settings.late_s:
        memory.release(settings.late_s)
    await asyncio.sleep(settings.release_s)
    memory.release()
    os._exit(0)


async def become_ready(service: Service, memory: Memory) -> None:
    await load(memory)
    if service.settings.says:
        log(service.settings.says)
    if not service.settings.never_healthy:
        service.is_loaded = True
        log("ready")


def hold_only(memory: Memory) -> None:
    """Take everything at once and keep it; the signal's own effect ends the process."""
    grow(memory, 1)
    log("ready")
    signal.pause()


def main() -> None:
    settings = read_settings(dict(os.environ))
    fail_as_asked(settings.start)
    memory = Memory(settings)
    try:
        memory.open()
    except OutOfMemory as error:
        fail(f"CUDA error: {error}")
    if settings.hold_only:
        hold_only(memory)
    else:
        asyncio.run(run(settings, memory))


if __name__ == "__main__":
    main()
