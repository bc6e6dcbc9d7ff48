"""What a turn changed, told to whoever watches: models, llama.cpp's status events, operations, the log."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from orchestrator.control.feed import Feed
from orchestrator.control.status import model_view, operation_view, status_of
from orchestrator.core.entities import (
    AttemptId,
    Download,
    DownloadState,
    ModelId,
    Note,
    OperationState,
    Usage,
)
from orchestrator.core.lifecycle import State
from orchestrator.core.snapshot import Snapshot


class Publisher:
    """Remembers what was last shown of each model, so that news is told once."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._shown: dict[ModelId, dict[str, object]] = {}

    def publish(
        self, before: Snapshot, after: Snapshot, asked: Collection[ModelId], usage: Mapping[AttemptId, Usage]
    ) -> None:
        """Tell the difference; a model that somebody `asked` for gets its status event in any case."""
        for model in sorted(touched(before, after) | set(asked)):
            self._publish_model(before, after, model, model in asked, usage)
        self._publish_downloads(before, after)
        if before.operations is not after.operations:
            for key, operation in after.operations.items():
                if before.operations.get(key) is not operation:
                    self._feed.publish("operation", operation_view(operation, after))
        for note in after.notes:
            self.publish_note(note)

    def _publish_downloads(self, before: Snapshot, after: Snapshot) -> None:
        """llama.cpp's own words for them, beside the `model_status` that each has too."""
        for model, download in after.downloads.items():
            done = after.downloaded_bytes.get(model)
            if done is not None and done != before.downloaded_bytes.get(model):
                data = {"progress": {download.repo: {"done": done, "total": download.total_bytes}}}
                self._publish_event(model, "download_progress", data)
        for model, download in before.downloads.items():
            now = after.downloads.get(model)
            if now is not download:
                for word in words_for(download, now, after):
                    self._publish_event(model, word, {})

    def _publish_event(self, model: ModelId, event: str, data: Mapping[str, object]) -> None:
        self._feed.publish("status", {"model": model, "event": event, "data": dict(data)})

    def publish_note(self, note: Note) -> None:
        line = {"kind": note.kind, "text": note.text, "model": note.model, "data": dict(note.data)}
        self._feed.publish("log", dict[str, object](line))

    def _publish_model(
        self,
        before: Snapshot,
        after: Snapshot,
        model: ModelId,
        was_asked: bool,
        usage: Mapping[AttemptId, Usage],
    ) -> None:
        status = status_of(after, model)
        is_news = coarse(status) != coarse(self._shown.get(model, {}))
        if is_news or before.instances.get(model) is not after.instances.get(model):
            self._feed.publish("model", model_view(after, model, usage))
        if was_asked or is_news:
            self._shown[model] = status
            data = {("status" if key == "value" else key): value for key, value in status.items()}
            self._publish_event(model, "model_status", data)


def touched(before: Snapshot, after: Snapshot) -> set[ModelId]:
    """Models that may look different; one that starts makes progress without any other change."""
    changed = {m for m, i in after.instances.items() if before.instances.get(m) is not i}
    for old, new in ((before.downloads, after.downloads), (before.downloaded_bytes, after.downloaded_bytes)):
        changed |= {m for m in old.keys() | new.keys() if old.get(m) != new.get(m)}
    starting = {i.model for i in after.instances.values() if i.state is State.STARTING}
    return changed | starting | (before.entries.keys() ^ after.entries.keys())


def coarse(status: Mapping[str, object]) -> dict[str, object]:
    """A status in which progress counts in steps of a tenth; of a download, which takes long, a hundredth."""
    progress = status.get("progress")
    if not isinstance(progress, dict):
        return dict(status)
    digits = 2 if status.get("value") == "downloading" else 1
    return {**status, "progress": (progress.get("stage"), round(float(progress.get("value") or 0.0), digits))}


def words_for(old: Download, new: Download | None, after: Snapshot) -> tuple[str, ...]:
    """What llama.cpp's router calls that change."""
    if old.state is DownloadState.RUNNING:
        operation = after.operations.get(old.operation)
        has_failed = operation is not None and operation.state is OperationState.FAILED
        return ("download_failed" if has_failed else "download_finished",)
    return ("model_remove",) if new is None else ()
