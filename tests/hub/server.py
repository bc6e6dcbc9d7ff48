"""A model hub on this machine, which can do to its callers what bad networks do.

with hub_server() as hub:
    hub.add("acme/tiny-GGUF", {"tiny-Q4_K_M.gguf": data, "README.md": b"# Tiny"})
    env = hub.env                           # HF_ENDPOINT
    hub.cut_after(1000)                     # the next answer with a file's bytes ends early
    hub.pause_after(1000).wait_hit()        # one more stops there, until `end`
    assert hub.asked("tiny-Q4_K_M.gguf")[-1].first_byte == 1000

It speaks what `huggingface_hub` and llama.cpp ask of the real one: listings, revisions, and files with
their headers, in ranges, large ones on another port ("the CDN") to which it redirects. With
`host="0.0.0.0"` containers reach it too. `python -m tests.hub.server FOLDER` serves FOLDER/owner/name/….
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support import eventually

LARGE = (".gguf", ".safetensors", ".bin")
"""Kept in large file storage: named by their SHA-256 and served by the CDN. Others are blobs of git."""

CHUNK = 64 * 1024
RANGE = re.compile(r"bytes=(\d+)-(\d*)")
API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?(?:/.*)?"
)
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
BLOB = re.compile(r"/blobs/(?P<sha256>[0-9a-f]{64})")


@dataclass(frozen=True)
class File:
    """One file of a repository; `content` is its bytes, or where they lie, or only how many it claims."""

    path: str
    content: bytes | Path | int

    @property
    def size(self) -> int:
        if isinstance(self.content, int):
            return self.content
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    @property
    def is_large(self) -> bool:
        return self.path.endswith(LARGE)

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for chunk in self.chunks(0):
            digest.update(chunk)
        return digest.hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's name of it; of a large one, of the pointer that git has in its place."""
        data = self.pointer if self.is_large else b"".join(self.chunks(0))
        return hashlib.sha1(b"blob %d\0%s" % (len(data), data)).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        ).encode()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_large else self.blob_id

    def chunks(self, start: int) -> Iterator[bytes]:
        if isinstance(self.content, int):
            return
        if isinstance(self.content, bytes):
            for place in range(start, len(self.content), CHUNK):
                yield self.content[place : place + CHUNK]
            return
        with self.content.open("rb") as file:
            file.seek(start)
            while chunk := file.read(CHUNK):
                yield chunk


