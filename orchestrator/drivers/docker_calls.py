"""Blocking conversations with the engine about this owner's containers; to be called in threads.

Every method raises EngineUnavailable where the engine does not answer, and may be called again after
that: each looks at what there is before it changes anything, or is a change that can be made twice.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import orjson
import requests
from docker import APIClient
from docker.errors import APIError, ImageNotFound, NotFound
from docker.types import CancellableStream
from docker.utils import convert_filters, kwargs_from_env

from orchestrator.control.ports import Exit, StartOrder
from orchestrator.core.errors import EngineError, EngineUnavailable, NameTaken, NoLog, StartFailed
from orchestrator.drivers.docker_boxes import ENDED, RUNNING, Box, Row
from orchestrator.drivers.docker_errors import (
    CONFLICT,
    GATEWAY_ERRORS,
    IdSpoilt,
    ImageNotHere,
    LimitsRefused,
    advice,
    asking,
    kind_of_start_failure,
    reason,
    was_given_up,
)
from orchestrator.drivers.docker_gpu import GpuMode, GpuPart, gpu_part, with_libraries
from orchestrator.drivers.docker_lent import Lent, Named
from orchestrator.drivers.docker_names import NAME_TRIES, Names
from orchestrator.drivers.docker_spec import (
    ATTEMPT_LABEL,
    MODEL_LABEL,
    OWNER_LABEL,
    PORT_LABEL,
    container_body,
    container_name,
)
from orchestrator.drivers.log_tail import FAILURE_LINES, last_lines

_CONNECTIONS = 64
_NETWORK_TRIES = 5
_EVENTS = ("die", "oom", "destroy")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the engine may be silent before it counts as not answering, in seconds.

    `look_s` for a question, and for a stop beyond its grace; `change_s` for creating, starting and removing:
    a start may have to wait for a slow GPU runtime. A silent event stream is opened anew after `events_s`
    and everything looked at, so that is how long an exit may go unseen where a stream is lost without an
    error. `pull_s` is for a pull that tells no progress.
    """

    look_s: float = 30.0
    change_s: float = 120.0
    health_s: float = 3.0
    events_s: float = 10.0
    pull_s: float = 600.0


