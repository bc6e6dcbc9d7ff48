"""How the files of models are named: parts of split models, projectors, patterns. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

_LATER_SHARD = re.compile(r".+-(?!00001-of-)\d{5}-of-\d{5}\.gguf", re.IGNORECASE)
_FIRST_SHARD = re.compile(r"(.+)-00001-of-\d{5}", re.IGNORECASE)


def is_later_shard(name: str) -> bool:
    return _LATER_SHARD.fullmatch(name) is not None


def stem(path: Path) -> str:
    """The file's name without .gguf and without the number of the shard."""
    first = _FIRST_SHARD.fullmatch(path.stem)
    return first[1] if first else path.stem


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """The names that match, of a split model its first shard, without regard to case.

    Projectors match only by that name.
    """
    wanted = pattern.lower()
    return [
        name
        for name in names
        if (fnmatchcase(name.lower(), wanted) or fnmatchcase(Path(name).name.lower(), wanted))
        and not is_later_shard(name)
        and ("mmproj" in wanted or "mmproj" not in Path(name).name.lower())
    ]
