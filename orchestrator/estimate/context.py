"""What a process takes on a GPU beside llama.cpp's own buffers: CUDA's context, kernels, scratch memory.

Not to be read from a model's file. Numbers are of real cards where the table says so; elsewhere three MiB for
each multiprocessor, which fits those known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from orchestrator.core.entities import MIB

_MEASURED: Mapping[str, int] = {"H200": 594 * MIB, "H100": 597 * MIB}
"""What NVML showed at ready beyond llama.cpp's buffers (driver 580, CUDA 13.0): with all layers on the H100
596 to 602 MiB. In it are 2 or 3 MiB because CUDA gives each buffer in steps of two."""

_MULTIPROCESSORS: Mapping[str, int] = {
    "PRO 6000": 188, "RTX 5090": 170, "RTX 5080": 84, "RTX 5070 Ti": 70, "RTX 5070": 48, "RTX 5060 Ti": 36,
    "RTX 5060": 30, "RTX 4090": 128, "RTX 4080 SUPER": 80, "RTX 4080": 76, "RTX 4070 Ti SUPER": 66,
    "RTX 4070 Ti": 60, "RTX 4070 SUPER": 56, "RTX 4070": 46, "RTX 4060 Ti": 34, "RTX 4060": 24,
    "RTX 3090 Ti": 84, "RTX 3090": 82, "RTX 3080 Ti": 80, "RTX 3080": 68, "RTX 3070 Ti": 48, "RTX 3070": 46,
    "RTX 3060 Ti": 38, "RTX 3060": 28, "L40S": 142, "L40": 142, "L4": 58, "A100": 108, "A40": 84, "A10": 72,
}  # fmt: skip
"""By a part of the card's name; the longest that fits counts."""

_PER_MULTIPROCESSOR = 3 * MIB
UNKNOWN_CARD = 600 * MIB
LEAST = 100 * MIB

SCRATCH = 12 * MIB
"""The first long prompt: activations in 8 bits, partial sums. Measured on an H200 and an H100: 12 to 18 MiB,
also with a quantised cache, since flash attention's kernels need no cuBLAS."""
BLAS = 98 * MIB
"""cuBLAS, its workspace and kernels; where some weights are not quantised, as routers of experts never are.
The same on an H200 and an H100."""
LENT_LAYER = MIB * 9 // 10
"""Each layer in RAM whose large batches the GPU computes, once a long prompt came: a graph of its own.
Measured on an H100 with 12, 18 and 36 such layers of a dense model; with experts it was less."""


def context_bytes(gpu: str | None) -> int:
    """CUDA's context on a card of this name; None or an unknown one gets the most that was ever seen."""
    name = known_name(gpu)
    if name is None:
        return UNKNOWN_CARD
    return _MEASURED.get(name) or _MULTIPROCESSORS[name] * _PER_MULTIPROCESSOR


def known_name(gpu: str | None) -> str | None:
    """The table's name for a card as NVML calls it, or people do: 4090."""
    fitting = [
        name
        for name in (*_MEASURED, *_MULTIPROCESSORS)
        if gpu is not None and re.search(rf"\b{name}\b", f"RTX {gpu}", re.IGNORECASE)
    ]
    return max(fitting, key=len, default=None)
