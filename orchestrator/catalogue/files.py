"""Finds model files: on this machine by path, in the Hugging Face cache by repository and pattern.

And says how a container sees them: read-only and below /models, or in the volume that has the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.hub.cache import hub_folder, hub_home
from orchestrator.hub.names import matching
from orchestrator.hub.picking import nearest_projector


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
    """The same files as a container sees them.

    `mounts` are (host folder, container folder), read-only; `needs_hub` says that one of the files lies in
    the volume that has the Hugging Face cache.
    """

    path: str = ""
    mmproj: str = ""
    mounts: tuple[tuple[str, str], ...] = ()
    needs_hub: bool = False


def find_in_hub(repo: str, file: str, mmproj: str | None, command: str) -> Found:
    """The newest downloaded revision's files; names and patterns are matched without regard to case.

    Raises NotFound with the `command` that downloads them.
    """
    get = f"get it with: {command}"
    snapshot = _snapshot(hub_folder(), repo)
    if snapshot is None:
        raise NotFound(f"{repo} is not in the Hugging Face cache ({hub_folder()}); {get}")
    names = _names(snapshot)
    path = _one(names, file, f"{repo}: no file '{file}' is in the cache; {get}")
    if not mmproj:
        return Found(snapshot / path)
    best = nearest_projector(matching(names, mmproj), path)
    projector = best or _one(names, mmproj, f"{repo}: no file '{mmproj}' is in the cache; {get}")
    return Found(snapshot / path, snapshot / projector)


def at_home(path: Path) -> Path:
    """With `~` and `~user` filled in. Raises NotFound."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise NotFound(f"{path}: there is no user whose folder is {path.parts[0]}") from None


def latest(path: Path) -> Path:
    """`…/models--OWNER--NAME/snapshots/latest/FILE` with the revision that `refs/main` names in place of
    `latest`, and the file as it is really written. Other paths stay as they are.

    Raises NotFound with what is there, and the command that downloads it.
    """
    parts = path.parts
    place = next((i for i in range(1, len(parts) - 1) if parts[i - 1 : i + 1] == ("snapshots", "latest")), 0)
    if not place:
        return path
    folder, wanted = Path(*parts[: place - 1]), "/".join(parts[place + 1 :])
    repo = "/".join(folder.name.removeprefix("models--").split("--"))
    get = f"get it with: hf download {repo} {wanted}"
    snapshot = next((found for same in _same_name(folder) if (found := _newest(same))), None)
    if snapshot is None:
        raise NotFound(f"{path}: {folder} has no downloaded revision; {get}")
    names = _names(snapshot)
    name = next((name for name in names if name.lower() == wanted.lower()), None)
    if name is None:
        raise NotFound(f"{path}: there is {', '.join(names[:8]) or 'nothing'} in {snapshot}; {get}")
    return snapshot / name


def _snapshot(hub: Path, repo: str) -> Path | None:
    same = _same_name(hub / f"models--{repo.replace('/', '--')}")
    return next((found for folder in same if (found := _newest(folder))), None)


def _same_name(folder: Path) -> list[Path]:
    """The folder, in upper or lower case."""
    return [entry for entry in _folders(folder.parent) if entry.name.lower() == folder.name.lower()]


def _newest(folder: Path) -> Path | None:
    """The revision of a repository's folder that `refs/main` names, or the only one."""
    snapshots = _folders(folder / "snapshots")
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        commit = snapshots[0].name if len(snapshots) == 1 else ""
    return next((snapshot for snapshot in snapshots if snapshot.name == commit), None)


def _names(snapshot: Path) -> list[str]:
    return sorted(entry.relative_to(snapshot).as_posix() for entry in snapshot.rglob("*") if entry.is_file())


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.is_dir())
    except OSError:
        return []


def _one(names: Iterable[str], pattern: str, missing: str) -> str:
    matches = matching(names, pattern)
    if not matches:
        raise NotFound(missing)
    if len(matches) > 1:
        raise NotFound(
            f"'{pattern}' matches {len(matches)} files: {', '.join(matches[:5])}; name one of them"
        )
    return matches[0]


def inside(found: Found, hub_target: str | None = None) -> Inside:
    """Name the files for a container, which has the volume with HF_HOME at `hub_target` if there is one.

    Raises NotFound for a file that lies directly in `/`, or in a cache that is not in HF_HOME.
    """
    mounts: dict[str, str] = {}
    places = [
        _place(file, mounts, hub_target) if file is not None else "" for file in (found.path, found.mmproj)
    ]
    needs_hub = hub_target is not None and any(place.startswith(f"{hub_target}/") for place in places)
    return Inside(places[0], places[1], tuple(mounts.items()), needs_hub)


def _place(file: Path, mounts: dict[str, str], hub_target: str | None) -> str:
    folder, name = _folder_and_name(file)
    if hub_target is not None and folder == hub_folder().resolve():
        return f"{hub_target}/{_hub_in_home()}/{name}"
    if folder == Path("/"):
        raise NotFound(f"{file} lies in / itself, which is never given to a container; move it to a folder")
    target = "/models" if not mounts else f"/models-{len(mounts) + 1}"
    return f"{mounts.setdefault(str(folder), target)}/{name}".rstrip("/.")


def is_there(path: Path) -> bool:
    """True also where we may not look; reading it then says why."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _is_folder(path: Path) -> bool:
    """False also where we may not look."""
    try:
        return path.is_dir()
    except OSError:
        return False


def _hub_in_home() -> str:
    try:
        return hub_folder().relative_to(hub_home()).as_posix()
    except ValueError:
        raise NotFound(
            f"hub_volume is the volume at HF_HOME ({hub_home()}), and HF_HUB_CACHE ({hub_folder()}) lies "
            "outside of it; unset HF_HUB_CACHE"
        ) from None


def _folder_and_name(file: Path) -> tuple[Path, str]:
    """What to mount and the name below it, such that symbolic links still lead somewhere inside."""
    real, hub = file.resolve(), hub_folder()
    for cache in (hub, hub.resolve()):
        if file.is_relative_to(cache):  # its files are links into blobs, two folders up
            return hub.resolve(), file.relative_to(cache).as_posix()
    if _is_folder(real):
        return real, "."
    if real.is_relative_to(hub.resolve()):
        return hub.resolve(), real.relative_to(hub.resolve()).as_posix()
    if real.parent == file.parent.resolve():
        return real.parent, file.name
    return real.parent, real.name
