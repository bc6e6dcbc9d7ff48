"""A model whose footprint is told by its GGUF file, and what its entry says beside that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.core.entities import Demand
from orchestrator.estimate.footprint import demand_of, demand_over, predict
from orchestrator.estimate.gguf_header import Header
from orchestrator.estimate.plan import Plan


@dataclass(frozen=True)
class Gguf:
    """Its files, and how its service will be told to run it.

    `counts` are over how many of the GPUs that are here it may be split, where that is left to us;
    `told` are the placeholders that it is started with, `host_bytes` is the RAM that its entry declares.
    """

    path: Path
    mmproj: Path | None
    plan: Plan
    told: frozenset[str] = frozenset()
    counts: tuple[int, ...] = ()
    host_bytes: int | None = None

    def demand(self, plan: Plan, header: Header, *projector: Header) -> Demand:
        """What it needs when it is run by this plan."""
        if plan.on_gpu and len(self.counts) > 1:
            ways = (replace(plan, split=(1.0,) * count) for count in self.counts)
            demand = demand_over([predict(header, way, *projector) for way in ways])
        else:
            demand = demand_of(predict(header, plan, *projector))
        if self.host_bytes is None or not plan.on_gpu:
            return demand
        splits = tuple(replace(split, host_bytes=self.host_bytes) for split in demand.splits)
        return replace(demand, host_bytes=self.host_bytes, splits=splits)
