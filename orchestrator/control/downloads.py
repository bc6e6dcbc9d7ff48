"""Downloads as users see them: asked for, joined, cancelled, removed; and gone on with after a restart.

The loop folds and saves what becomes of them, each before it is done. Here are the effects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from orchestrator.control.loop import Loop
from orchestrator.control.operations import Outcome
from orchestrator.control.ports import Hub, Wanted
from orchestrator.core.entities import Download, DownloadState, ModelId
from orchestrator.core.errors import HubError, NotDownloadable, OrchestratorError, UnknownModel
from orchestrator.core.events import (
    DownloadAsked,
    DownloadEnded,
    DownloadProgressed,
    DownloadRemoved,
    Event,
    NothingToDownload,
    RemovalAsked,
)

LONGEST_UNLOAD_S = 86_400.0


class Renew(Protocol):
    def __call__(self, *news: Event) -> Awaitable[None]: ...


class Downloads:
    """Begins, joins and ends them.

    `listed` says what the catalogue's files want from the hub for a model: None where they do not name it,
    or it raises NotDownloadable. `renew` makes the catalogue anew from the downloads there are, and has
    it count together with the news. `files_of_others` are those of all models but one.
    """

    def __init__(
        self,
        loop: Loop,
        hub: Hub,
        *,
        listed: Callable[[str], Wanted | None],
        renew: Renew,
        files_of_others: Callable[[ModelId], Collection[Path]],
    ) -> None:
        self._loop = loop
        self._hub = hub
        self._listed = listed
        self._renew = renew
        self._files_of_others = files_of_others
        self._deciding = asyncio.Lock()  # what was looked at must still be so when it is asked for
        self._beginning: dict[ModelId, asyncio.Task[Outcome]] = {}
        self._under_way: dict[ModelId, asyncio.Task[None]] = {}
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Go on with what an earlier life of the server left, and with what is asked for, until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            for download in self._loop.snapshot.downloads.values():
                self._go_on(download)
            await asyncio.Event().wait()

    def _go_on(self, download: Download) -> None:
        assert self._group is not None
        match download.state:
            case DownloadState.RUNNING:
                work = self._fetch(download)
            case DownloadState.REMOVING:
                work = self._take_away(download)
            case DownloadState.COMPLETE:
                return
        self._under_way[download.model] = self._group.create_task(work, name=f"download {download.model}")

    # --- asking

    async def ask(self, name: str) -> Outcome:
        """Want the model's files: OWNER/NAME[:QUANT], or a model of the catalogue's files whose source is
        the hub. Returns once that is decided and saved. What runs is joined; what is there is a success.

        Raises HubError.
        """
        known = self._known(name)
        if known is not None and known.state is not DownloadState.COMPLETE:
            return self._join_download(known)
        wanted = self._listed(name) or Wanted(name)
        model = known.model if known else wanted.model
        if model is not None and self._is_usable(model):
            return await self._loop.command(lambda key: NothingToDownload(model, key))
        found = await self._hub.find(wanted, self._promised_bytes())
        return await self._begin_once(found)

    def _known(self, name: str) -> Download | None:
        downloads = self._loop.snapshot.downloads
        found = downloads.get(name)
        return found or next((known for known in downloads.values() if known.alias == name), None)

    def _join_download(self, known: Download) -> Outcome:
        if known.state is DownloadState.REMOVING:
            raise NotDownloadable(f"'{known.model}' is being removed; ask again when it is gone.")
        return self._join(known)

    def _join(self, known: Download) -> Outcome:
        return Outcome(self._loop.snapshot.operations[known.operation])

    def _is_usable(self, model: ModelId) -> bool:
        found = self._loop.snapshot.models.get(model)
        return found is not None and found.problem is None

    def _promised_bytes(self) -> int:
        """What downloads that run are yet to write."""
        snapshot = self._loop.snapshot
        running = [d for d in snapshot.downloads.values() if d.state is DownloadState.RUNNING]
        return sum(max(0, d.total_bytes - snapshot.downloaded_bytes.get(d.model, 0)) for d in running)

    async def _begin_once(self, found: Download) -> Outcome:
        """Whoever comes while another begins the same joins that one."""
        if self._is_usable(found.model):
            return await self._loop.command(lambda key: NothingToDownload(found.model, key))
        if self._group is None:
            raise HubError("The server still waits for its engine, and takes no downloads until it answers.")
        if found.model not in self._beginning:
            task = asyncio.create_task(self._begin(found), name=f"begin {found.model}")
            self._beginning[found.model] = task
            task.add_done_callback(lambda _: self._beginning.pop(found.model, None))
        return await asyncio.shield(self._beginning[found.model])

    async def _begin(self, found: Download) -> Outcome:
        async with self._deciding:
            known = self._loop.snapshot.downloads.get(found.model)
            if known is not None and known.state is not DownloadState.COMPLETE:
                return self._join_download(known)
            outcome = await self._loop.command(lambda key: DownloadAsked(replace(found, operation=key)))
            await self._renew()
            self._go_on(self._loop.snapshot.downloads[found.model])
            return outcome

    # --- removing

    async def remove(self, name: str) -> Outcome:
        """Want what was downloaded, or is being, to go, with its files. A loaded one is unloaded first.

        Returns once that is decided and saved. Raises NotDownloadable, or UnknownModel.
        """
        async with self._deciding:
            return await self._remove(name)

    async def _remove(self, name: str) -> Outcome:
        known = self._known(name)
        if known is None:
            models = self._loop.snapshot.models
            if not any(name in (model.id, *model.aliases) for model in models.values()):
                raise UnknownModel(name, tuple(sorted(models)))
            raise NotDownloadable(
                f"'{name}' was not downloaded through this server: a file of the catalogue names it. "
                "Take it out there."
            )
        if known.state is DownloadState.REMOVING:
            return self._join(known)
        outcome = await self._loop.command(lambda key: RemovalAsked(known.model, key))
        await self._cancel(known.model)
        await self._renew()
        left = self._loop.snapshot.downloads.get(known.model)
        if left is not None:  # else its own end came first
            self._go_on(left)
        return outcome

    async def _cancel(self, model: ModelId) -> None:
        task = self._under_way.pop(model, None)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    # --- effects

    async def _fetch(self, download: Download) -> None:
        model = download.model

        def report(done_bytes: int) -> None:
            self._loop.inbox.post(DownloadProgressed(model, done_bytes))

        try:
            await self._hub.fetch(download, report)
        except HubError as error:
            await self._renew(DownloadEnded(model, error.message, error.code))
        else:
            await self._renew(DownloadEnded(model))

    async def _take_away(self, download: Download) -> None:
        """Nothing new is let in, since the model has left the catalogue; what is in flight ends first."""
        model = download.model
        try:
            if not download.is_listed:
                unloaded = await self._loop.unload(model)
                await self._loop.finished(unloaded, LONGEST_UNLOAD_S)
            freed_bytes = await self._hub.remove(download, self._files_of_others(model))
        except OrchestratorError as error:
            code = getattr(error, "code", "hub_error")
            await self._renew(DownloadRemoved(model, message=error.message, code=code))
        else:
            await self._renew(DownloadRemoved(model, freed_bytes))
