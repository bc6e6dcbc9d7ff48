"""Blocking conversations with the engine about this owner's containers; to be called in threads.

Every method raises EngineUnavailable where the engine does not answer, and may be called again after
that: each looks at what there is before it changes anything, or is a change that can be made twice.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import requests
import urllib3
from docker import APIClient
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.types import CancellableStream
from docker.utils import kwargs_from_env

from orchestrator.control.ports import Exit, StartOrder
from orchestrator.core.entities import AttemptId, ModelId
from orchestrator.core.errors import Cancelled, EngineError, EngineUnavailable, NameTaken, NoLog, StartFailed
from orchestrator.drivers.docker_gpu import GpuMode, GpuPart, gpu_part, with_libraries
from orchestrator.drivers.docker_spec import (
    ATTEMPT_LABEL,
    MODEL_LABEL,
    OWNER_LABEL,
    PORT_LABEL,
    container_body,
    container_name,
)
from orchestrator.drivers.log_tail import FAILURE_LINES, last_lines

_ANSWER_S = 120.0  # a start may have to wait for a slow GPU runtime
_HEALTH_ANSWER_S = 3.0
_CONNECTIONS = 64
_NAME_TRIES = 50
_NETWORK_TRIES = 5
_NAME_PAUSE_S = 0.1
_EVENTS = ("die", "oom", "destroy")
_RUNNING = ("running", "paused", "restarting")
_ENDED = ("exited", "dead")
_CONFLICT = 409
_GATEWAY_ERRORS = (502, 503, 504)  # said by a proxy in front of the engine


class ImageNotHere(EngineError):
    """The engine does not have the image (yet)."""


class _LimitsRefused(StartFailed):
    """The engine may not give a container the limits that it was asked for."""


@dataclass(frozen=True, slots=True)
class Box:
    """A container of ours as the engine described it. `status` is the engine's word."""

    id: str
    attempt: AttemptId
    model: ModelId
    status: str
    pid: int
    host: str
    port: int
    exit_code: int
    oom: bool

    @property
    def is_running(self) -> bool:
        return self.status in _RUNNING

    @property
    def has_run(self) -> bool:
        """False for one that was created, and that the engine has not started (yet)."""
        return self.status != "created"


@dataclass(frozen=True, slots=True)
class Row:
    """A container of ours in the engine's list; `created_s` is seconds since 1970.

    One that neither runs nor has ended was created and not started yet, or never will be.
    """

    id: str
    attempt: AttemptId
    model: ModelId
    is_running: bool
    has_ended: bool
    created_s: int


