"""The error family. Decisions ("no room") are values in entities.py; these are for what went wrong."""

from __future__ import annotations


class OrchestratorError(Exception):
    """Everything we raise on purpose. `message` is a whole sentence for a person."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class IllegalTransition(OrchestratorError):
    """A command the lifecycle table does not know: a bug of the planner."""


class UnknownModel(OrchestratorError):
    """No catalogue entry has this name or alias."""

    param = "model"
    """The field of the request that named it."""

    def __init__(self, model: str, known: tuple[str, ...]) -> None:
        names = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
        super().__init__(f"There is no model '{model}'. The catalogue has: {names or 'no models at all'}.")
        self.model = model


class DeadlineExceeded(OrchestratorError):
    """A wait for a ready instance reached its deadline."""

    def __init__(self, model: str, waited_s: float, reason: str) -> None:
        super().__init__(f"No answer from '{model}' within {waited_s:.0f} s: {reason}.")
        self.model = model
        self.reason = reason


class EngineError(OrchestratorError):
    """The engine refused to start or stop something; `code` names the kind for machines."""

    code = "engine_error"


class EngineUnavailable(EngineError):
    """The engine does not answer: nothing is known about its containers, so nothing is given up."""

    code = "engine_unavailable"


class ImageMissing(EngineError):
    """The image is neither here nor to be pulled; the message quotes the command that gets it."""

    code = "image_missing"


class NameTaken(EngineError):
    """A container that is not ours has the name."""

    code = "name_taken"


class StartFailed(EngineError):
    """The engine could not start the container or the process."""

    code = "start_failed"


class NoLog(EngineError):
    """Nothing was kept of what the attempt, or the model, printed."""

    code = "no_log"


class Cancelled(EngineError):
    """The start was given up because a stop was ordered meanwhile."""

    code = "cancelled"


class DeviceError(OrchestratorError):
    """A device, or all of NVML, could not be read."""


class StoreError(OrchestratorError):
    """The database could not be written or read; nothing was half done."""


class SchemaTooNew(StoreError):
    """A newer program has written this database."""


class DatabaseInUse(StoreError):
    """Another server owns this database."""


class CatalogueError(OrchestratorError):
    """A configuration file is wrong; the message names file, line and field."""


class UnknownKey(OrchestratorError):
    """No API key has this name."""

    def __init__(self, name: str, known: tuple[str, ...]) -> None:
        names = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
        super().__init__(f"There is no key '{name}'. There are: {names or 'no keys at all'}.")


class KeyConflict(OrchestratorError):
    """A key cannot be made or revoked beside the others; `code` names the reason for machines."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class HubError(OrchestratorError):
    """The model hub, or the disk for what comes from it, does not do what was asked; `code` as of engines."""

    code = "hub_error"

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code


class HubUnreachable(HubError):
    """The hub does not answer, or has trouble of its own."""

    code = "hub_unreachable"


class RepositoryNotFound(HubError):
    """There is none of that name, or none that is shown to us."""

    code = "repository_not_found"


class QuantNotFound(HubError):
    """The repository has no such file; the message says which there are."""

    code = "quant_not_found"


class RepositoryGated(HubError):
    """Its owner wants conditions accepted first, or the token is refused."""

    code = "repository_gated"


class DiskFull(HubError):
    """The files do not fit on the cache's disk; the message has the numbers."""

    code = "disk_full"


class ChecksumMismatch(HubError):
    """What arrived is not what the hub has; it was dropped."""

    code = "checksum_mismatch"


class NotDownloadable(HubError):
    """The model's file does not come from the hub, or was not downloaded by us."""

    code = "not_downloadable"


class ShuttingDown(OrchestratorError):
    """The server is stopping and takes no new work."""
