"""OpenAI calls and any other HTTP, routed to the instance they name, which is loaded on demand.

A plain ASGI endpoint: a request to a ready model costs a dictionary look-up and a counter beyond the
relayed bytes. It bypasses the API's middleware, so the front (front.py) has checked it before.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

import aiohttp
import structlog

from orchestrator.api.asgi import Receive, Scope, Send, query_value
from orchestrator.api.body import Body, ClientLeft, Spool, read_body, too_slow
from orchestrator.api.exchange import Exchange
from orchestrator.api.hostnames import Hostnames
from orchestrator.api.images import may_have_images, with_parts
from orchestrator.api.problems import BadRequest, Problem, problem_of
from orchestrator.api.relay import (
    UpstreamDied,
    UpstreamSilent,
    new_session,
    relay,
    request_headers,
    upstream_url,
)
from orchestrator.api.routing import Named, Unnamed, name_model, rename
from orchestrator.control.gates import Gate
from orchestrator.control.loop import Loop
from orchestrator.core.entities import Model
from orchestrator.core.errors import DeadlineExceeded, OrchestratorError
from orchestrator.core.lifecycle import Instance, State

log = structlog.get_logger(__name__)

COMMENT_EVERY_S = 10.0
SECONDS = re.compile(rb"[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?")
DEATH_NOTICE_S = 0.5
NO_ANSWER = (
    "it is loaded, but its service has not answered this request (`orchestrator logs {0}` may say why; "
    "`orchestrator unload {0} --force` ends one that hangs)"
)
LLAMA_PATHS = frozenset(
    {
        "/completion",
        "/completions",
        "/chat/completions",
        "/responses",
        "/messages",
        "/infill",
        "/tokenize",
        "/detokenize",
        "/apply-template",
        "/embedding",
        "/embeddings",
        "/rerank",
        "/reranking",
        "/lora-adapters",
        "/slots",
        "/props",
        "/metrics",
    }
)
LOOKS = frozenset({"/health", "/metrics", "/props", "/slots", "/v1/models", "/v1/health", "/models"})
"""Paths that only look: a GET of them never loads a model and does not count as use."""


@dataclass(frozen=True, slots=True)
class Limits:
    """`body_bytes` for one request, `spool_bytes` for all that wait on disk, `request_s` for one answer."""

    body_bytes: int
    spool_bytes: int
    request_s: float


@dataclass(slots=True)
class Call:
    """A request on its way: to which model, with what path and body, until when."""

    exchange: Exchange
    model: Model
    path: bytes
    query: bytes
    body: Body
    came_s: float
    deadline_s: float
    is_json: bool = False
    wants_stream: bool = False

    @property
    def is_look(self) -> bool:
        return self.exchange.scope["method"] in ("GET", "HEAD") and self.path.decode("latin-1") in LOOKS

    @property
    def may_retry(self) -> bool:
        return self.path.startswith(b"/v1/") and not self.exchange.has_answer


class Gateway:
    """`resolve` maps a name or alias to its model, or raises UnknownModel."""

    def __init__(
        self, loop: Loop, hostnames: Hostnames, resolve: Callable[[str], Model], limits: Limits
    ) -> None:
        self._loop = loop
        self._hostnames = hostnames
        self._resolve = resolve
        self._limits = limits
        self._spool = Spool(limits.spool_bytes)
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        self._session = new_session()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        assert self._session is not None, "open the gateway first"
        return self._session

    def wants(self, scope: Scope) -> bool:
        """True for the paths that are relayed."""
        path = scope["path"]
        if path.startswith("/v1/"):
            return path != "/v1/models" and not path.startswith("/v1/models/")
        if path.startswith("/upstream/"):
            return True
        if path not in LLAMA_PATHS and not path.startswith("/slots/"):
            return False
        return scope["method"] == "POST" or query_value(scope, "model") is not None

    def is_llama_call(self, scope: Scope) -> bool:
        """True for those that are llama.cpp's own, whose clients expect numbers as error codes."""
        return not scope["path"].startswith(("/v1/", "/upstream/")) and self.wants(scope)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send, integer_code=self.is_llama_call(scope))
        try:
            await self._handle(exchange, receive)
        except ClientLeft:
            return
        except OrchestratorError as error:
            await exchange.problem(problem_of(error))
        except Exception as error:
            log.exception("a bug: a relayed request failed", path=scope["path"])
            await exchange.problem(problem_of(error))

    async def read(self, receive: Receive, limit_bytes: int) -> Body:
        """A whole request body. Raises BadRequest (413, 408) beyond a limit, ClientLeft, TooManyBodies."""
        try:
            async with asyncio.timeout(self._limits.request_s):
                return await read_body(receive, min(limit_bytes, self._limits.body_bytes), self._spool)
        except TimeoutError:
            raise too_slow(self._limits.request_s) from None

    async def _handle(self, exchange: Exchange, receive: Receive) -> None:
        body = await self.read(receive, self._limits.body_bytes)
        call: Call | None = None
        try:
            call = await self._call(exchange, body)
            if call.is_look:
                await self._look(call)
            else:
                await self._serve(call)
        finally:
            body.close()
            if call is not None and call.body is not body:
                call.body.close()

    # --- reading the request

    async def _call(self, exchange: Exchange, body: Body) -> Call:
        scope = exchange.scope
        if scope["path"].startswith("/upstream/"):
            return self._upstream_call(exchange, body)
        named, model = await self._named(scope, body)
        if model.api != "openai":
            raise BadRequest(
                f"'{model.id}' does not speak the OpenAI API; reach it under /upstream/{model.id}/.", "model"
            )
        return Call(
            exchange,
            model,
            path=bytes(scope.get("raw_path") or scope["path"].encode()).split(b"?")[0],
            query=scope.get("query_string", b""),
            body=await fit_for(model, named, body, scope["path"]),
            came_s=asyncio.get_running_loop().time(),
            deadline_s=self._deadline_s(scope, model),
            is_json=named.is_json,
            wants_stream=named.wants_stream,
        )

    async def _named(self, scope: Scope, body: Body) -> tuple[Named, Model]:
        """What the request names, if the name that it came by has it; or the only one that it can mean."""
        try:
            named = await name_model(scope, body)
        except Unnamed as unnamed:
            only = self._hostnames.only_model(scope)
            if only is None:
                raise
            return unnamed.named, only
        return named, self._hostnames.check(scope, self._resolve(named.model))

    def _upstream_call(self, exchange: Exchange, body: Body) -> Call:
        scope = exchange.scope
        model, path = self.upstream_target(scope)
        return Call(
            exchange,
            model,
            path,
            scope.get("query_string", b""),
            body,
            asyncio.get_running_loop().time(),
            self._deadline_s(scope, model),
        )

    def upstream_target(self, scope: Scope) -> tuple[Model, bytes]:
        """`/upstream/{model}/{path}`: the model, and the path as the instance sees it.

        A name with a slash may be written with %2F, or plainly: the longest name that exists counts.
        """
        raw = bytes(scope.get("raw_path") or scope["path"].encode()).split(b"?")[0]
        parts = raw.removeprefix(b"/upstream/").split(b"/")
        for count in range(len(parts), 1, -1):
            try:
                model = self._resolve(unquote(b"/".join(parts[:count]).decode("latin-1")))
            except OrchestratorError:
                continue
            return model, b"/" + b"/".join(parts[count:])
        return self._resolve(unquote(parts[0].decode("latin-1"))), b"/" + b"/".join(parts[1:])

    def _deadline_s(self, scope: Scope, model: Model) -> float:
        """When the first byte must be there: the model's deadline, or what the client asks for."""
        asked = next((value for key, value in scope["headers"] if key == b"x-deadline-seconds"), None)
        now_s = asyncio.get_running_loop().time()
        if asked is None:
            return now_s + model.deadline_s
        seconds = float(asked) if SECONDS.fullmatch(asked) else -1.0
        if not 0 < seconds <= 86400:
            raise BadRequest(
                "X-Deadline-Seconds must be a number of seconds above 0 and up to 86400, "
                f"got '{asked.decode('latin-1')[:40]}'.",
                "X-Deadline-Seconds",
            )
        return now_s + seconds

    # --- serving it

    async def _serve(self, call: Call) -> None:
        """Wait for a ready instance, relay; one that dies before its first byte is asked for once more."""
        try:
            try:
                await self._relay_once(call)
            except UpstreamSilent:
                if not call.may_retry:
                    raise
                await self._relay_once(call)
        except (UpstreamSilent, UpstreamDied) as error:
            await self._tell_upstream(call, error)

    async def _relay_once(self, call: Call) -> None:
        gate = self._loop.try_enter(call.model.id)
        if gate is None:
            if query_value(call.exchange.scope, "autoload") in ("false", "0"):
                raise not_loaded(call.model, "autoload=false asks not to load it")
            gate = await self._wait(call)
        instance = gate.instance
        try:
            await self._relay_to(call, instance.host, instance.port)
        except UpstreamSilent:
            await notice_of_death(gate)
            raise
        finally:
            gate.leave()

    async def _wait(self, call: Call) -> Gate:
        """The entered gate of an instance, once it is ready. A client that leaves ends its own wait only."""
        wait = asyncio.ensure_future(self._loop.wait_ready(call.model.id, call.deadline_s))
        watch = asyncio.ensure_future(call.exchange.client_left())
        is_in = False
        try:
            while not wait.done():
                pause_s = COMMENT_EVERY_S if call.wants_stream else None
                await asyncio.wait({wait, watch}, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
                if watch.done():
                    raise ClientLeft
                if not wait.done():
                    await call.exchange.comment(f"waiting for {call.model.id}")
            gate = wait.result()
            is_in = True
            return gate
        finally:
            watch.cancel()
            wait.cancel()
            await asyncio.gather(watch, wait, return_exceptions=True)
            if not is_in and not wait.cancelled() and wait.exception() is None:
                wait.result().leave()

    async def _look(self, call: Call) -> None:
        """Relay without loading anything and without counting as use."""
        instance = self._loop.snapshot.instance(call.model.id)
        if instance.state is not State.READY:
            raise not_loaded(call.model, "looking does not load it")
        try:
            await self._relay_to(call, instance.host, instance.port)
        except (UpstreamSilent, UpstreamDied) as error:
            await self._tell_upstream(call, error)

    async def _tell_upstream(self, call: Call, error: OrchestratorError) -> None:
        instance = self._loop.snapshot.instance(call.model.id)
        await call.exchange.problem(upstream_problem(call.model, instance, error))

    async def _relay_to(self, call: Call, host: str | None, port: int | None) -> None:
        assert host is not None and port is not None, "a ready instance has an address"
        exchange = call.exchange
        url = upstream_url(host, port, call.path, call.query)
        headers = request_headers(exchange.scope["headers"], is_json=call.is_json)
        exchange.arm(call.deadline_s, self._limits.request_s)
        try:
            await relay(self.session, exchange, url, headers, call.body)
        except asyncio.CancelledError:
            if not exchange.take_abort():
                raise
            await self._explain_abort(call)
        finally:
            exchange.disarm()

    async def _explain_abort(self, call: Call) -> None:
        match call.exchange.aborted:
            case "deadline":
                waited_s = asyncio.get_running_loop().time() - call.came_s
                raise DeadlineExceeded(call.model.id, waited_s, NO_ANSWER.format(call.model.id))
            case "limit":
                message = f"The answer took longer than {self._limits.request_s:.0f} s (request_limit)."
                await call.exchange.problem(Problem(504, message, "request_limit"))
            case _:
                raise ClientLeft


def not_loaded(model: Model, why: str) -> BadRequest:
    message = f"'{model.id}' is not loaded, and {why}. POST /models/load does, or any request that uses it."
    return BadRequest(message, "model", code="model_not_loaded")


async def fit_for(model: Model, named: Named, body: Body, path: str) -> Body:
    """The body as the instance must read it."""
    body = await renamed(named, body, model)
    if named.is_json and may_have_images(path, body):
        return await asyncio.to_thread(with_parts, body)
    return body


async def renamed(named: Named, body: Body, model: Model) -> Body:
    """Aliases become the name it was started with; a body that names no model stays as it is."""
    wanted = model.served_name or model.id
    if named.model in ("", wanted):
        return body
    if body.file is None:
        return rename(named, body, wanted)
    return await asyncio.to_thread(rename, named, body, wanted)


async def notice_of_death(gate: Gate) -> None:
    """Give the news of the instance's death a moment to arrive, so that the retry does not meet it again."""
    try:
        async with asyncio.timeout(DEATH_NOTICE_S):
            await gate.closed.wait()
    except TimeoutError:
        pass  # it lives, as far as anybody knows


def upstream_problem(model: Model, instance: Instance, error: OrchestratorError) -> Problem:
    """What became of the answer: its service was stopped on purpose, or nobody knows better than its log."""
    if instance.stop_reason and instance.state is not State.READY:
        message = (
            f"'{model.id}' was stopped before its answer ended: {instance.stop_reason}. Ask again to load it."
        )
        return Problem(502, message, "upstream_failed", retry_after_s=1)
    message = (
        f"'{model.id}': {error.message} `orchestrator logs {model.id}` shows what it said last; "
        "the next request starts it again."
    )
    return Problem(502, message, "upstream_failed", retry_after_s=1)