class Calls:
    """`connect` first. Thread-safe after that."""

    def __init__(
        self, owner: str, network: str, base_url: str | None, limits: Limits, named: Named = dict
    ) -> None:
        self._owner = owner
        self._limits = limits
        self._network = network
        self._base_url = base_url
        self._named = named
        self._network_lock = threading.Lock()
        self._network_is_there = False
        self._gpu_mode = GpuMode.NONE
        self._raises_limits = True
        self._client: APIClient  # for questions
        self._slow: APIClient  # for changes
        self._quick: APIClient
        self._untyped: Any  # the one for changes again, for calls that its stubs leave without types
        self._names: Names
        self._lent: Lent

    def connect(self, choose_mode: Callable[[Mapping[str, Any]], GpuMode]) -> None:
        """Agree on a version and learn what the engine offers."""
        where = kwargs_from_env() if self._base_url is None else {"base_url": self._base_url}

        def client(version: str, limit_s: float) -> APIClient:
            options: dict[str, Any] = {"timeout": limit_s, "max_pool_size": _CONNECTIONS, **where}
            return APIClient(version=version, **options)

        with asking():
            self._client = client("auto", self._limits.look_s)
            version = self._client.api_version
            self._slow = client(version, self._limits.change_s)
            self._untyped = self._slow
            self._quick = client(version, self._limits.health_s)
            self._names = Names(self._slow, self._owner)
            self._lent = Lent(self._client, self._network, self._ensure_network, self._named)
            self._gpu_mode = choose_mode(self._client.info())

    def ping(self) -> None:
        with asking():
            self._quick.ping()

    # Starting

    def bring_up(self, order: StartOrder, image: str, is_given_up: Callable[[], bool]) -> Box:
        """Make sure that the attempt's container exists and was started, once.

        Raises ImageNotHere, NameTaken, StartFailed, or Cancelled, which leaves no container behind.
        """
        self._ensure_network()
        with asking():
            container = self._made_before(order) or self._create_and_start(order, image, is_given_up)
            box = self.inspect(container)
        if box is not None and box.is_running and not box.host:
            self.remove(container, force=True)  # it has no address: it must not run on unseen
            box = None
        if box is None:
            raise _was_removed(order)
        return box

    def _made_before(self, order: StartOrder) -> str | None:
        """The attempt's container, if an earlier call of ours, which got no answer, has started it.

        What has run is not started again, even if it has ended: that would be another attempt.
        """
        rows = self._rows_of(order)
        return next((row.id for row in rows if row.is_running or row.has_ended), None)

    def _rows_of(self, order: StartOrder) -> list[Row]:
        return self.rows(f"{ATTEMPT_LABEL}={order.attempt}")

    def _create_and_start(self, order: StartOrder, image: str, is_given_up: Callable[[], bool]) -> str:
        raises_limits = self._raises_limits
        try:
            return self._try_to_start(order, image, raises_limits, is_given_up)
        except LimitsRefused:
            if not raises_limits:
                raise
            self._raises_limits = False
        except IdSpoilt:  # the container is gone, and another one has another id
            pass
        return self._try_to_start(order, image, self._raises_limits, is_given_up)

    def _try_to_start(
        self, order: StartOrder, image: str, raises_limits: bool, is_given_up: Callable[[], bool]
    ) -> str:
        container = self._create(order, image, raises_limits)
        if is_given_up():
            self.remove(container, force=True)
            raise was_given_up(order)
        self._start(order, container)
        return container

    def _create(self, order: StartOrder, image: str, raises_limits: bool) -> str:
        """Create the container and return its id. The name guards against making a second one."""
        if rows := self._rows_of(order):  # made before, and not started; its name may have been another
            return rows[0].id
        name = container_name(order)
        gpu = self._gpu_part(order, image)
        body = container_body(order, image, self._owner, self._network, gpu, raises_limits=raises_limits)
        for _ in range(NAME_TRIES):
            try:
                return str(self._untyped.create_container_from_config(body, name)["Id"])
            except ImageNotFound as error:
                raise ImageNotHere(f"The engine has no image '{image}'.") from error
            except APIError as error:
                if error.status_code in GATEWAY_ERRORS:
                    raise
                if error.status_code != CONFLICT:
                    why = reason(error)
                    raise StartFailed(f"'{order.model}' could not be created: {why}.{advice(why)}") from error
            if (box := self._names.make_way(order, name)) is not None:
                return box
        raise NameTaken(
            f"'{order.model}' needs the container name '{name}', which does not become free: the engine is "
            f"still removing its holder. If that lasts, `docker rm -f {name}`, or restart the engine."
        )

    def _start(self, order: StartOrder, container: str) -> None:
        """Raises StartFailed, having removed the container."""
        try:
            self._start_on_network(container)
        except APIError as error:
            if error.status_code in GATEWAY_ERRORS:
                raise
            why = reason(error)
            if isinstance(error, NotFound) and "No such container" in why:
                raise _was_removed(order) from error
            self.remove(container, force=True)
            raise kind_of_start_failure(why)(
                f"'{order.model}' could not be started: {why}.{advice(why)}"
            ) from error

    def _start_on_network(self, container: str) -> None:
        for _ in range(_NETWORK_TRIES):
            try:
                self._slow.start(container)
                return
            except APIError as error:
                # Somebody has pruned the network, or is making a second one of its name just now.
                if not re.match(r"network .* (not found|is ambiguous)", reason(error)):
                    raise
                self._network_is_there = False
                self._ensure_network()
        self._slow.start(container)

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
        with self._network_lock, asking():
            if self._network_is_there:
                return
            found = self._networks()
            if not found:
                self._make_network()
                found = self._networks()
            # Older engines let two of a name pass, and then refuse it as ambiguous: the first one stays.
            for twin in found[1:]:
                with suppress(APIError):  # it is gone already
                    self._slow.remove_network(twin)
            self._network_is_there = True

    def _make_network(self) -> None:
        try:
            self._slow.create_network(
                self._network, driver="bridge", check_duplicate=True, labels={OWNER_LABEL: self._owner}
            )
        except APIError as error:
            if error.status_code != CONFLICT:
                raise EngineError(
                    f"The network '{self._network}' cannot be made: {reason(error)}."
                ) from error

    def _networks(self) -> list[str]:
        """The ids of the networks with our name, which the engine's filter takes for a part of a name."""
        listed = self._client.networks(names=[self._network])
        ours = [net for net in listed if net["Name"] == self._network]
        return [net["Id"] for net in sorted(ours, key=lambda net: (net["Created"], net["Id"]))]

    # Looking

    def rows(self, *labels: str) -> list[Row]:
        """All containers of this owner, running or not, that also have these labels (`name=value`).

        With them come those that are lent and run, as if they had the labels.
        """
        wanted = {"label": [f"{OWNER_LABEL}={self._owner}", ATTEMPT_LABEL, *labels]}
        with asking():
            listed = self._client.containers(all=True, filters=wanted)
            lent = self._lent.rows(labels)
        return lent + [
            Row(
                id=item["Id"],
                attempt=item["Labels"][ATTEMPT_LABEL],
                model=item["Labels"].get(MODEL_LABEL, ""),
                is_running=item["State"] in RUNNING,
                has_ended=item["State"] in ENDED,
                created_s=item["Created"],
            )
            for item in listed
        ]

    def inspect(self, container: str) -> Box | None:
        """None if there is no such container."""
        with asking():
            try:
                found = self._client.inspect_container(container)
            except NotFound:
                return None
        state = found["State"]
        lent = self._lent.identity(found)
        labels = lent.labels if lent else found["Config"]["Labels"] or {}
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
            is_lent=lent is not None,
            gpus=lent.gpus if lent else None,
        )

    def name_of(self, container: str) -> str | None:
        """Of any container, also of others'. None if there is no such container."""
        with asking():
            try:
                return str(self._client.inspect_container(container)["Name"]).removeprefix("/")
            except NotFound:
                return None

    def exit_of(self, box: Box) -> Exit:
        """How an ended container ended. One that was never started has no code."""
        code = None if box.status == "created" else box.exit_code
        with asking():
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
        with asking():
            try:
                if grace_s > 0:
                    self._client.stop(container, timeout=math.ceil(grace_s))
                else:
                    self._kill(container)
            except requests.exceptions.ReadTimeout:
                return
            except APIError as error:
                if error.status_code in GATEWAY_ERRORS:
                    raise

    def _kill(self, container: str) -> None:
        """Also while an earlier stop still waits."""
        try:
            self._client.kill(container)
        except APIError as error:
            if error.status_code != CONFLICT:
                raise
            # It waits for a restart that somebody has told the engine to make: only a stop ends that.
            self._client.stop(container, timeout=0)

    def remove(self, container: str, *, force: bool = False) -> None:
        """Remove it with its unnamed volumes; one that runs is left alone unless forced."""
        with asking():
            self._names.remove(container, force=force)

    def set_previous(self, container: str, order: StartOrder) -> None:
        with asking():
            self._names.set_previous(container, order)

    # Streams

    def events(self, since: str) -> CancellableStream[dict[str, Any]]:
        """Ends of this owner's containers, those from `since` (seconds.nanoseconds since 1970) first.

        Ends after a silence: the library's own call would wait for ever where a connection is dead
        and nobody has said so.
        """
        wanted = {"type": "container", "label": f"{OWNER_LABEL}={self._owner}", "event": list(_EVENTS)}
        with asking():
            answer = self._client.get(
                f"{self._client.base_url}/v{self._client.api_version}/events",
                params={"since": since, "filters": convert_filters(wanted)},
                stream=True,
                timeout=(self._limits.look_s, self._limits.events_s),
            )
            if not answer.ok:
                raise EngineUnavailable(f"The Docker engine tells no events: {answer.text.strip()}.")
            lines = answer.iter_lines()
        return CancellableStream((orjson.loads(line) for line in lines if line), answer)

    def log_stream(self, container: str, tail: int, follow: bool) -> CancellableStream[bytes]:
        """Raises NoLog if there is no such container any more."""
        with asking():
            try:
                return self._client.logs(container, stream=True, follow=follow, tail=tail)
            except NotFound as error:
                raise NoLog("There is no log: the container was removed.") from error

    def pull_lines(self, image: str) -> Iterator[Mapping[str, Any]]:
        """What the engine says while it pulls. Raises EngineError where it refuses."""
        with asking(trusts_failures=True):
            yield from self._client.pull(image, stream=True, decode=True)


def _was_removed(order: StartOrder) -> StartFailed:
    return StartFailed(f"The container of '{order.model}' was removed or disconnected by somebody.")
