"""Entries that leave the context or the layers to us, as entries that say it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from orchestrator.catalogue.placeholders import used
from orchestrator.catalogue.schema import ALL_LAYERS, AUTO, ModelEntry, ServiceEntry
from orchestrator.estimate.alternatives import CONTEXTS
from orchestrator.estimate.gguf_header import Header
from orchestrator.estimate.variants import contexts_of, layer_counts, ways

TUNABLE = ("context_size", "n_gpu_layers")
LLAMA_CPP = {"context_size": "LLAMA_ARG_CTX_SIZE", "n_gpu_layers": "LLAMA_ARG_N_GPU_LAYERS"}


def auto_refused(entry: ModelEntry, service: ServiceEntry, *, is_demo: bool) -> tuple[str, str] | None:
    """(field, why it cannot be auto): a file must tell what each way takes, and the service be told which."""
    fields = [field for field in TUNABLE if getattr(entry, field) == AUTO]
    if fields and (service.memory != "gguf" or entry.memory is not None or is_demo):
        return fields[0], (
            "auto needs a footprint that is predicted: a service with memory: gguf, a file that is no demo, "
            "and no memory declared here"
        )
    told = told_to(entry, service)
    for field in fields:
        if field not in told:
            return field, (
                f"auto needs a service that is told what was chosen, and '{entry.service}' does not use "
                f'{{{field}}}. Let it pass that on, for llama.cpp as {LLAMA_CPP[field]}: "{{{field}}}"'
            )
    return None


def tunable(entry: ModelEntry, service: ServiceEntry, *, is_demo: bool) -> frozenset[str]:
    """Fields that would make it need less if they were less: where it is predicted, and they are told."""
    if entry.memory is not None or service.memory != "gguf" or is_demo:
        return frozenset()
    told = told_to(entry, service)
    return frozenset(field for field in TUNABLE if field in told and getattr(entry, field) != AUTO)


def told_to(entry: ModelEntry, service: ServiceEntry) -> frozenset[str]:
    """The placeholders that it is started with."""
    return used((*service.texts(), *entry.environment.values()))


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
