"""Which device each layer is on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from orchestrator.estimate.gguf_header import Header
from orchestrator.estimate.layers import all_layers
from orchestrator.estimate.plan import Plan

HOST = "host"


def gpu_name(index: int) -> str:
    """How the index-th GPU of a plan is called in a breakdown."""
    return f"gpu{index}"


@dataclass(frozen=True)
class Offload:
    """`layers` has the device of each layer, and behind them that of the output."""

    layers: tuple[str, ...]
    gpus: tuple[str, ...]

    @property
    def output(self) -> str:
        return self.layers[-1]

    @property
    def is_full(self) -> bool:
        return HOST not in self.layers

    def of(self, layer: int) -> str:
        """The device of a layer; of one that nobody announced, the output's."""
        return self.layers[layer] if layer < len(self.layers) else self.output

    def on_host(self, layers: int) -> int:
        """How many of so many layers stay in RAM."""
        return sum(self.of(number) == HOST for number in range(layers))


def offload_of(header: Header, plan: Plan) -> Offload:
    """llama.cpp fills GPUs from the end: the output first, then the last layers."""
    count = all_layers(header) + 1
    on_gpu = min(plan.n_gpu_layers, count) if plan.on_gpu else 0
    gpus = tuple(gpu_name(index) for index in range(len(plan.split))) if plan.on_gpu else ()
    begin = count - on_gpu
    devices = [HOST] * begin + [gpus[_share(plan.split, place / on_gpu)] for place in range(on_gpu)]
    return Offload(tuple(devices), gpus)


def _share(split: Sequence[float], place: float) -> int:
    """Whose part of the whole a place from 0 to 1 is in."""
    total = sum(split)
    bounds = [part / total for part in accumulate(split)]
    return min(bisect_right(bounds, place), len(split) - 1)
