"""What stands in the way to a file: a folder in its place, a file in its folder's, or rights."""

from __future__ import annotations

import errno
import os
import pwd
import stat
from pathlib import Path


def obstacle(path: Path) -> str | None:
    """A clause and the way out as sentences, as `is a folder. Name a file in it.`; None if nothing is.

    Reading is looked at before writing, so that who may not even read is told that. None too where the disk
    does not let us look: it is asked after an error, which must not become another.
    """
    try:
        return _obstacle(path)
    except OSError:
        return None


def _obstacle(path: Path) -> str | None:
    for folder in reversed(path.parents):
        if not os.path.lexists(folder):
            break
        if (leads := _lost_link(folder)) is not None:
            return f"cannot be there: {folder} {leads}"
        if not folder.is_dir():
            return f"cannot be there: {folder} is a file and no folder. Name another path."
        if not _may(folder, os.X_OK):
            return _kept_out(folder, "enter", path)
    if (leads := _lost_link(path)) is not None:
        return leads
    if path.is_dir():
        return f"is a folder. Name a file in it, such as {path / 'orchestrator.db'}."
    if os.path.lexists(path) and not _may(path, os.R_OK):
        return _kept_out(path, "read", path)
    return _unwritable(path)


def _lost_link(place: Path) -> str | None:
    """Of a link that leads nowhere."""
    if not place.is_symlink():
        return None
    try:
        place.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            leads = f"is a link to {place.readlink()}, which leads nowhere"
            return f"{leads}. Mount what it leads to, or correct the link."
    return None


def _unwritable(path: Path) -> str | None:
    folder = next(parent for parent in path.parents if os.path.lexists(parent))
    for place in (path, folder):
        if os.path.lexists(place) and not _may(place, os.W_OK):
            is_mounted_so = os.statvfs(place).f_flag & os.ST_RDONLY
            return None if is_mounted_so else _kept_out(place, "write", path)
    return None


def _kept_out(place: Path, verb: str, path: Path) -> str:
    us, owner = _name(os.geteuid()), _owner(path)
    if owner != os.geteuid():
        whose = _name(owner)
        return f"belongs to {whose}, and this user ({us}) may not {verb} {place}. Run this as {whose}."
    mode = stat.filemode(place.stat().st_mode)
    told = f"is closed even to its owner ({us}): {place} is {mode}"
    return f"{told}. `chmod u+rwX {place}` makes it readable and writable."


def _owner(path: Path) -> int:
    """Whose the file is or, where it may not be seen, whose the folder is that hides it."""
    for place in (path, *path.parents):
        try:
            return place.stat().st_uid
        except OSError:
            continue
    return 0


def _may(path: Path, mode: int) -> bool:
    return os.access(path, mode, effective_ids=True)


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"the user {uid}"
