"""How a model of the catalogue could be run otherwise, where its file tells what that would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from orchestrator.catalogue.read import Catalogue
from orchestrator.core.entities import Model
from orchestrator.core.preview import Alternatives
from orchestrator.estimate.alternatives import alternatives
from orchestrator.estimate.gguf_header import GgufError, read_gguf

TOLD = frozenset({"declared", "unknown"})
"""Sources of a footprint that no other parameters would change."""


def alternatives_of(
    catalogue: Catalogue, model: Model, parameters: Mapping[str, int] = MappingProxyType({})
) -> Alternatives | None:
    """What is less than the model with these parameters, which name one of its variants.

    None where nothing can predict what another way would take. Reads the file's header.
    """
    gguf = catalogue.ggufs.get(model.id)
    if gguf is None or model.demand.source in TOLD:
        return None
    try:
        header = read_gguf(gguf.path)
        projector = (read_gguf(gguf.mmproj),) if gguf.mmproj else ()
        plan = replace(gguf.plan, **parameters)  # type: ignore[arg-type]
        return alternatives(header, plan, lambda way: gguf.demand(way, header, *projector))
    except GgufError:
        return None  # it was there when the catalogue was read
