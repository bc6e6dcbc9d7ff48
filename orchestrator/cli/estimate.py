"""`estimate`: what a file or a model of the catalogue will take, as a table or as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.catalogue.gguf import Gguf
from orchestrator.catalogue.read import read_catalogue
from orchestrator.cli import show
from orchestrator.cli.talk import FAILED, UNUSABLE, fail
from orchestrator.core.entities import MIB, Model
from orchestrator.core.errors import CatalogueError, UnknownModel
from orchestrator.estimate.context import known_name
from orchestrator.estimate.footprint import Footprint, predict
from orchestrator.estimate.ggml_types import CACHE_TYPES
from orchestrator.estimate.gguf_header import GgufError, Header, read_gguf
from orchestrator.estimate.plan import ALL_LAYERS, Plan
from orchestrator.settings import load_settings

CONTEXT_SIZE = 8192
NO_GPU = "none"
PROJECTOR = "clip"
AUTO = "A load takes the most that fits then; `orchestrator plan` asks the server what that would be now."


def estimate(
    target: str,
    config: Path | None,
    changes: Mapping[str, object],
    *,
    gpu: str | None,
    mmproj: Path | None,
    as_json: bool,
) -> None:
    """`changes` are fields of the plan; those that are None stay as they are."""
    check(changes, gpu)
    found, model = find(target, config)
    given = {key: value for key, value in changes.items() if value is not None}
    projector_file = mmproj or found.mmproj
    plan = replace(found.plan, **given, **({} if gpu is None else {"gpu": gpu, "on_gpu": gpu != NO_GPU}))  # type: ignore[arg-type]
    try:
        projector = read_projector(projector_file) if projector_file else None
        footprint = predict(read_model(found.path), plan, projector)
    except GgufError as error:
        fail(str(error), FAILED)
    if as_json:
        show.print_json(as_view(plan, footprint))
    else:
        show.draw(screen(found.path, plan, footprint))
        for line in remarks(model, given) if model else ():
            show.say(line)


def remarks(model: Model, given: Mapping[str, object]) -> Iterator[str]:
    """What else its entry says of its memory."""
    chosen = model.variants[-1].parameters if model.variants else {}
    if left := [key for key in chosen if key not in given]:
        yield f"Its entry says auto for {' and '.join(left)}: this is the least. {AUTO}"
    if model.demand.source == "declared":
        yield f"Its entry declares its memory, and that counts: {said(model)}."


def check(changes: Mapping[str, object], gpu: str | None) -> None:
    """Ends with a sentence where options have senseless values, or do not go together."""
    for key in ("cache_type_k", "cache_type_v"):
        kind = changes.get(key)
        if kind is not None and kind not in CACHE_TYPES:
            fail(
                f"--{key.replace('_', '-')}: got '{kind}', expected one of {', '.join(CACHE_TYPES)}", UNUSABLE
            )
    if gpu == NO_GPU and changes.get("split") is not None:
        fail(f"--gpus: there are none with --gpu {NO_GPU}", UNUSABLE)


def read_model(path: Path) -> Header:
    """Raises GgufError."""
    header = read_gguf(path)
    if header.architecture == PROJECTOR:
        raise GgufError(f"{path} is a projector: name its model's file, and this one with --mmproj.")
    return header


def read_projector(path: Path) -> Header:
    """Raises GgufError."""
    header = read_gguf(path)
    if header.architecture != PROJECTOR:
        raise GgufError(f"{path} is no projector: its architecture is '{header.architecture}', not 'clip'.")
    return header


def find(target: str, config: Path | None) -> tuple[Gguf, Model | None]:
    """A file that is there or looks like one, else the model of that name."""
    path = Path(target).expanduser()
    if path.exists() or path.suffix.lower() == ".gguf" or "/" in target:
        return Gguf(path, None, Plan(CONTEXT_SIZE)), None
    try:
        catalogue = read_catalogue(load_settings(config))
        model = catalogue.resolve(target)
    except UnknownModel as error:
        fail(f"There is no file '{target}' here. {error.message}", FAILED)
    except CatalogueError as error:
        fail(error.message, UNUSABLE)
    gguf = catalogue.ggufs.get(model.id)
    if gguf is None:
        fail(
            model.problem or f"'{model.id}' has no GGUF file to read; it is put down with {said(model)}.",
            FAILED,
        )
    return gguf, model


def said(model: Model) -> str:
    return f"{model.demand.gpu_bytes / MIB:.0f} MiB of GPU and {model.demand.host_bytes / MIB:.0f} MiB of RAM"


def as_view(plan: Plan, footprint: Footprint) -> dict[str, object]:
    """In MiB, with the settings that it holds for."""
    return {
        "gpu": plan.gpu,
        "context_size": plan.context_size,
        "n_gpu_layers": "all" if plan.n_gpu_layers >= ALL_LAYERS else plan.n_gpu_layers,
        "parallel": plan.parallel,
        "cache_type_k": plan.cache_type_k,
        "cache_type_v": plan.cache_type_v,
        "gpus": len(plan.split) if plan.on_gpu else 0,
        "total_mib": mib(footprint.total),
        "low_mib": mib(footprint.low),
        "high_mib": mib(footprint.high),
        "source": footprint.source,
        "breakdown": {
            device: {component: mib(size) for component, size in parts.items() if size}
            for device, parts in footprint.breakdown.items()
        },
    }


def mib(size: int) -> float:
    return round(size / MIB, 1)


def screen(path: Path, plan: Plan, footprint: Footprint) -> RenderableType:
    devices = list(footprint.breakdown)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("MiB")
    for device in devices:
        table.add_column("RAM" if device == "host" else device, justify="right")
    components = dict.fromkeys(name for parts in footprint.breakdown.values() for name in parts)
    for name in components:
        cells = [footprint.breakdown[device].get(name, 0) for device in devices]
        if any(cells):
            table.add_row(name.replace("_", " "), *(f"{cell / MIB:.0f}" if cell else "" for cell in cells))
    table.add_row("together", *(f"{footprint.on(device) / MIB:.0f}" for device in devices), style="bold")
    return Group(
        Text(f"{path.name}: {plan.context_size} tokens, {slots_text(plan)}, {cache_text(plan)}"),
        Text(),
        table,
        Text(),
        Text(conclusion(plan, footprint)),
    )


def slots_text(plan: Plan) -> str:
    return "1 slot" if plan.parallel == 1 else f"{plan.parallel} slots"


def cache_text(plan: Plan) -> str:
    if plan.cache_type_k == plan.cache_type_v:
        return f"{plan.cache_type_k} cache"
    return f"{plan.cache_type_k} keys, {plan.cache_type_v} values"


def conclusion(plan: Plan, footprint: Footprint) -> str:
    gpus = sum(device != "host" for device in footprint.breakdown)
    where = "in RAM" if not plan.on_gpu else "on the GPU" if gpus == 1 else f"on {gpus} GPUs together"
    bounds = f"between {footprint.low / MIB:.0f} and {footprint.high / MIB:.0f}"
    text = f"{footprint.total / MIB:.0f} MiB {where}, {bounds} ({footprint.source})."
    if plan.on_gpu and known_name(plan.gpu) is None:
        named = f"'{plan.gpu}' is not known here" if plan.gpu else "Name the card with --gpu"
        text += f" {named}: CUDA's own share differs between cards, and the largest known is counted."
    return text
