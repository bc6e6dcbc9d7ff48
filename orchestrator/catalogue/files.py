"""Finds model files: on this machine by path, in the Hugging Face cache by repository and pattern.

And says how a container sees them, which is read-only and below /models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

_LATER_SHARD = re.compile(r".+-(?!00001-of-)\d{5}-of-\d{5}\.gguf", re.IGNORECASE)
_FIRST_SHARD = re.compile(r"(.+)-00001-of-\d{5}", re.IGNORECASE)


class NotFound(Exception):
    """A file is not there; the message says what was looked for and what to do."""


@dataclass(frozen=True)
class Found:
    """A model's files on this machine."""

    path: Path | None = None
    mmproj: Path | None = None

    def all(self) -> tuple[Path, ...]:
        return tuple(file for file in (self.path, self.mmproj) if file is not None)


@dataclass(frozen=True)
class Inside:
    """The same files as a container sees them; `mounts` are (host folder, container folder), read-only."""

    path: str = ""
    mmproj: str = ""
    mounts: tuple[tuple[str, str], ...] = ()


def is_later_shard(name: str) -> bool:
    return _LATER_SHARD.fullmatch(name) is not None


def stem(path: Path) -> str:
    """The file's name without .gguf and without the number of the shard."""
    first = _FIRST_SHARD.fullmatch(path.stem)
    return first[1] if first else path.stem


def hub_folder() -> Path:
    """Where the Hugging Face tools keep what they download."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser().absolute()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser().absolute() / "hub"


def find_in_hub(repo: str, file: str, mmproj: str | None) -> Found:
    """The newest downloaded revision's files; names and patterns are matched without regard to case.

    Raises NotFound with the command that downloads them.
    """
    get = f"get it with: {_download(repo, file, mmproj)}"
    snapshot = _snapshot(hub_folder(), repo)
    if snapshot is None:
        raise NotFound(f"{repo} is not in the Hugging Face cache ({hub_folder()}); {get}")
    names = sorted(entry.relative_to(snapshot).as_posix() for entry in snapshot.rglob("*") if entry.is_file())
    path = _one(names, file, f"{repo}: no file '{file}' is in the cache; {get}")
    projector = _one(names, mmproj, f"{repo}: no file '{mmproj}' is in the cache; {get}") if mmproj else None
    return Found(snapshot / path, snapshot / projector if projector else None)


def _snapshot(hub: Path, repo: str) -> Path | None:
    wanted = f"models--{repo.replace('/', '--')}".lower()
    folders = _folders(hub)
    for folder in [entry for entry in folders if entry.name.lower() == wanted]:
        snapshots = _folders(folder / "snapshots")
        try:
            commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            commit = snapshots[0].name if len(snapshots) == 1 else ""
        for snapshot in snapshots:
            if snapshot.name == commit:
                return snapshot
    return None


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir())
    except OSError:
        return []


def _one(names: Iterable[str], pattern: str, missing: str) -> str:
    """The one name that matches, of a split model its first shard. Projectors match only by that name."""
    wanted = pattern.lower()
    matches = [
        name
        for name in names
        if (fnmatchcase(name.lower(), wanted) or fnmatchcase(Path(name).name.lower(), wanted))
        and not is_later_shard(name)
        and ("mmproj" in wanted or "mmproj" not in Path(name).name.lower())
    ]
    if not matches:
        raise NotFound(missing)
    if len(matches) > 1:
        raise NotFound(
            f"'{pattern}' matches {len(matches)} files: {', '.join(matches[:5])}; name one of them"
        )
    return matches[0]


def _download(repo: str, file: str, mmproj: str | None) -> str:
    wanted = [file, mmproj] if mmproj else [file]
    if any(character in name for name in wanted for character in "*?["):
        return f"hf download {repo} " + " ".join(f"--include '{name}'" for name in wanted)
    return f"hf download {repo} " + " ".join(wanted)


def inside(found: Found) -> Inside:
    """Name the files for a container. Raises NotFound for a file that lies directly in `/`."""
    mounts: dict[str, str] = {}
    places = [_place(file, mounts) if file is not None else "" for file in (found.path, found.mmproj)]
    return Inside(places[0], places[1], tuple(mounts.items()))


def _place(file: Path, mounts: dict[str, str]) -> str:
    folder, name = _folder_and_name(file)
    if folder == Path("/"):
        raise NotFound(f"{file} lies in / itself, which is never given to a container; move it to a folder")
    target = "/models" if not mounts else f"/models-{len(mounts) + 1}"
    return f"{mounts.setdefault(str(folder), target)}/{name}".rstrip("/.")


def _folder_and_name(file: Path) -> tuple[Path, str]:
    """What to mount and the name below it, such that symbolic links still lead somewhere inside."""
    real, hub = file.resolve(), hub_folder()
    for cache in (hub, hub.resolve()):
        if file.is_relative_to(cache):  # its files are links into blobs, two folders up
            return hub.resolve(), file.relative_to(cache).as_posix()
    if real.is_dir():
        return real, "."
    if real.is_relative_to(hub.resolve()):
        return hub.resolve(), real.relative_to(hub.resolve()).as_posix()
    if real.parent == file.parent.resolve():
        return real.parent, file.name
    return real.parent, real.name
