"""ports.Hub: listings asked in threads, downloads as processes of their own."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from orchestrator.control.ports import Wanted
from orchestrator.core.entities import MIB, Download, HubFile
from orchestrator.core.errors import DiskFull, HubError, NotDownloadable, RepositoryNotFound
from orchestrator.core.units import size_text
from orchestrator.hub.cache import RepoCache, hub_folder
from orchestrator.hub.client import HubClient, Listing
from orchestrator.hub.download import of_disk
from orchestrator.hub.fetch import Order
from orchestrator.hub.picking import Picked, Reference, name_of, parse_reference, pick, pick_by_pattern

LONGEST_NAME = 128
"""Of a model, as the catalogue has it."""
MARGIN_SHARE = 0.05
MOST_MARGIN_BYTES = 1024 * MIB
"""What a download leaves free on the disk: a twentieth of it, at most so much."""


class HuggingFaceHub:
    """The hub that HF_ENDPOINT names, and the cache of this machine."""

    async def find(self, wanted: Wanted, promised_bytes: int) -> Download:
        return await asyncio.to_thread(find, wanted, promised_bytes)

    async def fetch(self, download: Download, report: Callable[[int], None]) -> None:
        order = Order(hub_folder(), download.repo, download.commit, download.files)
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "orchestrator.hub.fetch"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
        except OSError as error:  # too many processes or files, or an interpreter that was replaced
            raise HubError(f"The download's process could not be started: {error.strerror}.") from error
        try:
            await _follow(process, order, report)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def remove(self, download: Download, others: Collection[Path]) -> int:
        return await asyncio.to_thread(remove, download, others)


def find(wanted: Wanted, promised_bytes: int) -> Download:
    """Blocking; as ports.Hub says."""
    reference = parse_reference(wanted.reference)
    if reference is None:
        raise RepositoryNotFound(
            f"'{wanted.reference}' is neither a model of the catalogue nor a repository, which is written "
            "OWNER/NAME or OWNER/NAME:QUANT."
        )
    with HubClient() as client:
        listing = client.listing(reference.repo)
        reference = Reference(listing.repo, reference.quant)
        picked = picked_from(listing, wanted, reference)
        name = wanted.model or _checked_name(name_of(reference, picked, listing.files))
        client.check_access(listing, picked.model[0])
    _check_disk(RepoCache(hub_folder(), listing.repo), picked.files, promised_bytes)
    may_be_alias = wanted.model is None and len(wanted.reference) <= LONGEST_NAME
    return Download(
        model=name,
        repo=listing.repo,
        commit=listing.commit,
        files=picked.files,
        path=picked.model[0].path,
        operation="",
        mmproj=picked.mmproj.path if picked.mmproj else None,
        alias=wanted.reference if may_be_alias and wanted.reference != name else None,
        is_listed=wanted.model is not None,
    )


def _checked_name(name: str) -> str:
    """Raises NotDownloadable where the catalogue could not have it."""
    if len(name) > LONGEST_NAME:
        raise NotDownloadable(
            f"'{name}' is {len(name)} characters long, and a model's name at most {LONGEST_NAME}. Give it a "
            "name of its own in models.yaml, with a source, and pull that."
        )
    return name


def picked_from(listing: Listing, wanted: Wanted, reference: Reference) -> Picked:
    if wanted.file is not None:
        return pick_by_pattern(listing.repo, listing.files, wanted.file, wanted.mmproj)
    return pick(listing.repo, listing.files, reference.quant)


def _check_disk(cache: RepoCache, files: Collection[HubFile], promised_bytes: int) -> None:
    """Raises DiskFull with the numbers, or HubError if the cache cannot be read."""
    try:
        needed = cache.missing_bytes(files)
        disk = shutil.disk_usage(_existing(cache.hub))
    except OSError as error:
        raise of_disk(error, cache.hub) from error
    if not needed:
        return
    margin = min(MOST_MARGIN_BYTES, int(disk.total * MARGIN_SHARE))
    available = disk.free - margin - promised_bytes
    if needed > available:
        others = f", {size_text(promised_bytes)} are promised to other downloads" if promised_bytes else ""
        raise DiskFull(
            f"{cache.repo} needs {size_text(needed)} in {cache.hub}, where {size_text(disk.free)} are free"
            f"{others} and {size_text(margin)} stay free. Make room, or take a smaller quantization."
        )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def remove(download: Download, others: Collection[Path]) -> int:
    """Blocking; as ports.Hub says."""
    hub = hub_folder()
    cache = RepoCache(hub, download.repo)
    used = {path.resolve() for path in others}
    try:
        kept = {f.path for f in download.files if cache.place(download.commit, f.path).resolve() in used}
        if download.path in kept:  # its later parts are needed too, and nobody names those
            kept |= {file.path for file in download.files if file.path != download.mmproj}
        return cache.remove(download.commit, download.files, kept)
    except OSError as error:
        raise of_disk(error, hub) from error


async def _follow(process: asyncio.subprocess.Process, order: Order, report: Callable[[int], None]) -> None:
    """Give the order, and pass on what is told until the end. Raises HubError."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(ConnectionError):
        process.stdin.write(order.to_json().encode() + b"\n")
        await process.stdin.drain()
    while told := await _told(process.stdout):
        if "ok" in told:
            return
        if "error" in told:
            raise HubError(told["error"]["message"], told["error"]["code"])
        report(told["done"])
    raise HubError(f"The download's process ended unseen (exit code {await process.wait()}). Ask again.")


async def _told(stdout: asyncio.StreamReader) -> dict[str, Any]:
    """The next line, empty at the end. Raises HubError for one that is not the process's own."""
    try:
        line = await stdout.readline()
        return dict(json.loads(line)) if line else {}
    except (TypeError, ValueError) as error:
        raise HubError(f"The download's process says what cannot be read ({error}). Ask again.") from error
