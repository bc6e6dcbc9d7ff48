"""Builds and wires every object, runs the server, and ends it cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path

import structlog
from fastapi import FastAPI

from orchestrator import __version__
from orchestrator.api.access import Access
from orchestrator.api.asgi import App
from orchestrator.api.build import build_api
from orchestrator.api.context import Context
from orchestrator.api.forwarded import Proxies
from orchestrator.api.front import Front
from orchestrator.api.gateway import Gateway, Limits
from orchestrator.api.hostnames import Hostnames
from orchestrator.api.safety import Safety
from orchestrator.catalogue.alternatives import alternatives_of
from orchestrator.catalogue.downloaded import files_of, with_downloads
from orchestrator.catalogue.read import GGUF_SERVICE, Catalogue, host_budget_bytes, read_catalogue
from orchestrator.choosing import Choice, choose, unused_gpus
from orchestrator.control.checkup import Checkup
from orchestrator.control.container_names import ContainerNames
from orchestrator.control.downloads import Downloads
from orchestrator.control.effects import Effects
from orchestrator.control.keyring import KeyRing
from orchestrator.control.loop import Loop
from orchestrator.control.ports import Changes, Devices, Engine, Found, Wanted
from orchestrator.control.recovery import Recovered, recover, shut_down
from orchestrator.control.watchdog import Watchdog
from orchestrator.core.downloads import after
from orchestrator.core.entities import (
    HOST,
    MIB,
    Device,
    DeviceId,
    DeviceKind,
    Download,
    Model,
    ModelId,
    Sample,
)
from orchestrator.core.errors import (
    CatalogueError,
    EngineUnavailable,
    NotDownloadable,
    StoreError,
    UnknownModel,
)
from orchestrator.core.events import CatalogueRead, DownloadEnded, Event, IncidentsHeard, Sampled
from orchestrator.core.learning import with_lessons
from orchestrator.core.lifecycle import HAS_PROCESS, State
from orchestrator.core.snapshot import Snapshot
from orchestrator.diagnosis import diagnose
from orchestrator.drivers.combined import CombinedDevices
from orchestrator.drivers.docker import DockerEngine
from orchestrator.drivers.host import HostDevice, total_bytes
from orchestrator.drivers.monitor import Monitor
from orchestrator.drivers.nvml import NvmlDevices
from orchestrator.drivers.probe import HttpProbe
from orchestrator.drivers.process import ProcessEngine
from orchestrator.drivers.process_tree import boot_id
from orchestrator.hub.service import HuggingFaceHub
from orchestrator.local.demo import DemoError, ensure_demos
from orchestrator.schedule import new_schedule
from orchestrator.settings import Settings
from orchestrator.store.keys import SqliteKeys
from orchestrator.store.repository import open_store

log = structlog.get_logger(__name__)

ENGINE_RETRY_S = 2.0
HURRIED = frozenset({State.CLAIMED, State.STARTING, State.STOPPING, State.RECLAIMING})
KEPT_OPERATIONS = 1000
KEPT_ATTEMPTS = 1000


class Server:
    """One orchestrator: `build` makes its ASGI application, whose lifespan starts and ends everything.

    Opening reads the catalogue, opens the database and finds the devices, so what is wrong with them is
    an error before anything listens. Raises CatalogueError, DemoError, StoreError or DeviceError.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._is_turning = False  # samples go to the loop
        self._is_closing = False
        self._store, self._kept = open_store(settings.database, boot_id(), time.time)
        try:
            self._open()
        except BaseException:
            self._store.close()
            raise

    def _open(self) -> None:
        self.choice = self._choose()
        self._host = HostDevice(total_bytes(), f"RAM for {self.choice.engine} models")
        self._engine = self._new_engine()
        self._monitor = Monitor(self._new_devices(), self._engine.roots, self._post_sample, time.monotonic)
        self._devices = {device.id: device for device in self._monitor.open()}
        try:
            self._open_catalogue()
            self._keyring = self._new_keyring()
        except BaseException:
            self._monitor.close()
            raise

    def _open_catalogue(self) -> None:
        """After the devices, since footprints depend on the card; the RAM's budget depends on the models."""
        self._written = self._read_catalogue()
        self._catalogue = self._with_downloads(self._written, self._kept.downloads)
        ensure_demos(self._written)
        self._devices = self._with_budget(self._catalogue)

    def _choose(self) -> Choice:
        """What `auto` chose once stays chosen; what is named counts for this time only."""
        stored = self._store.choice()
        choice = choose(self.settings, stored)
        if stored is None and "auto" in (self.settings.engine, self.settings.devices):
            self._store.remember_choice(choice.engine, choice.devices)
        return choice

    @property
    def _on_gpu(self) -> bool:
        return self.choice.devices == "nvml"

    def _gpus(self) -> list[Device]:
        gpus = (device for device in self._devices.values() if device.kind is DeviceKind.GPU)
        return sorted(gpus, key=lambda gpu: gpu.index)

    def _read_catalogue(self, before: Catalogue | None = None) -> Catalogue:
        return read_catalogue(self.settings, on_gpu=self._on_gpu, gpus=self._gpus(), before=before)

    def _new_devices(self) -> Devices:
        if self.choice.devices == "host":
            return self._host
        return CombinedDevices((NvmlDevices(self.settings.headroom_mib * MIB), self._host))

    def _new_engine(self) -> Engine:
        if self.choice.engine == "process":
            return ProcessEngine(self.settings.state_dir, self._kept.owner)
        chosen = self.settings
        owner = self._kept.owner
        return DockerEngine(owner, chosen.docker_network, chosen.gpu_access, named=self._container_names)

    def _container_names(self) -> dict[str, tuple[ModelId, int]]:
        launches = ((model.id, model.launch) for model in self._catalogue.models.values())
        return {at.container_name: (model, at.port) for model, at in launches if at.container_name}

    def _new_keyring(self) -> KeyRing:
        """The keys that are stored. Where a key is needed and there is none, the first one is made."""
        store = SqliteKeys(self._store, self.settings.database)
        keys, sessions = store.load()
        is_strict = self.settings.needs_keys
        if is_strict and not keys:
            keys.append(store.make_first(time.time()))
        return KeyRing(store, keys, sessions, is_strict=is_strict, wall=time.time)

    # --- wiring, on the event loop

    def build(self) -> App:
        """The ASGI application. Call it on the event loop that will serve it."""
        self._probe = HttpProbe()
        self.loop = Loop(
            self._first_snapshot(time.monotonic()),
            self._store,
            lambda post, models: Effects(self._engine, self._probe, post, models, self._devices),
            clock=time.monotonic,
            wall=time.time,
        )
        self.downloads = Downloads(
            self.loop,
            HuggingFaceHub(),
            listed=self._wanted,
            renew=self._renew_downloads,
            files_of_others=self._files_of_others,
        )
        self._reloading = asyncio.Lock()
        self._checkup = Checkup(self.loop, self._engine, self._store)
        hostnames = Hostnames(self.loop, lambda: self._catalogue.hostnames)
        safety = Safety(self.settings.allowed_hosts, hostnames)
        self._gateway = Gateway(self.loop, hostnames, self._resolve, self._limits())
        self.context = Context(
            loop=self.loop,
            downloads=self.downloads,
            checkup=self._checkup,
            engine=self._engine,
            store=self._store,
            keyring=self._keyring,
            hostnames=hostnames,
            resolve=self._resolve,
            alternatives=lambda model, parameters: alternatives_of(self._catalogue, model, parameters),
            reload_catalogue=self.reload_catalogue,
            diagnose=lambda: diagnose(self.context, self.settings, self._catalogue, self._unused_gpus),
            version=__version__,
            started_at=int(time.time()),
            found=self._what_was_found(),
        )
        self._proxies = Proxies(self.settings.trusted_proxies)
        access = Access(self._keyring, self.settings.trusted_networks)
        api = build_api(self.context, self._lifespan)
        return Front(api, self._gateway, hostnames, self.loop, self._proxies, safety, access)

    def _what_was_found(self) -> list[str]:
        ram = f"RAM: {self._host.capacity_bytes // MIB} MiB, {self._budget_reason}"
        return [*self.choice.reasons, ram]

    def _unused_gpus(self) -> list[str]:
        return unused_gpus(self.settings.devices, self.choice.devices)

    def _limits(self) -> Limits:
        chosen = self.settings
        return Limits(chosen.body_limit_mib * MIB, chosen.spool_limit_mib * MIB, chosen.request_limit)

    def _first_snapshot(self, now_s: float) -> Snapshot:
        wall_s = time.time()
        first = Snapshot(
            now_s=now_s,
            wall_s=wall_s,
            seed=secrets.token_hex(4),
            devices=self._devices,
            models=self._catalogue.models,
            sample=Sample(taken_at_s=now_s),
            operations=self._kept.operations,
            downloads=self._kept.downloads,
            pins=self._kept.pins,
            holds={m: now_s + until - wall_s for m, until in self._kept.holds.items() if until > wall_s},
            learned=self._kept.learned,
        )
        return with_lessons(first)

    def _resolve(self, name: str) -> Model:
        return self._catalogue.resolve(name)

    def _post_sample(self, sample: Sample) -> None:
        if self._is_turning:
            self.loop.inbox.post_from_thread(Sampled(sample))
            if sample.incidents:
                self.loop.inbox.post_from_thread(IncidentsHeard(sample.incidents))

    # --- running

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        for line in self.context.found:
            log.info(line)
        await self._gateway.open()
        running = asyncio.create_task(self._run(), name="orchestrator")
        running.add_done_callback(self._say_why_it_ended)
        schedule = new_schedule(self._resync, self._prune, self._back_up, self._keyring.note_uses)
        schedule.start()
        proxies = asyncio.create_task(self._proxies.watch(), name="trusted proxies")
        try:
            yield
        finally:
            self._is_closing = True
            self._is_turning = False
            schedule.shutdown(wait=False)
            self.loop.close()
            running.cancel()
            proxies.cancel()
            await asyncio.gather(running, proxies, return_exceptions=True)
            await self._keyring.note_uses()
            await self._shut_down()

    async def _run(self) -> None:
        """Connect to the engine, take over what runs, and turn; the engine may be away at first."""
        found = await self._open_engine()
        recovered = recover(self._kept, found, self._catalogue.models, now_s=time.monotonic())
        self._is_turning = True
        async with asyncio.TaskGroup() as group:
            group.create_task(Watchdog(self.loop.vitals, self.loop.tell, time.monotonic).run())
            group.create_task(self._hurry_monitor())
            group.create_task(self.downloads.run())
            group.create_task(ContainerNames(self.loop, self._engine, time.monotonic).run())
            group.create_task(self.loop.run(recovered, self._to_restore(recovered)))

    async def _open_engine(self) -> tuple[Found, ...]:
        while True:
            try:
                await self._engine.open(lambda attempt, exit_: self.loop.effects.on_exit(attempt, exit_))
                found = await self._engine.list()
                self.context.engine_problem = None
                return found
            except EngineUnavailable as error:
                if self.context.engine_problem is None:
                    log.error("the engine does not answer; trying again", error=error.message)
                self.context.engine_problem = error.message
                await asyncio.sleep(ENGINE_RETRY_S)

    def _to_restore(self, recovered: Recovered) -> list[ModelId]:
        """What to load without being asked: `pinned` ones, or `all` that were loaded before."""
        if self.settings.restore == "none":
            return []
        snapshot = self.loop.snapshot
        pinned = [m for m in snapshot.models if snapshot.is_pinned(m) and m not in snapshot.holds]
        lost = list(recovered.lost) if self.settings.restore == "all" else []
        running = {i.model for i in recovered.instances.values() if i.state in HAS_PROCESS}
        return [m for m in dict.fromkeys(pinned + lost) if m in snapshot.models and m not in running]

    async def _hurry_monitor(self) -> None:
        """Sample fast while memory is on the move."""
        with self.loop.feed.subscribe() as changes:
            async for change in changes.messages(tick_s=5.0):
                instances = self.loop.snapshot.instances.values()
                self._monitor.hurry(any(instance.state in HURRIED for instance in instances))
                if change is not None and change.topic == "model":
                    self._monitor.sample_now()  # what it took, before it may leave again

    def _say_why_it_ended(self, task: asyncio.Task[None]) -> None:
        """The loop never ends by itself: a bug ends the process, and recovery rebuilds."""
        if self._is_closing or task.cancelled():
            return
        log.critical("the control loop ended; leaving, so that a restart recovers", exc_info=task.exception())
        os.kill(os.getpid(), signal.SIGTERM)

    # --- housekeeping

    async def reload_catalogue(self) -> None:
        """Read the catalogue's files again. Raises CatalogueError; then nothing has changed."""
        async with self._reloading:
            await self._read_again()
            await self._renew()

    async def _read_again(self) -> None:
        try:
            fresh = await asyncio.to_thread(self._read_catalogue, self._written)
            await asyncio.to_thread(ensure_demos, fresh)
        except (CatalogueError, DemoError) as error:
            self.context.catalogue_problem = error.message
            for line in error.message.splitlines():
                log.error(f"the catalogue stays as it was: {line}")
            raise CatalogueError(error.message) from error
        self.context.catalogue_problem = None
        self._written = fresh

    async def _renew_downloads(self, *news: Event) -> None:
        """Take in what was downloaded or is gone; models.yaml may have waited for it."""
        known = self.loop.snapshot.downloads
        ended = {known[e.model].repo for e in news if isinstance(e, DownloadEnded) and e.model in known}
        async with self._reloading:
            if ended & {source.repo for source in self._written.sources.values()}:
                with contextlib.suppress(CatalogueError):  # it is told, and counts as it was
                    await self._read_again()
            await self._renew(*news)

    async def _renew(self, *news: Event) -> None:
        downloads = functools.reduce(after, news, self.loop.snapshot.downloads)
        fresh = await asyncio.to_thread(self._with_downloads, self._written, downloads)
        self._catalogue = fresh
        self._devices = self._with_budget(fresh)
        self.context.found = self._what_was_found()
        if self._is_turning:
            await self.loop.renew(fresh.models, self._devices, *news)
        else:  # the loop waits for the engine, and will find it
            self.loop.inbox.post(CatalogueRead(fresh.models, self._devices))

    def _with_downloads(self, written: Catalogue, downloads: Mapping[ModelId, Download]) -> Catalogue:
        known = downloads.values()
        return with_downloads(written, self.settings, known, on_gpu=self._on_gpu, gpus=self._gpus())

    def _wanted(self, name: str) -> Wanted | None:
        """What the catalogue's files want from the hub for a model. Raises NotDownloadable."""
        try:
            model = self._written.resolve(name).id
        except UnknownModel:
            if GGUF_SERVICE not in self._written.services:
                raise NotDownloadable(
                    f"What is downloaded is served by '{GGUF_SERVICE}', and there is no such service."
                ) from None
            return None
        source = self._written.sources.get(model)
        if source is None or source.repo is None:
            raise NotDownloadable(f"'{name}' has no source in the hub: it is a file of this machine.")
        return Wanted(source.repo, model, source.file, source.mmproj)

    def _files_of_others(self, model: ModelId) -> list[Path]:
        listed = (files for other, files in self._catalogue.files.items() if other != model)
        downloads = self.loop.snapshot.downloads.values()
        downloaded = (files_of(d) for d in downloads if d.model != model)  # also while they are unusable
        return [file for files in (*listed, *downloaded) for file in files]

    def _with_budget(self, catalogue: Catalogue) -> dict[DeviceId, Device]:
        budget, self._budget_reason = host_budget_bytes(self.settings, catalogue, total_bytes())
        self._host.capacity_bytes = budget
        host = replace(self._devices[HOST], capacity_bytes=budget)
        return {**self._devices, HOST: host}

    async def _resync(self) -> None:
        if self.context.engine_problem is None:
            await self._checkup.run()

    async def _prune(self) -> None:
        try:
            await self._store.prune(
                keep_events=self.settings.event_retention,
                keep_operations=KEPT_OPERATIONS,
                keep_attempts=KEPT_ATTEMPTS,
            )
        except StoreError as error:
            log.warning("retention not applied", error=error.message)

    async def _back_up(self) -> None:
        try:
            copy = await self._store.back_up()
        except StoreError as error:
            log.warning("the database was not copied", error=error.message)
            return
        if copy is not None:
            log.debug("the database was copied", copy=str(copy))

    # --- ending

    async def _shut_down(self) -> None:
        """End host processes; leave containers running unless told otherwise. Either is remembered."""
        stops = self.choice.engine == "process" or self.settings.stop_containers_on_exit
        if stops:
            await self._stop_everything()
        self._monitor.close()
        await self._gateway.close()
        await self._engine.close()
        await self._probe.close()
        await asyncio.to_thread(self._store.close)

    async def _stop_everything(self) -> None:
        instances = self.loop.snapshot.instances
        try:
            await self._store.save(Changes(instances=shut_down(instances)))
        except StoreError as error:
            log.error("the clean stop is not remembered", error=error.message)
        running = [i for i in instances.values() if i.state in HAS_PROCESS and i.attempt]
        grace_s = {m.id: m.stop_grace_s for m in self._catalogue.models.values()}
        stops = (self._engine.stop(i.attempt or "", grace_s.get(i.model, 10.0)) for i in running)
        for ended in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(ended, BaseException):
                log.warning("a model did not stop", error=str(ended))
