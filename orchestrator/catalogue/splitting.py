"""Over how many GPUs a model may go, and whether its service can be told so."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.catalogue.schema import MOST_GPUS, ModelEntry, ServiceEntry
from orchestrator.catalogue.variants import told_to
from orchestrator.core.entities import HOST


def gpus_of(entry: ModelEntry) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(where it may go, over how many GPUs). A list of GPUs means all of them."""
    if isinstance(entry.gpus, tuple):
        return entry.gpus, (max(1, len(entry.gpus)),)
    if entry.gpus == "auto":
        return (), tuple(range(1, MOST_GPUS + 1))
    return ((HOST,), (1,)) if entry.gpus == 0 else ((), (entry.gpus,))


def unsaid_splits(entries: Mapping[str, ModelEntry], services: Mapping[str, ServiceEntry]) -> list[str]:
    """Models that are split evenly here, and by llama.cpp's own measure there: it would overfill a GPU."""
    return [
        f"{name}: it may be split over several GPUs, and the service '{entry.service}' does not say how. Let "
        'it pass {tensor_split}, for llama.cpp as LLAMA_ARG_TENSOR_SPLIT: "{tensor_split}".'
        for name, entry in entries.items()
        if max(gpus_of(entry)[1]) > 1
        and entry.service in services
        and services[entry.service].memory == "gguf"
        and "tensor_split" not in told_to(entry, services[entry.service])
    ]