@dataclass
class Repo:
    """A repository of one revision. `gated` ones let themselves be listed, but give files only to `token`."""

    name: str
    files: dict[str, File]
    gated: bool = False

    @property
    def commit(self) -> str:
        listing = "\n".join(f"{path} {self.files[path].etag}" for path in sorted(self.files))
        return hashlib.sha1(f"{self.name}\n{listing}".encode()).hexdigest()

    def info(self) -> dict[str, Any]:
        siblings = [
            {"rfilename": file.path, "size": file.size, "blobId": file.blob_id} | lfs_of(file)
            for file in self.files.values()
        ]
        return {
            "id": self.name,
            "modelId": self.name,
            "sha": self.commit,
            "private": False,
            "gated": "auto" if self.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }

    def tree(self) -> list[dict[str, Any]]:
        folders = {str(up) for path in self.files for up in Path(path).parents if str(up) != "."}
        entries: list[dict[str, Any]] = [
            {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
            for name in sorted(folders)
        ]
        entries += [
            {"type": "file", "oid": file.blob_id, "size": file.size, "path": file.path} | lfs_of(file)
            for file in self.files.values()
        ]
        return entries


def lfs_of(file: File) -> dict[str, Any]:
    if not file.is_large:
        return {}
    sizes = {"size": file.size, "pointerSize": len(file.pointer)}
    return {"lfs": {"oid": file.sha256, "sha256": file.sha256, **sizes}}


@dataclass(frozen=True)
class Asked:
    """A request that came in. `first_byte` is where its range begins, 0 without one."""

    method: str
    path: str
    first_byte: int
    token: str | None
    agent: str


@dataclass(eq=False)
class Fault:
    """What happens to the next `times` answers whose file's path has `pattern` in it."""

    pattern: str
    times: int
    after: int = 0
    cuts: bool = False
    corrupts: bool = False
    pauses: bool = False
    status: int | None = None
    hits: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def wait_hit(self, timeout_s: float = 30.0) -> Fault:
        """Wait until an answer has met it. Raises AssertionError."""
        eventually(lambda: self.hits > 0, timeout_s, every_s=0.002)
        return self

    def end(self) -> None:
        """Let go of what is paused, and let all others pass."""
        self.times = 0
        self.over.set()


class Hub:
    """Repositories by name, what was asked, and the faults to come. `token` opens what is gated."""

    token = "hf_right"

    def __init__(self, host: str, port: int) -> None:
        self._repos: dict[str, Repo] = {}
        self._blobs: dict[str, File] = {}
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.ignores_ranges = False
        self.requests: list[Asked] = []
        self.api = Listener((host, port), self, self._answer)
        self.cdn = Listener((host, 0), self, self._answer_cdn)

    @property
    def url(self) -> str:
        return self.url_for("127.0.0.1")

    def url_for(self, host: str) -> str:
        """Its address for somebody who reaches this machine as `host`."""
        return f"http://{host}:{self.api.server_port}"

    @property
    def env(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.url}

    def add(self, name: str, files: Mapping[str, bytes | Path | int], *, gated: bool = False) -> Repo:
        """Publish a repository, or a new revision of it."""
        repo = Repo(name, {path: File(path, content) for path, content in files.items()}, gated)
        self._repos[name] = repo
        self._blobs |= {file.sha256: file for file in repo.files.values() if file.is_large}
        return repo

    def asked(self, ending: str, method: str = "GET") -> list[Asked]:
        """Requests for the bytes of files with this ending of their name, oldest first.

        Redirects to the CDN are not counted beside what they lead to.
        """
        large = {blob.sha256 for blob in self._blobs.values() if blob.path.endswith(ending)}
        return [
            asked
            for asked in list(self.requests)
            if asked.method == method
            and (asked.path.rpartition("/")[2] in large or (not large and asked.path.endswith(ending)))
        ]

    def forget(self) -> None:
        """What was asked so far, and the faults that are left."""
        for fault in self._faults:
            fault.end()
        self._faults.clear()
        self.requests.clear()

    # --- what goes wrong

    def cut_after(self, count: int, pattern: str = "", times: int = 1) -> Fault:
        """Close the connection after so many bytes of a file."""
        return self._add(Fault(pattern, times, count, cuts=True))

    def pause_after(self, count: int, pattern: str = "", times: int = 1) -> Fault:
        """Say nothing more after so many bytes of a file, until `end`; then go on."""
        return self._add(Fault(pattern, times, count, pauses=True))

    def corrupt(self, pattern: str = "", times: int = 1) -> Fault:
        """Turn over the first byte that is sent of a file."""
        return self._add(Fault(pattern, times, corrupts=True))

    def refuse(self, status: int, pattern: str = "", times: int = 1) -> Fault:
        """Answer with this status, listings too."""
        return self._add(Fault(pattern, times, status=status))

    def _add(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    def _fault_of(self, path: str, *, sends: bool) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.hits < fault.times and fault.pattern in path and (fault.status is None) is sends:
                    fault.hits += 1
                    return fault
        return None

    # --- answers

    def _answer(self, exchange: Exchange) -> None:
        path = unquote(urlsplit(exchange.path).path)
        refused = self._fault_of(path, sends=False)
        if refused is not None:
            exchange.problem(refused.status or 500, "", "The hub has a bad day.")
        elif found := API.fullmatch(path):
            self._answer_api(exchange, found)
        elif found := FILE.fullmatch(path):
            self._answer_file(exchange, found)
        else:
            exchange.problem(404, "", "Sorry, we can't find the page you are looking for.")

    def _repo(self, exchange: Exchange, found: re.Match[str]) -> Repo | None:
        """The repository at the revision that is asked for; None if the answer is no."""
        repo = self._repos.get(found["repo"])
        if repo is None:
            # Who is nobody learns not even that there is none.
            status = 404 if exchange.token == self.token else 401
            exchange.problem(status, "RepoNotFound", "Repository not found")
            return None
        if found["revision"] not in (None, "main", repo.commit):
            exchange.problem(404, "RevisionNotFound", f"Invalid rev id: {found['revision']}")
            return None
        return repo

    def _answer_api(self, exchange: Exchange, found: re.Match[str]) -> None:
        repo = self._repo(exchange, found)
        if repo is not None:
            exchange.send_json(repo.tree() if found["what"] == "tree" else repo.info())

    def _answer_file(self, exchange: Exchange, found: re.Match[str]) -> None:
        repo = self._repo(exchange, found)
        if repo is None:
            return
        commit = {"X-Repo-Commit": repo.commit}
        file = repo.files.get(found["path"])
        if repo.gated and exchange.token != self.token:
            text = f"Access to model {repo.name} is restricted."
            exchange.problem(403 if exchange.token else 401, "GatedRepo", text, commit)
        elif file is None:
            exchange.problem(404, "EntryNotFound", "Entry not found", commit)
        elif file.is_large:
            host = exchange.headers.get("Host", "").rpartition(":")[0]
            place = {"Location": f"http://{host}:{self.cdn.server_port}/blobs/{file.sha256}"}
            linked = {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.etag}"'}
            exchange.send_head(302, 0, commit | linked | place | {"ETag": f'"{file.blob_id}"'})
        else:
            self._send(exchange, file, commit)

    def _answer_cdn(self, exchange: Exchange) -> None:
        found = BLOB.fullmatch(urlsplit(exchange.path).path)
        file = self._blobs.get(found["sha256"]) if found else None
        if exchange.token is not None:
            exchange.problem(400, "", "A token was sent to a place that is not the hub's.")
        elif file is None:
            exchange.problem(403, "", "AccessDenied")
        else:
            self._send(exchange, file, {})

    def _send(self, exchange: Exchange, file: File, headers: Mapping[str, str]) -> None:
        ranged = exchange.headers.get("Range") and not self.ignores_ranges
        start, size = exchange.first_byte if ranged else 0, file.size
        headers = {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"} | dict(headers)
        if start >= size > 0:
            exchange.send_head(416, 0, headers | {"Content-Range": f"bytes */{size}"})
            return
        if ranged:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        exchange.send_head(206 if ranged else 200, size - start, headers)
        if exchange.command == "GET":
            self._send_bytes(exchange, file, start)

    def _send_bytes(self, exchange: Exchange, file: File, start: int) -> None:
        fault = self._fault_of(file.path, sends=True)
        sent = 0
        for chunk in file.chunks(start):
            if fault is not None and fault.corrupts and not sent:
                chunk = bytes([chunk[0] ^ 0xFF]) + chunk[1:]
            if fault is not None and fault.after < sent + len(chunk) and (fault.cuts or fault.pauses):
                rest = max(0, fault.after - sent)
                exchange.wfile.write(chunk[:rest])
                if fault.cuts:
                    exchange.close_connection = True
                    return
                fault.over.wait()
                chunk, fault = chunk[rest:], None
            exchange.wfile.write(chunk)
            sent += len(chunk)

    def close(self) -> None:
        self.forget()
        for listener in (self.api, self.cdn):
            listener.shutdown()
            listener.server_close()


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], hub: Hub, answer: Callable[[Exchange], None]) -> None:
        super().__init__(address, Exchange)
        self.hub = hub
        self.answer = answer
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that hangs up is no news."""


class Exchange(BaseHTTPRequestHandler):
    """One request and its answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if kind == "Bearer" else None

    @property
    def first_byte(self) -> int:
        found = RANGE.fullmatch(self.headers.get("Range", ""))
        return int(found[1]) if found else 0

    def do_GET(self) -> None:
        agent = self.headers.get("User-Agent", "")
        asked = Asked(self.command, unquote(self.path), self.first_byte, self.token, agent)
        self.server.hub.requests.append(asked)
        with suppress(ConnectionError):
            self.server.answer(self)

    do_HEAD = do_GET

    def send_json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_head(200, len(data), {"Content-Type": "application/json; charset=utf-8"})
        if self.command == "GET":
            self.wfile.write(data)

    def problem(self, status: int, code: str, text: str, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps({"error": text}).encode()
        told = {"X-Error-Code": code, "X-Error-Message": text} if code else {}
        self.send_head(status, len(data), {"Content-Type": "application/json", **told, **(headers or {})})
        if self.command == "GET":
            self.wfile.write(data)

    def send_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Tests ask `hub.requests` instead."""


@contextmanager
def hub_server(host: str = "127.0.0.1", port: int = 0) -> Iterator[Hub]:
    hub = Hub(host, port)
    try:
        yield hub
    finally:
        hub.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve FOLDER/owner/name/… as a model hub, until SIGINT.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    with hub_server(options.host, options.port) as hub:
        for repo in sorted(path for path in options.folder.glob("*/*") if path.is_dir()):
            files = {str(path.relative_to(repo)): path for path in repo.rglob("*") if path.is_file()}
            hub.add(str(repo.relative_to(options.folder)), files)
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
