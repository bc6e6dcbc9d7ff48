"""`learned`: what loads have shown of models' memory, straight from the database."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from orchestrator.catalogue.read import read_catalogue
from orchestrator.cli import show
from orchestrator.cli.database import explained, find
from orchestrator.cli.talk import FAILED, fail, talking_to
from orchestrator.cli.where import Where
from orchestrator.core import learned as core
from orchestrator.core.entities import MIB, ModelId, Recipe
from orchestrator.core.errors import CatalogueError, DatabaseInUse
from orchestrator.core.learned import Learned, learned_view, newest_first
from orchestrator.settings import load_settings
from orchestrator.store import learned as store

ALL = "all"


def list_all(config: Path | None, database: Path | None, *, as_json: bool) -> None:
    path = find(config, database)
    with explained():
        known = store.look(path)
    names = models_by_recipe(config)
    newest = newest_first(known)
    if as_json:
        show.print_json({"learned": learned_view(known, names)})
    elif newest:
        show.draw(table(newest, names, time.time()))
    else:
        show.say("Nothing was learned yet: a model must have been ready on a GPU.")


def forget(target: str, where: Where, database: Path | None) -> None:
    """By a server that has the database it is asked of that."""
    path = find(where.config, database)
    with explained():
        known = store.look(path)
        keys = matching(target, known, models_by_recipe(where.config))
        if not keys:
            fail(f"Nothing was learned of '{target}'. `orchestrator learned list` shows what was.", FAILED)
        try:
            store.forget(path, keys)
        except DatabaseInUse:
            with talking_to(where) as client:
                if not is_of(client.learned(), [known[key] for key in keys]):
                    fail(
                        f"A server runs with the database {path}, and it is not the one at {client.url}. "
                        "Name its address with --url.",
                        FAILED,
                    )
                for key in keys:
                    client.forget_learned(key)
    show.say("1 row is forgotten." if len(keys) == 1 else f"{len(keys)} rows are forgotten.")


def is_of(told: Iterable[Mapping[str, Any]], rows: Iterable[Learned]) -> bool:
    """Whether the server that told of its rows has these: of the same attempts, since a key alone can be that
    of the same model on another server too."""
    theirs = {row["key"]: {load["attempt"] for load in row["loads"]} for row in told}
    ours = {row.key: {load.attempt for load in row.loads} for row in rows}
    return all(
        key in theirs and (not attempts or not attempts.isdisjoint(theirs[key]))
        for key, attempts in ours.items()
    )


def matching(target: str, known: Mapping[str, Learned], names: Mapping[Recipe, list[ModelId]]) -> list[str]:
    """Keys of the rows that are meant. A key may be cut short, as long as it is clear."""
    if target == ALL:
        return list(known)
    of_model = [key for key, row in known.items() if target in names.get(row.recipe, [])]
    begun = [key for key in known if len(target) >= 6 and key.startswith(target)]
    return of_model or (begun if len(begun) == 1 else [])


def models_by_recipe(config: Path | None) -> dict[Recipe, list[ModelId]]:
    """Models of the catalogue's files; none where it has errors, since rows can be listed without names."""
    try:
        models = read_catalogue(load_settings(config), on_gpu=True).models
    except CatalogueError:
        return {}
    return core.models_by_recipe(models.values())


def table(rows: list[Learned], names: Mapping[Recipe, list[ModelId]], now: float) -> Table:
    table = show.new_table(
        "KEY", "MODELS", "CARD", "CONTEXT", "CACHE", "LOADS", "BELIEVED", "PREDICTED", "SEEN", "LAST"
    )
    for row in rows:
        peak = max((load.peak_bytes for load in row.loads), default=0)
        table.add_row(
            row.key[:8],
            ", ".join(names.get(row.recipe, [])) or "-",
            row.card if row.recipe.gpus == 1 else f"{row.recipe.gpus} × {row.card}, on each:",
            str(row.recipe.context_size),
            f"{row.recipe.cache_type_k}/{row.recipe.cache_type_v}",
            str(len(row.loads)),
            str(len(row.believed())),
            f"{row.predicted_bytes / MIB:.0f} MiB",
            f"{peak / MIB:.0f} MiB" if peak else f"above {row.floor_bytes / MIB:.0f} MiB",
            f"{show.duration(now - row.at)} ago" if row.at else "-",
        )
    return table