class Calls:
    """`connect` first. Thread-safe after that."""

    def __init__(self, owner: str, network: str, base_url: str | None) -> None:
        self._owner = owner
        self._network = network
        self._base_url = base_url
        self._network_lock = threading.Lock()
        self._network_is_there = False
        self._gpu_mode = GpuMode.NONE
        self._raises_limits = True
        self._client: APIClient
        self._quick: APIClient
        self._untyped: Any  # the client again, for calls that its stubs leave without types

    def connect(self, choose_mode: Callable[[Mapping[str, Any]], GpuMode]) -> None:
        """Agree on a version and learn what the engine offers."""
        where = kwargs_from_env() if self._base_url is None else {"base_url": self._base_url}
        with _asking():
            self._client = APIClient(
                version="auto", timeout=int(_ANSWER_S), max_pool_size=_CONNECTIONS, **where
            )
            self._untyped = self._client
            version = self._client.api_version
            self._quick = APIClient(version=version, timeout=int(_HEALTH_ANSWER_S), **where)
            self._gpu_mode = choose_mode(self._client.info())

    def close(self) -> None:
        self._client.close()
        self._quick.close()

    def ping(self) -> None:
        with _asking():
            self._quick.ping()

    # Starting

    def bring_up(self, order: StartOrder, image: str, is_given_up: Callable[[], bool]) -> Box:
        """Make sure that the attempt's container exists and was started.

        Raises ImageNotHere, NameTaken, StartFailed, or Cancelled, which leaves no container behind.
        """
        self._ensure_network()
        with _asking():
            raises_limits = self._raises_limits
            try:
                container = self._create_and_start(order, image, raises_limits, is_given_up)
            except _LimitsRefused:
                if not raises_limits:
                    raise
                self._raises_limits = False
                container = self._create_and_start(order, image, False, is_given_up)
            box = self.inspect(container)
        if box is not None and box.is_running and not box.host:
            self.remove(container, force=True)  # it has no address: it must not run on unseen
            box = None
        if box is None:
            raise StartFailed(f"The container of '{order.model}' was removed or disconnected by somebody.")
        return box

    def _create_and_start(
        self, order: StartOrder, image: str, raises_limits: bool, is_given_up: Callable[[], bool]
    ) -> str:
        container = self._create(order, image, raises_limits)
        if is_given_up():
            self.remove(container, force=True)
            raise Cancelled(f"The start of '{order.model}' was given up: it was to be stopped.")
        self._start(order, container)
        return container

    def _create(self, order: StartOrder, image: str, raises_limits: bool) -> str:
        """Create the container and return its id. The name guards against making a second one."""
        name = container_name(order)
        body = container_body(
            order,
            image,
            self._owner,
            self._network,
            self._gpu_part(order, image),
            raises_limits=raises_limits,
        )
        for _ in range(_NAME_TRIES):
            try:
                return str(self._untyped.create_container_from_config(body, name)["Id"])
            except ImageNotFound as error:
                raise ImageNotHere(f"The engine has no image '{image}'.") from error
            except APIError as error:
                if error.status_code != _CONFLICT:
                    raise StartFailed(f"'{order.model}' could not be created: {_reason(error)}.") from error
            if (box := self._make_way(order, name)) is not None:
                return box
        raise NameTaken(f"The name '{name}' does not become free: the engine is still removing its holder.")

    def _make_way(self, order: StartOrder, name: str) -> str | None:
        """The name is taken: return the holder's id if it is this attempt's, else remove it if we may.

        Raises NameTaken.
        """
        try:
            holder = self._client.inspect_container(name)
        except NotFound:
            time.sleep(_NAME_PAUSE_S)  # it is being removed, or was just now
            return None
        labels = holder["Config"]["Labels"] or {}
        if labels.get(OWNER_LABEL) != self._owner:
            raise NameTaken(
                f"'{order.model}' needs the container name '{name}', which a container has that is not "
                f"ours. Remove that one with `docker rm -f {name}`, or change `container_name`."
            )
        if labels.get(ATTEMPT_LABEL) == order.attempt:
            return str(holder["Id"])
        if holder["State"]["Running"]:
            raise NameTaken(
                f"'{order.model}' needs the container name '{name}', which '{labels.get(MODEL_LABEL)}' has "
                f"and still runs under. Unload that, or `docker rm -f {name}`."
            )
        self.remove(holder["Id"])
        return None

    def _start(self, order: StartOrder, container: str) -> None:
        """Raises StartFailed, having removed the container."""
        try:
            self._start_on_network(container)
        except APIError as error:
            if error.status_code in _GATEWAY_ERRORS:
                raise
            self.remove(container, force=True)
            reason = _reason(error)
            kind = _LimitsRefused if "setting rlimit" in reason else StartFailed
            raise kind(f"'{order.model}' could not be started: {reason}.{_advice(reason)}") from error

    def _start_on_network(self, container: str) -> None:
        for _ in range(_NETWORK_TRIES):
            try:
                self._client.start(container)
                return
            except APIError as error:
                # Somebody has pruned the network, or is making a second one of its name just now.
                if not re.match(r"network .* (not found|is ambiguous)", _reason(error)):
                    raise
                self._network_is_there = False
                self._ensure_network()
        self._client.start(container)

    def _gpu_part(self, order: StartOrder, image: str) -> GpuPart:
        part = gpu_part(self._gpu_mode, order.gpus)
        if not part.binds:
            return part
        try:
            config = self._untyped.inspect_image(image)["Config"]
        except NotFound as error:
            raise ImageNotHere(f"The engine has no image '{image}'.") from error
        named = {k: v for k, v in order.launch.container_environment.items() if k == "LD_LIBRARY_PATH"}
        environment = with_libraries({**named, **part.environment}, config.get("Env") or ())
        return GpuPart(part.device_requests, part.devices, part.binds, environment)

    def _ensure_network(self) -> None:
        """Have exactly one bridge of our name, also if another process makes it at the same time."""
        with self._network_lock, _asking():
            if self._network_is_there:
                return
            found = self._networks()
            if not found:
                self._make_network()
                found = self._networks()
            # Older engines let two of a name pass, and then refuse it as ambiguous: the first one stays.
            for twin in found[1:]:
                with suppress(APIError):  # it is gone already
                    self._client.remove_network(twin)
            self._network_is_there = True

    def _make_network(self) -> None:
        try:
            self._client.create_network(
                self._network, driver="bridge", check_duplicate=True, labels={OWNER_LABEL: self._owner}
            )
        except APIError as error:
            if error.status_code != _CONFLICT:
                raise EngineError(
                    f"The network '{self._network}' cannot be made: {_reason(error)}."
                ) from error

    def _networks(self) -> list[str]:
        """The ids of the networks with our name, which the engine's filter takes for a part of a name."""
        listed = self._client.networks(names=[self._network])
        ours = [net for net in listed if net["Name"] == self._network]
        return [net["Id"] for net in sorted(ours, key=lambda net: (net["Created"], net["Id"]))]

    # Looking

    def rows(self, *labels: str) -> list[Row]:
        """All containers of this owner, running or not, that also have these labels (`name=value`)."""
        wanted = {"label": [f"{OWNER_LABEL}={self._owner}", ATTEMPT_LABEL, *labels]}
        with _asking():
            listed = self._client.containers(all=True, filters=wanted)
        return [
            Row(
                id=item["Id"],
                attempt=item["Labels"][ATTEMPT_LABEL],
                model=item["Labels"].get(MODEL_LABEL, ""),
                is_running=item["State"] in _RUNNING,
                has_ended=item["State"] in _ENDED,
                created_s=item["Created"],
            )
            for item in listed
        ]

    def inspect(self, container: str) -> Box | None:
        """None if there is no such container."""
        with _asking():
            try:
                found = self._client.inspect_container(container)
            except NotFound:
                return None
        labels, state = found["Config"]["Labels"], found["State"]
        network = (found["NetworkSettings"]["Networks"] or {}).get(self._network) or {}
        return Box(
            id=found["Id"],
            attempt=labels.get(ATTEMPT_LABEL, ""),
            model=labels.get(MODEL_LABEL, ""),
            status=state["Status"],
            pid=state["Pid"],
            host=network.get("IPAddress", ""),
            port=int(labels.get(PORT_LABEL, "0")),
            exit_code=state["ExitCode"],
            oom=bool(state.get("OOMKilled")),
        )

    def exit_of(self, box: Box) -> Exit:
        """How an ended container ended. One that was never started has no code."""
        code = None if box.status == "created" else box.exit_code
        with _asking():
            try:
                log = self._client.logs(box.id, tail=FAILURE_LINES)
            except APIError:
                log = b""  # it is being removed
        return Exit(code, box.oom, last_lines(log))

    # Ending

    def stop(self, container: str, grace_s: float) -> None:
        """Ask it to end and kill it after the grace, in whole seconds as the engine counts them.

        Whether it has ended is for the caller to see: the engine may answer early, late or not at all.
        """
        with _asking():
            try:
                if grace_s <= 0:
                    self._client.kill(container)  # also while an earlier stop still waits
                else:
                    self._client.stop(container, timeout=math.ceil(grace_s))
            except requests.exceptions.ReadTimeout:
                return
            except APIError as error:
                if error.status_code in _GATEWAY_ERRORS:
                    raise

    def remove(self, container: str, *, force: bool = False) -> None:
        """Remove it with its unnamed volumes; one that runs is left alone unless forced."""
        with _asking():
            try:
                self._client.remove_container(container, v=True, force=force)
            except NotFound:
                return
            except APIError as error:
                if error.status_code != _CONFLICT:  # it runs, or somebody else is removing it
                    raise

    # Streams

    def events(self, since: str) -> CancellableStream[dict[str, Any]]:
        """Ends of this owner's containers, those from `since` (seconds.nanoseconds since 1970) first."""
        wanted = {"type": "container", "label": f"{OWNER_LABEL}={self._owner}", "event": list(_EVENTS)}
        with _asking():
            return self._client.events(since=cast(Any, since), filters=wanted, decode=True)

    def log_stream(self, container: str, tail: int, follow: bool) -> CancellableStream[bytes]:
        """Raises StartFailed if there is no such container any more."""
        with _asking():
            try:
                return self._client.logs(container, stream=True, follow=follow, tail=tail)
            except NotFound as error:
                raise NoLog("There is no log: the container was removed.") from error

    def pull_lines(self, image: str) -> Iterator[Mapping[str, Any]]:
        """What the engine says while it pulls. Raises EngineError where it refuses."""
        with _asking():
            yield from self._client.pull(image, stream=True, decode=True)


@contextmanager
def _asking() -> Iterator[None]:
    """Turn the libraries' errors into ours: no answer is one thing, a refusal another."""
    try:
        yield
    except APIError as error:
        if error.status_code in _GATEWAY_ERRORS:
            raise EngineUnavailable(f"The Docker engine is not to be reached: {_reason(error)}.") from error
        raise EngineError(f"The Docker engine refused: {_reason(error)}.") from error
    except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, DockerException) as error:
        raise EngineUnavailable(f"The Docker engine does not answer: {error}.") from error


def _reason(error: APIError) -> str:
    return str(error.explanation or error).strip().rstrip(".")


def _advice(reason: str) -> str:
    """What to do about start failures whose text says little to those who have not met them."""
    if "could not select device driver" in reason:
        return (
            " The engine lacks the NVIDIA container toolkit: install it, or set `gpu_access: devices`,"
            " which binds the host's driver into the container."
        )
    if "CDI device" in reason or "unresolvable" in reason:
        return " Make the device names with `nvidia-ctk cdi generate --device-name-strategy=uuid`."
    return ""
