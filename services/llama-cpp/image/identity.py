"""Who the container's programs are: the user PUID:PGID, after what root left in the cache was handed over."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

DEFAULT_ID = 1000
HOME = "/home/llama"


class BadIdentity(Exception):
    """PUID or PGID is not a user's or group's number."""


def wanted(environment: Mapping[str, str]) -> tuple[int, int]:
    """The user and group to become. Raises BadIdentity, also for root."""
    return _number(environment, "PUID"), _number(environment, "PGID")


def step_down(environment: Mapping[str, str]) -> None:
    """As root, become the wanted user for good; as anybody else, stay.

    Groups that the engine gave us besides (`--group-add`) are kept, since devices may need them.
    """
    if os.geteuid() != 0:
        return
    user, group = wanted(environment)
    hand_over(cache_home(environment), user, group)
    os.setgroups([other for other in os.getgroups() if other not in (0, group)] + [group])
    os.setgid(group)
    os.setuid(user)
    os.environ["HOME"] = HOME


def cache_home(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("HF_HOME") or "/data/.huggingface")


def hand_over(cache: Path, user: int, group: int) -> None:
    """Give what is root's in the cache to this user. What belongs to somebody else stays theirs.

    A cache that is mounted read-only stays as it is: who only serves has no need to write.
    """
    for path in _tree(cache):
        try:
            if os.lstat(path).st_uid == 0:
                os.chown(path, user, group, follow_symlinks=False)
        except FileNotFoundError:
            continue
        except OSError as error:
            if not _is_read_only(cache):
                say = f"{path} belongs to root and cannot be handed to {user}:{group} ({error.strerror})"
                print(f"warning: {say}", file=sys.stderr, flush=True)
            return


def _tree(cache: Path) -> Iterator[Path]:
    if cache.is_dir():
        yield cache
        yield from cache.rglob("*")


def _is_read_only(path: Path) -> bool:
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _number(environment: Mapping[str, str], key: str) -> int:
    text = environment.get(key, "").strip() or str(DEFAULT_ID)
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 2**31:
        raise BadIdentity(f"{key} is '{text}', expected a number from 1 to 2147483647; root is not allowed")
    return int(text)
