"""What a service's log says of its buffers: llama.cpp names each with its device and size when it is made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

from orchestrator.core.entities import MIB

Buffers: TypeAlias = Mapping[str, Mapping[str, int]]
"""Bytes by llama.cpp's name of the device and of the kind, as in `{"CUDA0": {"model": 4671737856}}`."""

LINE = re.compile(
    r"(?<!\w)(\w{1,40}(?:\[[^\]]{1,80}\])?):? +(model|KV|RS|compute|output)"
    r" buffer size *= *(\d{1,7}(?:\.\d+)?) MiB"
)
"""A name begins where a word begins: a line of letters would else be tried anew at each, for a second."""

SIGN = " buffer size"
LONGEST_LINE = 1000
MOST_DEVICES = 40
"""The file that is loaded may have a text in the log, too: it must not fill what is kept."""

ON_GPU = re.compile(r"(?!CPU)[A-Za-z]+\d")
"""GPUs are numbered; CPU_Mapped, CUDA_Host and such are RAM."""

COMPONENTS = {
    "model": "weights",
    "KV": "kv_cache",
    "RS": "kv_cache",
    "compute": "compute",
    "output": "compute",
}
"""What a footprint calls each kind. RS are the states of recurrent layers."""

OTHER = "other"


def buffers_in(log: str) -> Buffers:
    """All that the log names; several of one device and kind (of a draft model, say) add up."""
    found: dict[str, dict[str, int]] = {}
    for line in log.splitlines():
        match = LINE.search(line[:LONGEST_LINE]) if SIGN in line else None
        if match is None or (match[1] not in found and len(found) == MOST_DEVICES):
            continue
        kinds = found.setdefault(match[1], {})
        kinds[match[2]] = kinds.get(match[2], 0) + round(float(match[3]) * MIB)
    return found


def parts_on_fullest_gpu(buffers: Mapping[str, Mapping[str, int]], whole_bytes: int) -> dict[str, int]:
    """The components of what was measured on one GPU, with all that the log does not name as `other`: CUDA's
    context, a projector, what grew later. Empty where the log names no buffer on a GPU, or too much.
    """
    on_gpus = [kinds for device, kinds in buffers.items() if ON_GPU.match(device)]
    fullest = max(on_gpus, key=lambda kinds: sum(kinds.values()), default={})
    named = sum(fullest.values())
    if not 0 < named <= whole_bytes:
        return {}
    parts: dict[str, int] = {}
    for kind, size in fullest.items():
        component = COMPONENTS[kind]
        parts[component] = parts.get(component, 0) + size
    return {**parts, OTHER: whole_bytes - named}
