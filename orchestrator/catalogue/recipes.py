"""By what a model's measured memory is remembered."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from orchestrator.catalogue.schema import ModelEntry, ServiceEntry
from orchestrator.core.entities import Recipe
from orchestrator.estimate.plan import Plan

HEAD_BYTES = 1 << 20


def recipe_of(entry: ModelEntry, service: ServiceEntry, files: Iterable[Path], plan: Plan) -> Recipe | None:
    """None for what runs without a GPU, or whose files cannot be read.

    Environment and commands count as they are written, with their placeholders: where a file lies changes
    nothing.
    """
    if not plan.on_gpu:
        return None
    runs = {
        "image": service.image,
        "command": service.command,
        "container_command": service.container_command,
        "environment": {**service.environment, **entry.environment},
        "container_environment": {**service.container_environment, **entry.environment},
    }
    try:
        content = "+".join(fingerprint(file) for file in files)
    except OSError:
        return None
    return Recipe(
        content=content,
        service=hashlib.sha256(json.dumps(runs, sort_keys=True).encode()).hexdigest()[:32],
        context_size=plan.context_size,
        n_gpu_layers=plan.n_gpu_layers,
        parallel=plan.parallel,
        cache_type_k=plan.cache_type_k,
        cache_type_v=plan.cache_type_v,
        gpus=len(plan.split),
    )


def fingerprint(file: Path) -> str:
    """Its size and the hash of its first MiB, which has a GGUF's header: the same for every copy of it."""
    with file.open("rb") as opened:
        head = opened.read(HEAD_BYTES)
    return f"{file.stat().st_size}-{hashlib.sha256(head).hexdigest()[:32]}"
