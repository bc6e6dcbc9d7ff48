"""A service for what the mimic does not do: pages, compressed answers, sockets that close, one last request.

Everything is set in the environment: HOST, PORT, and ODDITY_MARKS, a folder where it leaves marks that
outlive it.

    GET  /health
    ANY  /v1/mirror              the body it got, as it came; the headers it saw as JSON in X-Seen
    GET  /page, /drawing         HTML, SVG
    GET  /cookie                 tries to set the cookie of the orchestrator's own pages
    GET  /v1/packed              a gzip body, sent as it is
    POST /v1/die-once            the first time the process ends without an answer; then {"survived": true}
    POST /v1/torn                two chunks of a body without a length, then a cut connection
    POST /v1/torn-events         the same as an event stream that says it is one
    WS   /ws/headers             says the handshake's headers, then echoes
    WS   /ws/close?code=&reason= closes at the first message
    WS   /ws/record?name=        echoes; writes the code of the client's close into ODDITY_MARKS/name
    WS   /ws/die                 ends the process at the first message
    ANY  other                   {"method", "path", "query", "body_bytes"}
"""

import gzip
import json
import os
from pathlib import Path

from aiohttp import WSMsgType, web

PACKED = gzip.compress(b'{"packed": true}' * 50, mtime=0)
PAGE = b"<!doctype html><title>odd</title><script>fetch('/models')</script>"
DRAWING = b'<svg xmlns="http://www.w3.org/2000/svg"></svg>'
marks = Path(os.environ.get("ODDITY_MARKS", "."))


async def health(_: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def mirror(request: web.Request) -> web.Response:
    seen = json.dumps({name.lower(): value for name, value in request.headers.items()})
    kind = request.headers.get("Content-Type", "application/octet-stream")
    return web.Response(body=await request.read(), headers={"X-Seen": seen, "Content-Type": kind})


async def page(_: web.Request) -> web.Response:
    return web.Response(body=PAGE, content_type="text/html")


async def drawing(_: web.Request) -> web.Response:
    return web.Response(body=DRAWING, content_type="image/svg+xml")


async def cookie(_: web.Request) -> web.Response:
    headers = {"Set-Cookie": "orchestrator_session=mine; Path=/"}
    return web.json_response({"sets": "orchestrator_session"}, headers=headers)


async def packed(_: web.Request) -> web.Response:
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    return web.Response(body=PACKED, headers=headers)


async def die_once(_: web.Request) -> web.Response:
    mark = marks / "died"
    if not mark.exists():
        mark.touch()
        os._exit(7)
    return web.json_response({"survived": True})


async def torn(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse()
    is_events = request.path.endswith("-events")
    response.content_type = "text/event-stream" if is_events else "text/plain"
    await response.prepare(request)
    for number in range(2):
        await response.write(b"data: %d\n\n" % number)
    assert request.transport is not None
    request.transport.abort()
    return response


async def socket_headers(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(protocols=("odd", "even"))
    await socket.prepare(request)
    await socket.send_json({name.lower(): value for name, value in request.headers.items()})
    await echo(socket)
    return socket


async def echo(socket: web.WebSocketResponse) -> None:
    async for message in socket:
        if message.type is WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type is WSMsgType.BINARY:
            await socket.send_bytes(message.data)


async def socket_close(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    await socket.receive()
    await socket.close(code=int(request.query["code"]), message=request.query["reason"].encode())
    return socket


async def socket_record(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    await echo(socket)
    name = request.query["name"]
    (marks / f"{name}.part").write_text(str(socket.close_code))
    (marks / f"{name}.part").rename(marks / name)
    return socket


async def socket_die(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    await socket.receive()
    os._exit(7)


async def anything(request: web.Request) -> web.Response:
    body = await request.read()
    seen = {"method": request.method, "path": request.path, "query": request.query_string}
    return web.json_response(seen | {"body_bytes": len(body)})


def main() -> None:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_get("/health", health)
    app.router.add_route("*", "/v1/mirror", mirror)
    app.router.add_get("/page", page)
    app.router.add_get("/drawing", drawing)
    app.router.add_get("/cookie", cookie)
    app.router.add_get("/v1/packed", packed)
    app.router.add_post("/v1/die-once", die_once)
    app.router.add_post("/v1/torn", torn)
    app.router.add_post("/v1/torn-events", torn)
    app.router.add_get("/ws/headers", socket_headers)
    app.router.add_get("/ws/close", socket_close)
    app.router.add_get("/ws/record", socket_record)
    app.router.add_get("/ws/die", socket_die)
    app.router.add_route("*", "/{path:.*}", anything)
    web.run_app(app, host=os.environ["HOST"], port=int(os.environ["PORT"]), print=None)


if __name__ == "__main__":
    main()
