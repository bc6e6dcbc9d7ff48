"""What the engine's libraries raise, in our words: no answer is one thing, a refusal another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import requests
import urllib3
from docker.errors import APIError, DockerException

from orchestrator.control.ports import StartOrder
from orchestrator.core.errors import Cancelled, EngineError, EngineUnavailable, ImageMissing, StartFailed
from orchestrator.drivers.docker_spec import missing_image_help

CONFLICT = 409
GATEWAY_ERRORS = (502, 503, 504)  # said by a proxy in front of the engine
_BROKEN = 500


class ImageNotHere(EngineError):
    """The engine does not have the image (yet)."""


class LimitsRefused(StartFailed):
    """The engine may not give a container the limits that it was asked for."""


class IdSpoilt(StartFailed):
    """What an engine that was killed has left of a start is in the way of all others of this container."""


@contextmanager
def asking(*, trusts_failures: bool = False) -> Iterator[None]:
    """Turn the libraries' errors into ours.

    An answer of 5xx to a question, or to an order to remove something, means that nothing is known.
    With `trusts_failures` it is a refusal, as of a pull: so the engine says that a registry has failed.
    """
    try:
        yield
    except APIError as error:
        text = reason(error)
        if error.status_code in GATEWAY_ERRORS:
            raise EngineUnavailable(f"The Docker engine is not to be reached: {text}.") from error
        if (error.status_code or 0) >= _BROKEN and not trusts_failures:
            raise EngineUnavailable(f"The Docker engine fails to answer: {text}.") from error
        raise EngineError(f"The Docker engine refused: {text}.") from error
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, DockerException) as error:
        raise EngineUnavailable(f"The Docker engine does not answer: {error}.") from error


def reason(error: APIError) -> str:
    return str(error.explanation or error).strip().rstrip(".")


def advice(text: str) -> str:
    """What to do about start failures whose text says little to those who have not met them."""
    if "could not select device driver" in text:
        return (
            " The engine lacks the NVIDIA container toolkit: install it, or set `gpu_access: devices`,"
            " which binds the host's driver into the container."
        )
    if "CDI device" in text or "unresolvable" in text:
        return " Make the device names with `nvidia-ctk cdi generate --device-name-strategy=uuid`."
    if "no space left on device" in text:
        return " Make room on the engine's disk, with `docker system prune` for example."
    return ""


def kind_of_start_failure(text: str) -> type[StartFailed]:
    if "setting rlimit" in text:
        return LimitsRefused
    if ("shim" in text and "file exists" in text) or "container with id exists" in text:
        return IdSpoilt
    return StartFailed


def was_given_up(order: StartOrder) -> Cancelled:
    return Cancelled(f"The start of '{order.model}' was given up: it was to be stopped.")


def image_missing(order: StartOrder, image: str, reason: str) -> ImageMissing:
    command = missing_image_help(image, order.launch.service)
    return ImageMissing(f"'{order.model}' needs the image '{image}': {reason}. Get it with `{command}`.")
