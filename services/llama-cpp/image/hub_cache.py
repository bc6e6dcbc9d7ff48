"""Finds model files in a Hugging Face cache as people write their paths.

    …/hub/models--Qwen--Some-GGUF/snapshots/latest/some-q4_k_m.gguf

`latest` stands for the snapshot that `refs/main` names, or for the only one there is. Upper and lower case
do not count, nor do punctuation marks where nothing fits better: the repository of Qwen3-VL calls its file
`Qwen3VL-30B-A3B-Instruct-Q4_K_M.gguf`. A folder of another kind is looked through in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

LATEST = "latest"
REPOSITORY = "models--"
DOWNLOAD_SCRIPT = "services/llama-cpp/download-model.sh"
IMAGE = "orchestrator/llama-cpp:cuda12.8"
CONTAINER = "llama-cpp"
VOLUME = "hf-cache:/data/.huggingface"

_LISTED = 12
_PROJECTORS_FIRST = ("f16", "bf16", "q8", "f32")


class Missing(Exception):
    """There is no such file. The message says what was looked for, what is there, and how to get it."""


@dataclass(frozen=True)
class Place:
    """A path inside a hub's cache, taken apart."""

    hub: Path
    folder: str
    revision: str
    file: str

    @property
    def repo(self) -> str:
        return repo_of(self.folder)


def find(path: Path) -> Path:
    """The file that `path` means. Raises Missing, and OSError for what may not be looked at."""
    if path.is_file():
        return path
    place = take_apart(path)
    if place is None:
        found = nearest(path.name, files_in(path.parent))
        if found is None:
            raise Missing(_not_in_folder(path))
        return path.parent / found
    snapshot = snapshot_of(place)
    found = nearest(place.file, files_in(snapshot)) if snapshot else None
    if snapshot is None or found is None:
        raise Missing(_not_in_hub(path, place, snapshot))
    return snapshot / found


def projector_beside(model: Path) -> Path | None:
    """The vision projector in the same snapshot of a hub's cache; of several, the one in 16 bits."""
    place = take_apart(model)
    if place is None:
        return None
    snapshot = place.hub / place.folder / "snapshots" / place.revision
    name = best_projector(files_in(snapshot))
    return snapshot / name if name else None


def best_projector(names: Iterable[str]) -> str | None:
    """Of a repository's files the vision projector to use, if it has one."""

    def rank(name: str) -> tuple[int, str]:
        words = re.split(r"[^a-z0-9]+", name.lower())
        ranks = [i for i, kind in enumerate(_PROJECTORS_FIRST) if any(w.startswith(kind) for w in words)]
        return (min(ranks, default=len(_PROJECTORS_FIRST)), name)

    projectors = [name for name in names if is_projector(name)]
    return min(projectors, key=rank) if projectors else None


def is_projector(name: str) -> bool:
    return "mmproj" in Path(name).name.lower() and name.lower().endswith(".gguf")


def nearest(wanted: str, names: Sequence[str]) -> str | None:
    """The one name that is meant: as it stands, else but for case, else but for punctuation too."""
    looser: tuple[Callable[[str], str], ...] = (str, str.lower, only_letters_and_digits)
    for key in looser:
        same = [name for name in names if key(name) == key(wanted)]
        if len(same) == 1:
            return same[0]
    return None


def only_letters_and_digits(text: str) -> str:
    return re.sub(r"[^a-z0-9/]", "", text.lower())


def take_apart(path: Path) -> Place | None:
    """None for a path that does not lead into a hub's cache."""
    parts = path.parts
    for at, part in enumerate(parts):
        if part.lower().startswith(REPOSITORY) and len(parts) > at + 3 and parts[at + 1] == "snapshots":
            return Place(Path(*parts[:at]), part, parts[at + 2], "/".join(parts[at + 3 :]))
    return None


def repo_of(folder: str) -> str:
    return folder[len(REPOSITORY) :].replace("--", "/", 1)


def snapshot_of(place: Place) -> Path | None:
    """The folder of the snapshot that is meant, or None."""
    folder = nearest(place.folder, _names(place.hub))
    if folder is None:
        return None
    snapshots = place.hub / folder / "snapshots"
    names = _names(snapshots)
    if place.revision in names:
        return snapshots / place.revision
    if place.revision != LATEST:
        return None
    main = _main(place.hub / folder)
    if main in names:
        return snapshots / main
    return snapshots / names[0] if main is None and len(names) == 1 else None


def files_in(folder: Path) -> list[str]:
    """Names of the files in it and below it, of those that can be read; sorted."""
    try:
        return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    except OSError:
        return []


def _main(folder: Path) -> str | None:
    try:
        return (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except OSError:
        return []


def _not_in_folder(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no {path}, nor its folder: is the volume or folder mounted there?"
    ggufs = [name for name in files_in(path.parent) if name.lower().endswith(".gguf")]
    return f"there is no {path}; GGUF files in that folder: {listed(ggufs)}"


def _not_in_hub(path: Path, place: Place, snapshot: Path | None) -> str:
    download = f"huggingface-cli download {place.repo} {place.file}"
    return "\n".join(
        [
            f"there is no model file {place.file}",
            f"  looked for:  {path}",
            f"  there is:    {_what_is_there(place, snapshot)}",
            "  get it with one of:",
            f"    {DOWNLOAD_SCRIPT} {place.repo} {place.file}",
            f"    docker run --rm -e HF_TOKEN -v {VOLUME} {IMAGE} {download}",
            f"    docker exec {CONTAINER} {download}   (where that runs)",
        ]
    )


def _what_is_there(place: Place, snapshot: Path | None) -> str:
    if not place.hub.is_dir():
        return f"not even the cache {place.hub}; is the volume hf-cache mounted, and was anything downloaded?"
    folders = [name for name in _names(place.hub) if name.startswith(REPOSITORY)]
    folder = nearest(place.folder, folders)
    if folder is None:
        return f"no such repository in {place.hub}; it has {listed([repo_of(name) for name in folders])}"
    snapshots = place.hub / folder / "snapshots"
    ggufs = {
        name: [file for file in files_in(snapshots / name) if file.lower().endswith(".gguf")]
        for name in _names(snapshots)
    }
    if snapshot is None and place.revision != LATEST:
        return f"no snapshot {place.revision} of {repo_of(folder)}; its snapshots are {listed(list(ggufs))}"
    return "; ".join(f"in snapshot {name}: {listed(files)}" for name, files in ggufs.items()) or "no snapshot"


def listed(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
