"""The outermost ASGI layer: the safety check for everything, then the gateway or the API."""

from __future__ import annotations

from orchestrator.api.asgi import App, Receive, Scope, Send, header, send_problem, with_header
from orchestrator.api.gateway import Gateway
from orchestrator.api.safety import Safety
from orchestrator.api.websocket import POLICY_VIOLATION, refuse, relay_websocket
from orchestrator.control.loop import Loop

FORM = b"application/x-www-form-urlencoded"


class Front:
    """`app` is the API; the attribute's name is what libraries look for when they walk the layers."""

    def __init__(self, app: App, gateway: Gateway, loop: Loop, safety: Safety) -> None:
        self.app = app
        self._gateway = gateway
        self._loop = loop
        self._safety = safety

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        problem = self._safety.check(scope)
        if problem is not None:
            await (
                send_problem(send, problem)
                if scope["type"] == "http"
                else refuse(send, POLICY_VIOLATION, problem.message)
            )
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif self._gateway.wants(scope):
            await self._gateway(scope, receive, send)
        else:
            await self.app(as_json(scope), receive, send)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].startswith("/upstream/"):
            await relay_websocket(self._gateway, self._loop, scope, receive, send)
        else:
            await self.app(scope, receive, send)


def as_json(scope: Scope) -> Scope:
    """`curl -d` calls its JSON a form: believe the body, not the label."""
    if scope["method"] in ("POST", "PUT", "DELETE") and header(scope, b"content-type").split(b";")[0] in (
        b"",
        FORM,
    ):
        return with_header(scope, b"content-type", b"application/json")
    return scope
