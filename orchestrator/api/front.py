"""The outermost ASGI layer: the checks of safety and access for everything, then the gateway or the API."""

from __future__ import annotations

from orchestrator.api.access import Access
from orchestrator.api.asgi import (
    App,
    Message,
    Receive,
    Scope,
    Send,
    header,
    query_value,
    send_problem,
    with_header,
)
from orchestrator.api.body import Body, ClientLeft
from orchestrator.api.forwarded import Proxies
from orchestrator.api.gateway import Gateway
from orchestrator.api.hostnames import Hostnames
from orchestrator.api.login import login_instead
from orchestrator.api.problems import BadRequest, Problem, problem_of
from orchestrator.api.safety import READING, Safety
from orchestrator.api.websocket import refuse_handshake, relay_websocket
from orchestrator.control.loop import Loop

API_BODY_BYTES = 1024 * 1024
FORM = b"application/x-www-form-urlencoded"


class Front:
    """`app` is the API; the attribute's name is what libraries look for when they walk the layers."""

    def __init__(
        self,
        app: App,
        gateway: Gateway,
        hostnames: Hostnames,
        loop: Loop,
        proxies: Proxies,
        safety: Safety,
        access: Access,
    ) -> None:
        self.app = app
        self._hostnames = hostnames
        self._gateway = gateway
        self._loop = loop
        self._proxies = proxies
        self._safety = safety
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        scope = self._proxies.unwrapped(scope)
        problem = self._safety.check(scope, may_change=self._may_change(scope)) or self._access.check(scope)
        if problem is not None:
            await self._refuse(scope, send, problem)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif self._hostnames.wants(scope):
            await self._hostnames.metrics(self._gateway.session, scope, send)
        elif self._gateway.wants(scope):
            await self._gateway(scope, receive, send)
        else:
            await self._api(as_json(scope), receive, send)

    async def _refuse(self, scope: Scope, send: Send, problem: Problem) -> None:
        if scope["type"] == "websocket":
            await refuse_handshake(send, problem)
        elif (page := login_instead(scope, problem)) is not None:
            headers = [(b"location", page), (b"content-length", b"0")]
            await send({"type": "http.response.start", "status": 303, "headers": headers})
            await send({"type": "http.response.body"})
        else:
            await send_problem(send, problem, integer_code=self._gateway.is_llama_call(scope))

    def _may_change(self, scope: Scope) -> bool:
        """A relayed GET can load a model, so only our own pages that look are for everybody."""
        if scope["type"] != "http" or scope["method"] not in READING:
            return True
        return self._gateway.wants(scope) or query_value(scope, "reload") is not None

    async def _api(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The API's own calls are small: a body beyond the limit is refused before it is parsed."""
        if scope["method"] in READING:
            await self.app(scope, receive, send)
            return
        try:
            body = await self._gateway.read(receive, API_BODY_BYTES)
        except ClientLeft:
            return
        except BadRequest as error:
            await send_problem(send, problem_of(error))
            return
        try:
            await self.app(scope, replay(body, receive), send)
        finally:
            body.close()

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith("/upstream/"):
            await relay_websocket(self._gateway, self._loop, scope, receive, send)
        else:
            await self.app(scope, receive, send)


def replay(body: Body, receive: Receive) -> Receive:
    """`receive` that gives the whole body once, and after it what really comes: the disconnect."""
    pending = [bytes(body.view())]

    async def next_message() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return next_message


def as_json(scope: Scope) -> Scope:
    """`curl -d` calls its JSON a form: believe the body, not the label."""
    if scope["method"] in ("POST", "PUT", "DELETE") and header(scope, b"content-type").split(b";")[0] in (
        b"",
        FORM,
    ):
        return with_header(scope, b"content-type", b"application/json")
    return scope
