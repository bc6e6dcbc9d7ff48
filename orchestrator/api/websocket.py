"""WebSockets of an instance, relayed message by message under /upstream/{model}/…"""

from __future__ import annotations

import asyncio

import aiohttp

from orchestrator.api.asgi import Receive, Scope, Send, header, send_problem
from orchestrator.api.gateway import Gateway
from orchestrator.api.problems import Problem
from orchestrator.api.relay import NEVER_UP, upstream_url
from orchestrator.control.gates import Gate
from orchestrator.control.loop import Loop
from orchestrator.core.errors import OrchestratorError

BUSY_FOR_S = 60.0
"""A socket counts as busy this long after a message; a forgotten tab must not hold a GPU."""

GOING_AWAY = 1001
TRY_AGAIN_LATER = 1013
HANDSHAKE_ONLY = {b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-extensions"}


class Activity:
    """Holds the gate while messages flow, and lets go of it in silence."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._is_in = True
        self._timer: asyncio.TimerHandle | None = None
        self.touch()

    def touch(self) -> bool:
        """A message passes; False if the instance is leaving and takes no more."""
        if not self._is_in:
            self._is_in = self._gate.enter()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(BUSY_FOR_S, self.rest)
        return self._is_in

    def rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_in:
            self._is_in = False
            self._gate.leave()


async def relay_websocket(gateway: Gateway, loop: Loop, scope: Scope, receive: Receive, send: Send) -> None:
    """Accept once the instance is ready, then pass messages both ways until one side closes."""
    await receive()  # websocket.connect
    try:
        model, path = gateway.upstream_target(scope)
        deadline_s = asyncio.get_running_loop().time() + model.deadline_s
        gate = loop.try_enter(model.id) or await loop.wait_ready(model.id, deadline_s)
    except OrchestratorError as error:
        await refuse(send, TRY_AGAIN_LATER, error.message)
        return
    activity = Activity(gate)
    try:
        await connect(gateway, gate, path, scope, receive, send, activity)
    finally:
        activity.rest()


async def connect(
    gateway: Gateway,
    gate: Gate,
    path: bytes,
    scope: Scope,
    receive: Receive,
    send: Send,
    activity: Activity,
) -> None:
    instance = gate.instance
    assert instance.host is not None and instance.port is not None
    url = upstream_url(instance.host, instance.port, path, scope.get("query_string", b""))
    wanted = header(scope, b"sec-websocket-protocol").decode("latin-1")
    protocols = [p.strip() for p in wanted.split(",") if p.strip()]
    hidden = NEVER_UP | HANDSHAKE_ONLY | {b"sec-websocket-protocol", b"origin"}
    headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"] if k not in hidden]
    try:
        upstream = await gateway.session.ws_connect(
            url, headers=headers, protocols=protocols, max_msg_size=0, autoping=True
        )
    except (aiohttp.ClientError, OSError) as error:
        await refuse(send, TRY_AGAIN_LATER, f"The service refused the WebSocket: {error}")
        return
    async with upstream:
        await send({"type": "websocket.accept", "subprotocol": upstream.protocol})
        await both_ways(upstream, receive, send, activity)


async def both_ways(
    upstream: aiohttp.ClientWebSocketResponse, receive: Receive, send: Send, activity: Activity
) -> None:
    up = asyncio.ensure_future(pass_up(upstream, receive, activity))
    down = asyncio.ensure_future(pass_down(upstream, send, activity))
    try:
        await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        up.cancel()
        down.cancel()
        await asyncio.gather(up, down, return_exceptions=True)


async def pass_up(upstream: aiohttp.ClientWebSocketResponse, receive: Receive, activity: Activity) -> None:
    while (message := await receive())["type"] == "websocket.receive":
        if not activity.touch():
            break
        if message.get("text") is not None:
            await upstream.send_str(message["text"])
        else:
            await upstream.send_bytes(message["bytes"])
    await upstream.close(code=message.get("code") or GOING_AWAY)


async def pass_down(upstream: aiohttp.ClientWebSocketResponse, send: Send, activity: Activity) -> None:
    async for message in upstream:
        activity.touch()
        if message.type is aiohttp.WSMsgType.TEXT:
            await send({"type": "websocket.send", "text": message.data})
        elif message.type is aiohttp.WSMsgType.BINARY:
            await send({"type": "websocket.send", "bytes": message.data})
    await send({"type": "websocket.close", "code": upstream.close_code or 1000})


async def refuse_handshake(send: Send, problem: Problem) -> None:
    """Answer the handshake with the error itself, as any other request."""
    await send_problem(send, problem, kind="websocket.http.response")


async def refuse(send: Send, code: int, reason: str) -> None:
    await send({"type": "websocket.close", "code": code, "reason": reason[:120]})
