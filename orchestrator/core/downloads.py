"""What becomes of downloads: asked for, under way, complete or failed, removed. Folded into the snapshot.

They touch no device's memory, so the planner never sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import assert_never

from orchestrator.core import events as ev
from orchestrator.core.entities import (
    Download,
    DownloadState,
    ModelId,
    Note,
    Operation,
    OperationId,
    OperationKind,
    OperationState,
)
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.units import size_text


def download_news(state: Snapshot, event: ev.DownloadEvent) -> Snapshot:
    match event:
        case ev.DownloadAsked():
            return asked(state, event.download)
        case ev.NothingToDownload():
            done = Operation(event.operation, OperationKind.DOWNLOAD, event.model, created_at=state.wall_s)
            return ended(state, done, f"'{event.model}' is here already and can be loaded.")
        case ev.DownloadProgressed():
            return progressed(state, event)
        case ev.DownloadEnded():
            return download_ended(state, event)
        case ev.RemovalAsked():
            return removal_asked(state, event)
        case ev.DownloadRemoved():
            return removed(state, event)
        case _:
            assert_never(event)


def after(downloads: Mapping[ModelId, Download], event: ev.Event) -> Mapping[ModelId, Download]:
    """The downloads as they are once this has happened."""
    match event:
        case ev.DownloadAsked():
            return {**downloads, event.download.model: event.download}
        case ev.DownloadEnded() | ev.RemovalAsked() | ev.DownloadRemoved():
            changed = changed_by(downloads.get(event.model), event)
            rest = {model: known for model, known in downloads.items() if model != event.model}
            return rest | ({changed.model: changed} if changed is not None else {})
        case _:
            return downloads


def changed_by(
    known: Download | None, event: ev.DownloadEnded | ev.RemovalAsked | ev.DownloadRemoved
) -> Download | None:
    """The download itself after it; None where nothing is to be remembered of it any more."""
    if known is None:
        return None
    match event:
        case ev.DownloadEnded():
            if known.state is not DownloadState.RUNNING:
                return known
            is_over = event.message is not None or known.is_listed
            return None if is_over else replace(known, state=DownloadState.COMPLETE)
        case ev.RemovalAsked():
            return replace(known, state=DownloadState.REMOVING, operation=event.operation)
        case ev.DownloadRemoved():
            return None if event.message is None else replace(known, state=DownloadState.COMPLETE)


def asked(state: Snapshot, download: Download) -> Snapshot:
    files = f"{len(download.files)} file{'s' if len(download.files) > 1 else ''}"
    text = f"'{download.model}' is being downloaded: {files}, {size_of(download)}"
    operation = Operation(
        download.operation, OperationKind.DOWNLOAD, download.model, created_at=state.wall_s, message=text
    )
    state = with_operation(note(state, "downloading", text, download.model), operation)
    return replace(state, downloads=after(state.downloads, ev.DownloadAsked(download)))


def progressed(state: Snapshot, event: ev.DownloadProgressed) -> Snapshot:
    known = state.downloads.get(event.model)
    if known is None or known.state is not DownloadState.RUNNING:
        return state
    return replace(state, downloaded_bytes={**state.downloaded_bytes, event.model: event.done_bytes})


def download_ended(state: Snapshot, event: ev.DownloadEnded) -> Snapshot:
    known = state.downloads.get(event.model)
    if known is None or known.state is not DownloadState.RUNNING:
        return state
    state = forgotten_progress(replace(state, downloads=after(state.downloads, event)), event.model)
    if event.message is None:
        text = f"'{event.model}' is downloaded ({size_of(known)})"
        state = note(state, "downloaded", text, event.model)
        return end(state, known.operation, f"{text} {what_now(state, event.model)}")
    text = f"'{event.model}' was not downloaded: {event.message}"
    state = note(state, "download_failed", text, event.model)
    return end(state, known.operation, text, event.code or "hub_error")


def removal_asked(state: Snapshot, event: ev.RemovalAsked) -> Snapshot:
    """What was under way is cancelled by it."""
    removal = Operation(event.operation, OperationKind.REMOVE, event.model, created_at=state.wall_s)
    known = state.downloads.get(event.model)
    if known is None:
        text = f"The download of '{event.model}' had ended by itself; there was nothing to remove."
        return ended(state, removal, text)
    if known.state is DownloadState.RUNNING:
        text = f"The download of '{event.model}' was cancelled."
        state = end(state, known.operation, text, "download_cancelled")
    state = forgotten_progress(replace(state, downloads=after(state.downloads, event)), event.model)
    text = f"'{event.model}' is being removed"
    return with_operation(state, replace(removal, message=text))


def removed(state: Snapshot, event: ev.DownloadRemoved) -> Snapshot:
    known = state.downloads.get(event.model)
    if known is None or known.state is not DownloadState.REMOVING:
        return state
    state = replace(state, downloads=after(state.downloads, event))
    if event.message is not None:
        text = f"'{event.model}' was not removed: {event.message}"
        return end(note(state, "not_removed", text, event.model), known.operation, text, event.code)
    text = f"'{event.model}' was removed; {size_text(event.freed_bytes)} of the disk came free"
    return end(note(state, "removed", text, event.model), known.operation, f"{text}.")


def what_now(state: Snapshot, model: ModelId) -> str:
    """Whether what has come is a model; the catalogue has been made anew with these very news."""
    found = state.models.get(model)
    if found is None or found.problem is None:
        return "and can be loaded."
    return f"and cannot be loaded: {found.problem}"


# --- helpers


def size_of(download: Download) -> str:
    return size_text(download.total_bytes)


def end(state: Snapshot, key: OperationId, message: str, code: str | None = None) -> Snapshot:
    operation = state.operations.get(key)
    return state if operation is None else ended(state, operation, message, code)


def ended(state: Snapshot, operation: Operation, message: str, code: str | None = None) -> Snapshot:
    how = OperationState.SUCCEEDED if code is None else OperationState.FAILED
    done = replace(operation, state=how, message=message, code=code, ended_at=state.wall_s)
    return with_operation(state, done)


def with_operation(state: Snapshot, operation: Operation) -> Snapshot:
    return replace(state, operations={**state.operations, operation.id: operation})


def forgotten_progress(state: Snapshot, model: ModelId) -> Snapshot:
    rest = {key: value for key, value in state.downloaded_bytes.items() if key != model}
    return replace(state, downloaded_bytes=rest)


def note(state: Snapshot, kind: str, text: str, model: ModelId) -> Snapshot:
    return replace(state, notes=(*state.notes, Note(kind, text, model)))
