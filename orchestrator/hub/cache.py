"""The Hugging Face cache as its tools lay it out: blobs by content, links to them by revision and name.

models--OWNER--NAME/blobs/<content>
models--OWNER--NAME/snapshots/<commit>/<path>  -> ../../blobs/<content>
models--OWNER--NAME/refs/main                  the commit
.locks/models--OWNER--NAME/<content>.lock      held while the blob is written
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.core.entities import HubFile

LOCK_RETRY_S = 0.2
SHARED_FOLDER, SHARED_FILE = 0o775, 0o664
"""Who shares the cache through its group may go on with what another has begun."""


def hub_home() -> Path:
    """Where the Hugging Face tools keep everything of theirs."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser().absolute()


def hub_folder() -> Path:
    """Where they keep what they download."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser().absolute()
    return hub_home() / "hub"


@dataclass(frozen=True)
class RepoCache:
    """One repository's part of the cache in `hub`. Blocking; every method may raise OSError."""

    hub: Path
    repo: str

    @property
    def name(self) -> str:
        return f"models--{self.repo.replace('/', '--')}"

    @property
    def folder(self) -> Path:
        return self.hub / self.name

    def blob(self, file: HubFile) -> Path:
        return self.folder / "blobs" / file.blob

    def incomplete(self, file: HubFile) -> Path:
        return self.folder / "blobs" / f"{file.blob}.incomplete"

    def place(self, commit: str, path: str) -> Path:
        return self.folder / "snapshots" / commit / path

    def missing_bytes(self, files: Iterable[HubFile]) -> int:
        """What is yet to be written for them."""
        return sum(
            max(0, file.size_bytes - _size(self.incomplete(file)))
            for file in files
            if not self.blob(file).exists()
        )

    @contextmanager
    def locked(self, file: HubFile, waits: Callable[[], None]) -> Iterator[None]:
        """Hold the blob's lock, which is the one that the hub's own tools take. `waits` is called while
        somebody else holds it."""
        path = self.hub / ".locks" / self.name / f"{file.blob}.lock"
        make_folder(path.parent, self.hub)
        descriptor = _open_lock(path)
        try:
            while not _has_locked(descriptor):
                waits()
                time.sleep(LOCK_RETRY_S)
            yield
        finally:
            os.close(descriptor)

    def link(self, commit: str, file: HubFile) -> None:
        """Give the blob its name in this revision."""
        place, blob = self.place(commit, file.path), self.blob(file)
        make_folder(place.parent, self.hub)
        target = os.path.relpath(blob, place.parent)
        with suppress(OSError):
            if place.readlink() == Path(target):
                return
        beside = place.with_name(f".{place.name}.{os.getpid()}")
        beside.symlink_to(target)
        beside.replace(place)

    def point_main(self, commit: str) -> None:
        """Let `main` be this revision: the last thing that is written."""
        ref = self.folder / "refs" / "main"
        with suppress(OSError):
            if ref.read_text(encoding="utf-8").strip() == commit:
                return
        make_folder(ref.parent, self.hub)
        beside = ref.with_name(f".main.{os.getpid()}")
        beside.write_text(commit, encoding="utf-8")
        beside.chmod(SHARED_FILE)
        beside.replace(ref)

    def remove(self, commit: str, files: Iterable[HubFile], kept: Collection[str]) -> int:
        """Remove these files but those whose path in the revision is `kept`; the bytes that came free.

        A blob that any other name still leads to stays.
        """
        going = [file for file in files if file.path not in kept]
        for file in going:
            self.place(commit, file.path).unlink(missing_ok=True)
        used = self._linked()
        freed = sum(self._remove_blob(file) for file in going if file.blob not in used)
        self._tidy(commit)
        return freed

    def _linked(self) -> set[str]:
        """Names of the blobs that some revision uses."""
        links = (path for path in (self.folder / "snapshots").rglob("*") if path.is_symlink())
        return {link.readlink().name for link in links}

    def _remove_blob(self, file: HubFile) -> int:
        freed = 0
        for path in (self.blob(file), self.incomplete(file)):
            size = _size(path)
            path.unlink(missing_ok=True)
            freed += size
        return freed

    def _tidy(self, commit: str) -> None:
        """Drop the revision if nothing is left of it, and the repository with its last revision."""
        snapshots = self.folder / "snapshots"
        _remove_empty(snapshots / commit)
        if not (snapshots / commit).exists():
            with suppress(OSError):
                ref = self.folder / "refs" / "main"
                if ref.read_text(encoding="utf-8").strip() == commit:
                    ref.unlink()
        with suppress(OSError):
            snapshots.rmdir()
        if not snapshots.exists() and not any(self.folder.glob("blobs/*")):
            shutil.rmtree(self.folder, ignore_errors=True)


def make_folder(folder: Path, root: Path) -> None:
    """Make it with all above it, each open to the group from `root` on."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        if path == root or path.is_relative_to(root):
            with suppress(PermissionError):  # somebody else was faster
                path.chmod(SHARED_FOLDER)


def _open_lock(path: Path) -> int:
    """A descriptor of the lock's file; one that another user made can be locked without writing to it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, SHARED_FILE)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with suppress(PermissionError):
        os.fchmod(descriptor, SHARED_FILE)
    return descriptor


def _has_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _remove_empty(folder: Path) -> None:
    """The folder and those in it, as far as there is nothing in them."""
    if not folder.is_dir():
        return
    for below in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            below.rmdir()
    with suppress(OSError):
        folder.rmdir()
