"""How much memory a GGUF model will take, by device and component, predicted from its header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from orchestrator.core.entities import MIB, Demand, Split
from orchestrator.estimate.compute import gpu_compute, host_compute
from orchestrator.estimate.context import BLAS, LEAST, LENT_LAYER, SCRATCH, context_bytes, known_name
from orchestrator.estimate.gguf_header import Header
from orchestrator.estimate.kv_cache import placed_cache
from orchestrator.estimate.layers import HYBRID, RECURRENT, UNFAMILIAR, layers_of, run_layers
from orchestrator.estimate.offload import HOST, Offload, offload_of
from orchestrator.estimate.plan import Plan
from orchestrator.estimate.weights import placed_weights

SOURCE = "predicted"
EVEN_SPLIT = "even_split"

CUDA_HOST = 256 * MIB  # CUDA's libraries and pinned buffers in RAM
PROCESS = 32 * MIB  # an interpreter and llama.cpp, beside the model
PROJECTOR_SCRATCH = 128 * MIB  # one picture; large ones take more

_UNQUANTISED = frozenset({0, 1, 30})


@dataclass(frozen=True)
class Footprint:
    """Bytes. `breakdown` is by device (`gpu0` and so on, `host`), then by component.

    `total` is what all GPUs take together, or RAM where there is no GPU, after a first long prompt. `low`
    and `high` are the bounds within which it should be.
    """

    total: int
    low: int
    high: int
    breakdown: Mapping[str, Mapping[str, int]]
    source: str = SOURCE

    def on(self, device: str) -> int:
        return sum(self.breakdown.get(device, {}).values())


def predict(
    header: Header, plan: Plan, projector: Header | None = None, draft: Header | None = None
) -> Footprint:
    """The memory of a model that is run as `plan` says, with the projector and the draft model it may have.

    The projector and the draft model are on the first GPU. Senseless metadata gives a senseless number, but
    always one.
    """
    offload = offload_of(header, plan)
    breakdown: dict[str, dict[str, int]] = {device: {} for device in (*offload.gpus, HOST)}
    for device, component, size in _model(header, plan, offload):
        breakdown[device][component] = size
    first = offload.gpus[0] if offload.gpus else HOST
    if projector is not None:
        breakdown[first]["projector"] = projector.tensor_bytes + _projector_working(projector)
    if draft is not None:
        _add_draft(breakdown, predict(draft, replace(plan, prompt_cache_bytes=0, n_cpu_moe=0)))
    return _with_bounds(header, plan, breakdown, offload)


def _model(header: Header, plan: Plan, offload: Offload) -> Iterator[tuple[str, str, int]]:
    """(device, component, bytes)"""
    layers = layers_of(header)
    weights, cache = placed_weights(header, plan, offload), placed_cache(layers, plan, offload)
    for gpu in offload.gpus:
        yield gpu, "weights", weights.get(gpu, 0)
        yield gpu, "kv_cache", cache.get(gpu, 0)
        yield gpu, "compute", gpu_compute(header, layers, plan, offload, gpu)
        yield gpu, "cuda_context", context_bytes(plan.gpu)
        yield gpu, "first_prompt", _first_prompt(header, offload, gpu, len(layers))
    yield HOST, "weights", weights.get(HOST, 0)
    yield HOST, "kv_cache", cache.get(HOST, 0)
    yield HOST, "compute", host_compute(header, layers, plan, offload)
    yield HOST, "process", PROCESS + (CUDA_HOST if offload.gpus else 0)
    if plan.prompt_cache_bytes:
        yield HOST, "prompt_cache", plan.prompt_cache_bytes


def _first_prompt(header: Header, offload: Offload, gpu: str, layers: int) -> int:
    """What the first long prompt adds on one GPU; the first one also computes for the layers in RAM."""
    blas = BLAS if header.matrix_kinds & _UNQUANTISED else 0
    lent = offload.on_host(layers) if gpu == offload.gpus[0] else 0
    return SCRATCH + blas + lent * LENT_LAYER


def _projector_working(projector: Header) -> int:
    """One picture's patches through one layer of the vision tower."""
    patch = max(1, projector.of("vision.patch_size", 14))
    patches = min((projector.of("vision.image_size", 0) // patch) ** 2, 1 << 14)
    widths = 4 * projector.of("vision.embedding_length") + 3 * projector.of("vision.feed_forward_length")
    return PROJECTOR_SCRATCH + 4 * patches * min(widths, 1 << 20)


def _add_draft(breakdown: Mapping[str, dict[str, int]], draft: Footprint) -> None:
    """Its weights, cache and buffers; the process and its context are there already."""
    kept = ("weights", "kv_cache", "compute")
    for device, parts in draft.breakdown.items():
        size = sum(parts.get(part, 0) for part in kept)
        if size:
            breakdown[device]["draft"] = size


def _with_bounds(
    header: Header, plan: Plan, breakdown: Mapping[str, Mapping[str, int]], offload: Offload
) -> Footprint:
    """1 % to each side, and what is known less well: odd architectures, pictures, lent layers, a new card."""
    devices = offload.gpus or (HOST,)
    total = sum(sum(breakdown[device].values()) for device in devices)
    parts = {
        name: sum(breakdown[device].get(name, 0) for device in devices) for name in ("compute", "projector")
    }
    either = total // 100 + parts["projector"] // 4
    if header.architecture in HYBRID | RECURRENT:
        either += parts["compute"] // 2
    below = either
    if offload.gpus:
        below += offload.on_host(run_layers(header)) * LENT_LAYER
    if offload.gpus and known_name(plan.gpu) is None:
        below += sum(breakdown[gpu]["cuda_context"] - LEAST for gpu in offload.gpus)
    above = either + (total // 4 if header.architecture in UNFAMILIAR else 0)
    return Footprint(total, max(0, total - below), total + above, breakdown)


def demand_of(footprint: Footprint) -> Demand:
    """The same for the planner, which gives every GPU of a split the same: what the fullest one needs."""
    gpus = [device for device in footprint.breakdown if device != HOST]
    return Demand(
        gpu_bytes=each_gpu_bytes(footprint) * len(gpus),
        host_bytes=footprint.on(HOST),
        source=footprint.source,
        breakdown=evened(footprint),
    )


def each_gpu_bytes(footprint: Footprint) -> int:
    """What the fullest GPU carries; 0 without any."""
    return max((footprint.on(device) for device in footprint.breakdown if device != HOST), default=0)


def evened(footprint: Footprint) -> Mapping[str, Mapping[str, int]]:
    """The parts, and on each GPU but the fullest what it is given beyond them."""
    each = each_gpu_bytes(footprint)
    over = {device: each - footprint.on(device) for device in footprint.breakdown if device != HOST}
    return {
        device: {**parts, EVEN_SPLIT: over[device]} if over.get(device) else parts
        for device, parts in footprint.breakdown.items()
    }


def demand_over(footprints: Sequence[Footprint]) -> Demand:
    """The first of them, and what it is otherwise; they are of a split over 1, 2, … GPUs."""
    splits = (
        Split(each_gpu_bytes(found), found.on(HOST), found.source, evened(found)) for found in footprints
    )
    return replace(demand_of(footprints[0]), splits=tuple(splits))
