"""Other ways to run a GGUF model that take less memory: a shorter context, a smaller cache, fewer layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

from orchestrator.core.entities import Demand
from orchestrator.core.preview import Alternatives
from orchestrator.estimate.ggml_types import CACHE_TYPES, row_bytes
from orchestrator.estimate.gguf_header import Header
from orchestrator.estimate.layers import all_layers
from orchestrator.estimate.plan import Plan

CONTEXTS = tuple(1024 * size for size in (256, 128, 64, 32, 16, 8, 4))
CACHES = ("q8_0", "q4_0")
_ROW = 256


def alternatives(header: Header, plan: Plan, demand: Callable[[Plan], Demand]) -> Alternatives:
    """The ways that take less than `plan`, by what is changed; `demand` says what one needs."""

    @cache
    def needed(changes: tuple[tuple[str, int | str], ...]) -> Demand:
        return demand(replace(plan, **dict(changes)))  # type: ignore[arg-type]

    contexts = [{"context_size": size} for size in shorter_contexts(plan.context_size)]
    caches = [{"cache_type_k": kind, "cache_type_v": kind} for kind in smaller_caches(plan)]
    layers = [{"n_gpu_layers": count} for count in fewer_layers(header, plan)]
    return Alternatives((contexts, caches, layers), lambda changes: needed(tuple(changes.items())))


def shorter_contexts(context_size: int) -> Iterator[int]:
    return (size for size in CONTEXTS if size < context_size)


def smaller_caches(plan: Plan) -> Iterator[str]:
    own = row_size(plan.cache_type_k) + row_size(plan.cache_type_v)
    return (kind for kind in CACHES if 2 * row_size(kind) < own)


def row_size(kind: str) -> int:
    return row_bytes(CACHE_TYPES[kind], _ROW)


def fewer_layers(header: Header, plan: Plan) -> Iterator[int]:
    """The output counts as a layer."""
    if not plan.on_gpu:
        return iter(())
    return iter(range(min(plan.n_gpu_layers, all_layers(header) + 1) - 1, -1, -1))
