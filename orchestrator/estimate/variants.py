"""The ways to run a GGUF model whose context or layers are left to us, the largest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.estimate.alternatives import CONTEXTS
from orchestrator.estimate.gguf_header import Header
from orchestrator.estimate.layers import all_layers

LAYER_STEPS = 16
"""So many numbers of layers are offered below all of them."""


def contexts_of(header: Header) -> Sequence[int]:
    """From the longest that it was trained for down to 4096; a header that does not say sets no limit."""
    trained = header.of("context_length") or CONTEXTS[0]
    return list(dict.fromkeys(min(size, trained) for size in CONTEXTS))


def layer_counts(header: Header) -> Sequence[int]:
    """From all of them, of which the output is one, down to none."""
    count = all_layers(header) + 1
    return [*range(count, 0, -max(1, count // LAYER_STEPS)), 0]


def ways(contexts: Sequence[int], layers: Sequence[int]) -> list[Mapping[str, int]]:
    """What each way sets; an empty sequence leaves that as it is.

    Layers on the GPU are worth more than context: a layer is left out only at the shortest one.
    """
    if not contexts or not layers:
        single = [{"context_size": size} for size in contexts] or [
            {"n_gpu_layers": count} for count in layers
        ]
        return list(single)
    whole = [{"context_size": size, "n_gpu_layers": layers[0]} for size in contexts]
    return [*whole, *({"context_size": contexts[-1], "n_gpu_layers": count} for count in layers[1:])]
