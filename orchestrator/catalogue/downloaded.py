"""Models that were downloaded through the server: catalogue entries of their own kind, in no file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from orchestrator.catalogue.files import Found
from orchestrator.catalogue.read import GGUF_SERVICE, Catalogue, build_models
from orchestrator.catalogue.schema import ModelEntry
from orchestrator.core.entities import Device, Download, DownloadState, Model
from orchestrator.hub.cache import RepoCache, hub_folder
from orchestrator.settings import Settings


def with_downloads(
    written: Catalogue,
    settings: Settings,
    downloads: Iterable[Download],
    *,
    on_gpu: bool,
    gpus: Sequence[Device] = (),
) -> Catalogue:
    """The catalogue of the files, and the downloaded models that no name of it stands for."""
    taken = {name for model in written.models.values() for name in (model.id, *model.aliases)}
    own = {
        download.model: download
        for download in sorted(downloads, key=lambda download: download.model)
        if not download.is_listed and download.state is not DownloadState.REMOVING
    }
    entries = {}
    for name, download in own.items():
        if name in taken or GGUF_SERVICE not in written.services:
            continue
        aliases = (download.alias,) if download.alias and download.alias not in {*taken, *own} else ()
        taken |= {name, *aliases}
        entries[name] = entry_of(download, aliases)
    models, files, ggufs = build_models(settings, written.services, entries, on_gpu=on_gpu, gpus=gpus)
    models = {name: explained(model, own[name]) for name, model in models.items()}
    return replace(
        written,
        models={**written.models, **models},
        files={**written.files, **files},
        ggufs={**written.ggufs, **ggufs},
        problems=(*written.problems, *(f"{m.id}: {m.problem}" for m in models.values() if m.problem)),
        only_demos=written.only_demos and not models,
    )


def entry_of(download: Download, aliases: tuple[str, ...]) -> ModelEntry:
    """Served with the defaults, from the revision that was downloaded, whatever `main` is now."""
    found = found_of(download)
    return ModelEntry(
        service=GGUF_SERVICE,
        path=str(found.path),
        mmproj=str(found.mmproj) if found.mmproj else None,
        aliases=aliases,
        description=f"Downloaded from {download.repo}.",
    )


def found_of(download: Download) -> Found:
    cache = RepoCache(hub_folder(), download.repo)
    mmproj = cache.place(download.commit, download.mmproj) if download.mmproj else None
    return Found(cache.place(download.commit, download.path), mmproj)


def files_of(download: Download) -> list[Path]:
    """Where all of its files have their names, unless it is about to lose them."""
    cache = RepoCache(hub_folder(), download.repo)
    is_going = download.state is DownloadState.REMOVING
    return [] if is_going else [cache.place(download.commit, file.path) for file in download.files]


def explained(model: Model, download: Download) -> Model:
    if download.state is DownloadState.RUNNING:
        return replace(model, problem="It is still being downloaded.")
    if model.problem is None:
        return model
    again = f"orchestrator rm {model.id}` and `orchestrator pull {model.id}"
    return replace(model, problem=f"{model.problem} Download it again with `{again}`.")
