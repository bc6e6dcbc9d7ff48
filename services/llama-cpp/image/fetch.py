"""Gets one large file: goes on where an earlier try ended, and lets it count only if its checksum is right.

`huggingface_hub` itself begins anew after each interruption, and compares no more than the size.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx2
from filelock import FileLock
from huggingface_hub.utils import get_session, hf_raise_for_status
from tqdm import tqdm

READ_BYTES = 4 * 1024 * 1024
TRIES = 6  # in a row without a single byte
TIMEOUT = httpx2.Timeout(30)


class Damaged(Exception):
    """What arrived is not what the hub says it has; it was removed."""


@dataclass(frozen=True)
class Blob:
    """A file as the hub describes it, and where it goes: `path` is in the cache's folder of blobs."""

    name: str
    url: str
    size: int
    sha256: str
    path: Path
    lock: Path

    @property
    def partial(self) -> Path:
        return self.path.with_name(self.path.name + ".incomplete")

    def missing_bytes(self) -> int:
        if self.path.exists():
            return 0
        return max(0, self.size - (self.partial.stat().st_size if self.partial.exists() else 0))


def fetch(blob: Blob, headers: Mapping[str, str], *, quiet: bool = False) -> None:
    """Afterwards `blob.path` is there, whole and checked. Only one process at a time gets it, others wait.

    Raises Damaged, OSError, and httpx2.HTTPError or one of huggingface_hub's when all tries have failed.
    """
    for folder in (blob.path.parent, blob.lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with FileLock(blob.lock):
        if blob.path.exists():
            return
        with blob.partial.open("a+b") as file:
            digest = _digest_of(file)
            with _bar(blob, file.tell(), quiet) as bar:
                _fill(blob, headers, file, digest, bar.update)
            os.fsync(file.fileno())
        if digest.hexdigest() != blob.sha256:
            blob.partial.unlink()
            raise Damaged(f"{blob.name} arrived damaged (SHA-256 {digest.hexdigest()}, not {blob.sha256})")
        blob.partial.rename(blob.path)


def _fill(
    blob: Blob,
    headers: Mapping[str, str],
    file: BinaryIO,
    digest: hashlib._Hash,
    progress: Callable[[int], object],
) -> None:
    """Ask until nothing is missing; each answer that brought something gives all tries back."""
    tries = TRIES
    while (have := file.tell()) < blob.size:
        try:
            _ask(blob, headers, file, digest, progress)
        except httpx2.TransportError as error:
            tries = TRIES if file.tell() > have else tries - 1
            if tries == 0:
                raise
            print(f"{blob.name}: {error or type(error).__name__}; going on", file=sys.stderr, flush=True)
            time.sleep(min(8.0, 0.25 * 2.0 ** (TRIES - tries)))


def _ask(
    blob: Blob,
    headers: Mapping[str, str],
    file: BinaryIO,
    digest: hashlib._Hash,
    progress: Callable[[int], object],
) -> None:
    have = file.tell()
    asked = {**headers, "Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with get_session().stream("GET", blob.url, headers=asked, timeout=TIMEOUT) as answer:
        if answer.status_code >= 400:
            answer.read()
            hf_raise_for_status(answer)
        if have and answer.status_code != 206:
            raise OSError(errno.EIO, "the server cannot go on where the download was interrupted")
        for chunk in answer.iter_raw():  # as it comes: what waits in a buffer is lost where the stream breaks
            file.write(chunk)
            file.flush()
            digest.update(chunk)
            progress(len(chunk))


def _digest_of(file: BinaryIO) -> hashlib._Hash:
    """Of what is there already; the file is left at its end."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(READ_BYTES):
        digest.update(chunk)
    return digest


def _bar(blob: Blob, have: int, quiet: bool) -> tqdm[object]:
    """On a terminal five times a second, in a log every ten seconds."""
    return tqdm(
        total=blob.size,
        initial=have,
        desc=blob.name,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        mininterval=0.2 if sys.stderr.isatty() else 10,
        disable=quiet,
    )
