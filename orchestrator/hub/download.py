"""One file from the hub into the cache: resumed where it stopped, verified, tried again. Blocking."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx

from orchestrator.core.entities import HubFile
from orchestrator.core.errors import ChecksumMismatch, DiskFull, HubError, HubUnreachable
from orchestrator.core.units import size_text
from orchestrator.hub.cache import SHARED_FILE, RepoCache, make_folder
from orchestrator.hub.client import HubClient

CHUNK = 1024 * 1024
FIRST_RETRY_S = 0.5
LAST_RETRY_S = 30.0
MOST_TRIES = 9
"""In a row, without a byte in between: about two minutes."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(?:\d+|\*)")

Report = Callable[[int], None]


@dataclass(frozen=True)
class FileDownload:
    """A file of one revision on its way. `report` is called with its bytes that are here, again and again.

    What is written is the blob's `.incomplete` file, which the next one goes on with.
    """

    client: HubClient
    cache: RepoCache
    commit: str
    file: HubFile
    report: Report
    pause: Callable[[float], None] = time.sleep

    def run(self) -> None:
        """Get it and give it its name in the revision, or only the latter. Raises HubError."""
        try:
            self._ensure_blob()
            self.cache.link(self.commit, self.file)
        except OSError as error:
            raise of_disk(error, self.cache.hub) from error
        self.report(self.file.size_bytes)

    def _ensure_blob(self) -> None:
        blob = self.cache.blob(self.file)
        if blob.exists():
            return
        make_folder(blob.parent, self.cache.hub)
        with self.cache.locked(self.file, lambda: self.report(0)):
            if not blob.exists():  # else somebody else got it meanwhile
                self._get()
                self.cache.incomplete(self.file).replace(blob)

    def _get(self) -> None:
        """Fill the incomplete file, and verify it; what was there before is not blamed twice."""
        had_begun = self.cache.incomplete(self.file).exists()
        try:
            self._get_patiently()
        except ChecksumMismatch:
            if not had_begun:
                raise
            self._get_patiently()

    def _get_patiently(self) -> None:
        tries, before = 0, -1
        while True:
            try:
                return self._get_rest()
            except HubUnreachable:
                size = self.cache.incomplete(self.file).stat().st_size
                tries = 1 if size > before else tries + 1
                before = size
                if tries >= MOST_TRIES:
                    raise
                self.pause(min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** (tries - 1)))

    def _get_rest(self) -> None:
        path = self.cache.incomplete(self.file)
        with path.open("a+b") as out:
            path.chmod(SHARED_FILE)
            out.seek(0)
            content = _Content(self.file)
            while chunk := out.read(CHUNK):
                content.add(chunk)
            if content.size < self.file.size_bytes:
                self._receive(out, content)
            out.flush()
            os.fsync(out.fileno())  # what is called complete must survive a power cut
        if content.size == self.file.size_bytes and content.digest() == self.file.blob:
            return
        path.unlink()
        raise ChecksumMismatch(
            f"{self.file.path} of {self.cache.repo} did not arrive as the hub has it: {content.size} bytes "
            f"with checksum {content.digest()} in place of {self.file.size_bytes} with {self.file.blob}. "
            "It was dropped; ask again."
        )

    def _receive(self, out: BinaryIO, content: _Content) -> None:
        with self.client.bytes_of(self.cache.repo, self.commit, self.file, content.size) as answer:
            if content.size and not _goes_on(answer, content.size):
                out.truncate(0)
                content.forget()
            for chunk in answer.iter_raw():
                out.write(chunk)
                out.flush()  # what has come is not fetched again, whatever ends this process
                content.add(chunk)
                self.report(content.size)
                if content.size > self.file.size_bytes:
                    return  # it does not end by itself, maybe


class _Content:
    """Size and checksum of what has come. Git's checksum is over a header too, with the size to be."""

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self.forget()

    def forget(self) -> None:
        self.size = 0
        is_sha256 = len(self._file.blob) == 64
        self._hash = hashlib.sha256() if is_sha256 else hashlib.sha1(b"blob %d\0" % self._file.size_bytes)

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self._hash.update(chunk)

    def digest(self) -> str:
        return self._hash.hexdigest()


def _goes_on(answer: httpx.Response, start: int) -> bool:
    """Whether the answer begins where we stopped; a server may ignore what range is asked for."""
    found = _CONTENT_RANGE.match(answer.headers.get("content-range", ""))
    return answer.status_code == httpx.codes.PARTIAL_CONTENT and found is not None and int(found[1]) == start


def of_disk(error: OSError, hub: Path) -> HubError:
    """What went wrong with the cache's disk, and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = size_text(shutil.disk_usage(hub).free)
        return DiskFull(
            f"The disk of the cache {hub} is full ({free} are free). What has come is kept: "
            "make room and ask again."
        )
    return HubError(
        f"The cache {hub} cannot be used ({error.strerror}: {error.filename}). "
        "It must belong to the user or group that the server runs as."
    )
