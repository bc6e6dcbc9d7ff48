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

    Only what its service is told: else it would run as before, and take more than is reserved. None where
    nothing can predict what another way would take. Reads the file's header.
    """
    gguf = catalogue.ggufs.get(model.id)
    if gguf is None or model.demand.source in TOLD:
        return None
    try:
        header = read_gguf(gguf.path)
        projector = (read_gguf(gguf.mmproj),) if gguf.mmproj else ()
        plan = replace(gguf.plan, **parameters)  # type: ignore[arg-type]
        found = alternatives(header, plan, lambda way: gguf.demand(way, header, *projector))
        return replace(
            found, kinds=[[way for way in kind if way.keys() <= gguf.told] for kind in found.kinds]
        )
    except GgufError:
        return None  # it was there when the catalogue was read
