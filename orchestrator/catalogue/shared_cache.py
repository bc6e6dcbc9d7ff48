"""Whether we may read and write the Hugging Face cache, which containers of other users fill as well."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.hub.cache import hub_folder

IMAGE = "orchestrator/orchestrator:latest"
SHOWN = 3


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What was found; `advice` is empty where all is well."""

    found: str
    advice: str = ""


def look_at_cache(volume: str | None = None) -> CacheReport:
    """`volume` is the engine's volume that has the cache, where we run in a container beside it."""
    hub = hub_folder()
    home = hub.parent
    try:
        home.stat()
    except FileNotFoundError:
        return CacheReport(f"{home} is made at the first download")
    except OSError as error:
        return CacheReport(f"{home} cannot be reached: {error.strerror}", "Set HF_HOME to a folder of yours.")
    closed = [folder for folder in folders_of(home, hub) if not is_open(folder)]
    if not closed:
        return CacheReport(f"{home} can be read and written")
    us = f"{os.getuid()}:{os.getgid()}"
    named = ", ".join(f"{folder} (of {owner_of(folder)})" for folder in closed[:SHOWN])
    more = f" and {len(closed) - SHOWN} more" if len(closed) > SHOWN else ""
    return CacheReport(
        f"{us} cannot write all of the Hugging Face cache: {named}{more}",
        f"A container that ran as another user has made these, and downloads into them fail. "
        f"Give them back: `{chown(home, us, volume)}`",
    )


def folders_of(home: Path, hub: Path) -> Iterator[Path]:
    """The cache's own folders, as deep as downloads write; none below one that is closed."""
    yield from (folder for folder in (home, hub) if folder.is_dir())
    for repository in below(hub):
        yield repository
        for part in below(repository):
            yield part
            yield from below(part) if part.name == "snapshots" else ()


def below(folder: Path) -> list[Path]:
    try:
        return sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def is_open(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.W_OK | os.X_OK)


def owner_of(folder: Path) -> str:
    status = folder.stat()
    return f"{status.st_uid}:{status.st_gid}"


def chown(home: Path, owner: str, volume: str | None) -> str:
    """The command that gives all of it to us: on this machine, or on the one that our container runs on."""
    if volume is None:
        return f"sudo chown -R {owner} {home}"
    return f"docker run --rm --user 0 --entrypoint chown -v {volume}:/v {IMAGE} -R {owner} /v"
