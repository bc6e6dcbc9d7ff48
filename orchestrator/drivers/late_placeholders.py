"""The placeholders that only the engine can fill: where a model must listen, and how it is split."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.core.entities import Device


def filled(text: str, port: int, gpus: Sequence[Device]) -> str:
    """`{tensor_split}` gives each GPU the same share, as was reserved; without a GPU there is one share."""
    split = ",".join("1" * max(1, len(gpus)))
    return text.replace("{port}", str(port)).replace("{tensor_split}", split)
