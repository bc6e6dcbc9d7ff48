"""A server of a few lines that answers what a test tells it to."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, object]


@dataclass
class Stub:
    """`answers` maps "GET /path" to (status, JSON or bytes), or to a list of them for call after call
    (the last one stays). `asked` holds each call as (method, path with query, JSON body)."""

    answers: dict[str, Answer | list[Answer]] = field(default_factory=dict)
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    cuts_after_bytes: int | None = None
    url: str = ""

    def answer_to(self, call: str) -> Answer:
        found = self.answers.get(call, (404, error("nothing here", "not_found")))
        if isinstance(found, list):
            return found.pop(0) if len(found) > 1 else found[0]
        return found


def error(message: str, code: str, **details: object) -> dict[str, object]:
    return {"error": {"message": message, "type": "server_error", "code": code, "param": None, **details}}


@contextmanager
def stub_server() -> Iterator[Stub]:
    stub = Stub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_for(stub))
    stub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def handler_for(stub: Stub) -> Callable[..., BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply()

        def do_POST(self) -> None:
            self.reply()

        def reply(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            stub.asked.append((self.command, self.path, body))
            stub.headers.append(dict(self.headers.items()))
            status, answer = stub.answer_to(f"{self.command} {self.path.partition('?')[0]}")
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: stub.cuts_after_bytes])
            if stub.cuts_after_bytes is not None:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler
