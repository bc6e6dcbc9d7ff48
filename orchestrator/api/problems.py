"""Errors as HTTP: one table, one shape, for the API and the gateway alike.

{"error": {"message", "type", "code", "param", ...details}}
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

import orjson

from orchestrator.control.loop import NotReady
from orchestrator.core import errors
from orchestrator.core.verdicts import Verdict
from orchestrator.core.wording import Told, explain

RETRY_AFTER_LIMIT_S = 60
"""OpenAI clients do not retry at all when told to wait much longer than this."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An answer that is not a success. `type` is OpenAI's word for whose fault it is."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None
    should_retry: bool | None = None
    details: dict[str, object] = field(default_factory=dict)

    @property
    def type(self) -> str:
        if self.status == 404:
            return "not_found_error"
        return "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"

    def body(self, *, integer_code: bool = False) -> bytes:
        """`integer_code` as llama.cpp's own paths have it."""
        error = {
            "message": self.message,
            "type": self.type,
            "code": self.status if integer_code else self.code,
            "param": self.param,
            **self.details,
        }
        return orjson.dumps({"error": error})

    def headers(self) -> dict[str, str]:
        found = {"content-type": "application/json"}
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.retry_after_s is not None:
            found["retry-after"] = str(max(1, min(RETRY_AFTER_LIMIT_S, ceil(self.retry_after_s))))
        if self.should_retry is not None:
            found["x-should-retry"] = "true" if self.should_retry else "false"
        return found


class BadRequest(errors.OrchestratorError):
    """The request itself is wrong; `param` names the field."""

    def __init__(
        self, message: str, param: str | None = None, code: str = "invalid_value", status: int = 400
    ):
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def problem_of(error: Exception) -> Problem:
    match error:
        case BadRequest():
            return Problem(error.status, error.message, error.code, error.param)
        case NotReady():
            return problem_of_verdict(error.verdict, error.now_s)
        case errors.UnknownModel():
            return Problem(404, error.message, "model_not_found", error.param)
        case errors.NoLog():
            return Problem(404, error.message, error.code, "model")
        case errors.UnknownKey():
            return Problem(404, error.message, "key_not_found", "name")
        case errors.KeyConflict():
            return Problem(409, error.message, error.code, "name", should_retry=False)
        case errors.CatalogueError():
            message = f"Nothing was changed, the catalogue has errors: {error.message}"
            return Problem(409, message, "catalogue_invalid", should_retry=False)
        case errors.HubError():
            return problem_of_hub(error)
        case errors.OrchestratorError():
            return problem_of_trouble(error)
        case _:
            return Problem(500, f"A bug in the orchestrator: {type(error).__name__}.", "internal_error")


def problem_of_trouble(error: errors.OrchestratorError) -> Problem:
    """What is nobody's fault who asked, and may be over when they ask again."""
    match error:
        case errors.DeadlineExceeded():
            return Problem(503, error.message, "deadline_exceeded", retry_after_s=10)
        case errors.StoreError():
            message = f"{error.message} Nothing was started or stopped; models that run go on serving."
            return Problem(503, message, "store_unavailable", retry_after_s=10)
        case errors.EngineError():
            return Problem(503, error.message, error.code, retry_after_s=10)
        case errors.ShuttingDown():
            return Problem(503, error.message, "shutting_down", retry_after_s=10)
        case _:
            return Problem(500, error.message, "internal_error")


def problem_of_hub(error: errors.HubError) -> Problem:
    """The hub's no, or the disk's; only a hub that has trouble is worth asking again."""
    match error:
        case errors.RepositoryNotFound() | errors.QuantNotFound():
            return Problem(404, error.message, error.code, "model")
        case errors.RepositoryGated() | errors.NotDownloadable():
            return Problem(409, error.message, error.code, "model", should_retry=False)
        case errors.DiskFull():
            return Problem(507, error.message, error.code, should_retry=False)
        case errors.HubUnreachable():
            return Problem(503, error.message, error.code, retry_after_s=30)
        case _:
            return Problem(503, error.message, error.code, retry_after_s=60)


def problem_of_verdict(verdict: Verdict, now_s: float) -> Problem:
    return problem_of_told(explain(verdict, now_s))


def problem_of_told(told: Told) -> Problem:
    should_retry = False if told.status == 409 else None
    param = "model" if told.status in (404, 409) else None
    return Problem(
        told.status, told.message, told.code, param, told.retry_after_s, should_retry, told.details
    )
