"""Which files of a repository make the model that is asked for: the rules of llama.cpp's `-hf`. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from posixpath import basename, dirname

from orchestrator.core.entities import HubFile
from orchestrator.core.errors import QuantNotFound
from orchestrator.hub.names import is_later_shard, matching

PREFERRED = ("Q4_K_M", "Q8_0")
BESIDE = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""In the names of files that go with a model and are none."""

_REFERENCE = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?P<quant>\w[\w.-]*))?", re.ASCII
)
_QUANT = re.compile(
    r"[-.]((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|B?F16|F32|FP\d+|MXFP\d\w*|NVFP\d\w*))(?=[-.]|$)", re.IGNORECASE
)
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.gguf", re.IGNORECASE)
_MOST_TOLD = 24


@dataclass(frozen=True)
class Reference:
    """`OWNER/NAME` or `OWNER/NAME:QUANT`, as people write it."""

    repo: str
    quant: str | None = None


@dataclass(frozen=True)
class Picked:
    """The model's file, or all of its shards, first one first; and its projector if there is one."""

    model: tuple[HubFile, ...]
    mmproj: HubFile | None = None

    @property
    def files(self) -> tuple[HubFile, ...]:
        return self.model + ((self.mmproj,) if self.mmproj else ())


def parse_reference(text: str) -> Reference | None:
    """None where the text is no reference."""
    found = _REFERENCE.fullmatch(text)
    return Reference(found["repo"], found["quant"]) if found else None


def name_of(reference: Reference, picked: Picked) -> str:
    """What the model is called: its repository and its quantization, however that was asked for."""
    quant = quant_of(picked.model[0].path) or (reference.quant or "").upper()
    return f"{reference.repo}:{quant}" if quant else reference.repo


def quant_of(path: str) -> str | None:
    """`Q4_K_M` of `x/model-q4_k_m-00001-of-00002.gguf`; the last such word where there are several."""
    words: list[str] = _QUANT.findall(basename(path))
    return words[-1].upper() if words else None


def pick(repo: str, files: Sequence[HubFile], quant: str | None) -> Picked:
    """The model of this quantization; else Q4_K_M, else Q8_0, else the first. Raises QuantNotFound."""
    models = [file for file in files if is_model(file.path) and not is_later_shard(file.path)]
    for wanted in (quant,) if quant else PREFERRED:
        word = re.compile(rf"(?:^|[-./]){re.escape(wanted)}[-.]", re.IGNORECASE)
        found = next((file for file in models if word.search(file.path)), None)
        if found is not None:
            return _whole(repo, files, found)
    if quant or not models:
        raise QuantNotFound(_missing(repo, models, f":{quant}" if quant else ""))
    return _whole(repo, files, models[0])


def pick_by_pattern(repo: str, files: Sequence[HubFile], pattern: str, mmproj: str | None) -> Picked:
    """Exactly what a `source` of models.yaml names. Raises QuantNotFound."""
    model = _only(repo, files, pattern)
    return Picked(_shards(repo, files, model), _projector_by(repo, files, mmproj, model) if mmproj else None)


def is_model(path: str) -> bool:
    name = basename(path).lower()
    return name.endswith(".gguf") and not any(word in name for word in BESIDE)


def _projector_by(repo: str, files: Sequence[HubFile], pattern: str, model: HubFile) -> HubFile:
    """Of several that match, the one that goes best with the model."""
    by_path = {file.path: file for file in files}
    best = nearest_projector(matching(by_path, pattern), model.path)
    return by_path[best] if best else _only(repo, files, pattern)


def _only(repo: str, files: Iterable[HubFile], pattern: str) -> HubFile:
    by_path = {file.path: file for file in files}
    found = matching(by_path, pattern)
    if len(found) == 1:
        return by_path[found[0]]
    if found:
        told = f"{repo}: '{pattern}' matches {len(found)} files: {', '.join(found[:5])}; name one of them."
        raise QuantNotFound(told)
    there = ", ".join(path for path in by_path if path.lower().endswith(".gguf"))
    raise QuantNotFound(f"{repo} has no file '{pattern}'. It has: {there or 'no GGUF file at all'}.")


def _whole(repo: str, files: Sequence[HubFile], model: HubFile) -> Picked:
    return Picked(_shards(repo, files, model), _projector(files, model))


def _shards(repo: str, files: Iterable[HubFile], first: HubFile) -> tuple[HubFile, ...]:
    """All parts of a split model, in order. Raises QuantNotFound if the repository lacks one."""
    split = _SHARD.fullmatch(first.path)
    if split is None:
        return (first,)
    siblings = (_SHARD.fullmatch(file.path) for file in files)
    names = sorted(s[0] for s in siblings if s and (s[1], s[2]) == (split[1], split[2]))
    if len(names) != int(split[2]):
        raise QuantNotFound(f"{repo} has only {len(names)} of the {int(split[2])} parts of {first.path}.")
    by_path = {file.path: file for file in files}
    return tuple(by_path[name] for name in names)


def _projector(files: Iterable[HubFile], model: HubFile) -> HubFile | None:
    by_path = {file.path: file for file in files}
    best = nearest_projector((path for path in by_path if "mmproj" in basename(path).lower()), model.path)
    return by_path[best] if best else None


def nearest_projector(paths: Iterable[str], model: str) -> str | None:
    """The projector in the nearest folder above the model, then the one whose precision is nearest to it.

    As llama.cpp chooses, so of BF16, F16 and F32 beside a Q4_K_M it is the first of the two halves.
    """
    found = [p for p in paths if p.lower().endswith(".gguf") and _is_in_or_below(model, dirname(p))]
    bits = _bits(model)
    return min(found, key=lambda path: (-path.count("/"), abs(_bits(path) - bits)), default=None)


def _is_in_or_below(path: str, folder: str) -> bool:
    return not folder or path.startswith(f"{folder}/")


def _bits(path: str) -> int:
    digits = re.search(r"\d+", quant_of(path) or "")
    return int(digits[0]) if digits else 0


def _missing(repo: str, models: Iterable[HubFile], wanted: str) -> str:
    quants = list(dict.fromkeys(quant_of(file.path) or file.path for file in models))
    if not quants:
        return f"{repo} has no GGUF model; repositories with GGUF files often have that in their name."
    rest = f" and {len(quants) - _MOST_TOLD} more" if len(quants) > _MOST_TOLD else ""
    return f"{repo} has no '{wanted[1:]}'. It has: {', '.join(quants[:_MOST_TOLD])}{rest}."
