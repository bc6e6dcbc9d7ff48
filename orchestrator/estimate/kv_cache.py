"""What is remembered of conversations: the KV cache of attention, the state of recurrent layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from orchestrator.estimate.ggml_types import CACHE_TYPES, row_bytes
from orchestrator.estimate.layers import Layer
from orchestrator.estimate.offload import Offload
from orchestrator.estimate.plan import Plan, padded

_F32 = 4


def placed_cache(layers: Sequence[Layer], plan: Plan, offload: Offload) -> Mapping[str, int]:
    """Bytes of cache and state by device: each layer's are where the layer is."""
    total: Counter[str] = Counter()
    for number, layer in enumerate(layers):
        total[offload.of(number)] += cache_bytes(layer, plan) + state_bytes(layer, plan)
    return total


def cache_bytes(layer: Layer, plan: Plan) -> int:
    """One layer's keys and values, of all slots."""
    key = row_bytes(CACHE_TYPES[plan.cache_type_k], layer.key)
    value = row_bytes(CACHE_TYPES[plan.cache_type_v], layer.value)
    return plan.streams * cells_of(layer, plan) * (key + value)


def cells_of(layer: Layer, plan: Plan) -> int:
    """Tokens that a layer keeps for each stream: of a window one for each slot sharing it, and a batch."""
    if not layer.window:
        return plan.cells
    sharing = plan.parallel if plan.unified else 1
    return padded(min(plan.cells, layer.window * sharing + plan.micro_batch))


def state_bytes(layer: Layer, plan: Plan) -> int:
    """One layer's recurrent state; every slot has its own, whatever the context."""
    return _F32 * layer.state * plan.parallel
