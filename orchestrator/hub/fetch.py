"""`python -m orchestrator.hub.fetch`: one download as a process of its own.

It reads an order as one line of JSON, and says as lines of JSON how many bytes are here: {"done": 123},
and at the end {"ok": true} or {"error": {"code", "message"}}. It ends with whoever ordered it, since it
watches its stdin for the end. Killed at any moment, the next one goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.core.entities import HubFile
from orchestrator.core.errors import HubError
from orchestrator.hub.cache import RepoCache
from orchestrator.hub.client import HubClient
from orchestrator.hub.download import FileDownload, of_disk

REPORT_EVERY_S = 0.25
DONE, FAILED, ABANDONED = 0, 1, 3


@dataclass(frozen=True)
class Order:
    """These files of one revision, into the cache in `hub`."""

    hub: Path
    repo: str
    commit: str
    files: tuple[HubFile, ...]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "hub": str(self.hub)})

    @classmethod
    def from_json(cls, text: str) -> Order:
        told = json.loads(text)
        files = tuple(HubFile(**file) for file in told["files"])
        return cls(Path(told["hub"]), told["repo"], told["commit"], files)


class Reporter:
    """Bytes that are here, of all files together, a few times a second."""

    def __init__(self) -> None:
        self._before = 0
        self._next_s = 0.0

    def file_is_here(self, size_bytes: int) -> None:
        self._before += size_bytes

    def __call__(self, done_bytes: int) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + REPORT_EVERY_S
            say({"done": self._before + done_bytes})


def fetch(order: Order) -> None:
    """Raises HubError."""
    cache, report = RepoCache(order.hub, order.repo), Reporter()
    with HubClient() as client:
        for file in order.files:
            FileDownload(client, cache, order.commit, file, report).run()
            report.file_is_here(file.size_bytes)
    try:
        cache.point_main(order.commit)
    except OSError as error:
        raise of_disk(error, order.hub) from error


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def end_with_stdin() -> None:
    """Whoever ordered this is gone, or has closed it to say that it is not wanted any more."""
    sys.stdin.read()
    os._exit(ABANDONED)


def main() -> NoReturn:
    order = Order.from_json(sys.stdin.readline())
    threading.Thread(target=end_with_stdin, daemon=True).start()
    code = DONE
    try:
        fetch(order)
        say({"ok": True})
    except HubError as error:
        say({"error": {"code": error.code, "message": error.message}})
        code = FAILED
    os._exit(code)


if __name__ == "__main__":
    main()
