"""How a model of the catalogue could be run otherwise, where its file tells what that would take."""

from __future__ import annotations

from orchestrator.catalogue.read import Catalogue
from orchestrator.core.entities import Model
from orchestrator.core.preview import Alternatives
from orchestrator.estimate.alternatives import alternatives
from orchestrator.estimate.gguf_header import GgufError, read_gguf

TOLD = frozenset({"declared", "unknown"})
"""Sources of a footprint that no other parameters would change."""


def alternatives_of(catalogue: Catalogue, model: Model) -> Alternatives | None:
    """None where nothing can predict what another way would take. Reads the file's header."""
    gguf = catalogue.ggufs.get(model.id)
    if gguf is None or model.demand.source in TOLD:
        return None
    try:
        projector = read_gguf(gguf.mmproj) if gguf.mmproj else None
        return alternatives(read_gguf(gguf.path), gguf.plan, projector)
    except GgufError:
        return None  # it was there when the catalogue was read
