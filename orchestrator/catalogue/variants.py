"""Entries that leave the context or the layers to us, as entries that say it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.catalogue.placeholders import used
from orchestrator.catalogue.schema import ALL_LAYERS, AUTO, ModelEntry, ServiceEntry
from orchestrator.estimate.alternatives import CONTEXTS
from orchestrator.estimate.gguf_header import Header
from orchestrator.estimate.variants import contexts_of, layer_counts, ways


def auto_refused(entry: ModelEntry, service: ServiceEntry, *, is_demo: bool) -> tuple[str, str] | None:
    """(field, why it cannot be auto): only where a file tells what each way would take."""
    if not entry.is_auto or (service.memory == "gguf" and entry.memory is None and not is_demo):
        return None
    field = "context_size" if entry.context_size == AUTO else "n_gpu_layers"
    return field, (
        "auto needs a footprint that is predicted: a service with memory: gguf, a file that is no demo, and "
        "no memory declared here"
    )


def tunable(entry: ModelEntry, service: ServiceEntry, *, is_demo: bool) -> frozenset[str]:
    """Fields that would make it need less if they were less: where it is predicted, and they are told."""
    if entry.memory is not None or service.memory != "gguf" or is_demo:
        return frozenset()
    told = used((*service.texts(), *entry.environment.values()))
    fields = {"context_size": entry.context_size, "n_gpu_layers": entry.n_gpu_layers}
    return frozenset(name for name, value in fields.items() if name in told and value != AUTO)


def filled(
    entry: ModelEntry, header: Header | None, *, on_gpu: bool
) -> Iterator[tuple[Mapping[str, int], ModelEntry]]:
    """(what is set, the entry with that), the largest first; the entry itself where it says everything.

    In RAM all layers are where they are. A file that is not there is put down with the least.
    """
    if not entry.is_auto:
        yield {}, entry
        return
    fixed: dict[str, int] = {}
    contexts = contexts_of(header) if header else CONTEXTS[-1:]
    layers = layer_counts(header) if header and on_gpu else []
    if entry.n_gpu_layers == AUTO and not layers:
        fixed = {"n_gpu_layers": ALL_LAYERS}
    chosen = ways(
        contexts if entry.context_size == AUTO else [], layers if entry.n_gpu_layers == AUTO else []
    )
    for parameters in chosen or [{}]:
        yield parameters, entry.model_copy(update={**fixed, **parameters})
