"""One thread that owns the devices and publishes what it measures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import structlog

from orchestrator.control.ports import Devices, Roots
from orchestrator.core.entities import AttemptId, Device, Sample
from orchestrator.core.errors import DeviceError, OrchestratorError

CALM_S = 0.5
HURRY_S = 0.025
HURRY_SHARE = 0.2
"""The part of the time that samples may take while in a hurry: listing processes takes the driver's lock,
for milliseconds on some cards, and whoever draws on the GPU waits for it."""

log = structlog.get_logger(__name__)


class Monitor:
    """Samples the devices twice a second, or every 25 ms while in a hurry, if that is cheap.

    A driver call that hangs leaves `latest` as it is, growing old; nobody else is held up by it.
    `roots`, `publish` and `clock` are called from the monitor's thread.
    """

    def __init__(
        self,
        devices: Devices,
        roots: Callable[[], Mapping[AttemptId, Roots]],
        publish: Callable[[Sample], None],
        clock: Callable[[], float],
    ) -> None:
        self._devices = devices
        self._roots = roots
        self._publish = publish
        self._clock = clock
        self._latest: Sample | None = None
        self._wake = threading.Condition()
        self._is_hurried = False
        self._is_asked = False
        self._is_closed = False
        self._opened: Future[tuple[Device, ...]] = Future()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    @property
    def latest(self) -> Sample | None:
        """The newest sample; None until the first."""
        return self._latest

    def open(self, timeout_s: float = 30.0) -> tuple[Device, ...]:
        """Start, and return the devices found. Blocks. Raises DeviceError, also if they do not answer."""
        self._thread.start()
        try:
            return self._opened.result(timeout_s)
        except TimeoutError:
            self.close(timeout_s=0)
            raise DeviceError(
                f"The driver of '{self._devices.name}' did not answer in {timeout_s:g} s."
            ) from None

    def hurry(self, wanted: bool) -> None:
        """Sample every 25 ms from now on, or twice a second again."""
        with self._wake:
            self._is_hurried = wanted
            self._wake.notify()

    def sample_now(self) -> None:
        """Ask for a sample that begins after this call; returns at once."""
        with self._wake:
            self._is_asked = True
            self._wake.notify()

    def close(self, timeout_s: float = 2.0) -> None:
        """Stop. A driver call that hangs is left to itself after `timeout_s`."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            devices = self._devices.open()
        except Exception as error:
            self._opened.set_exception(error)
            return
        self._opened.set_result(devices)
        try:
            self._sample_until_closed(devices)
        finally:
            self._devices.close()

    def _sample_until_closed(self, devices: tuple[Device, ...]) -> None:
        while not self._is_closed:
            began_s = time.monotonic()
            sample = self._measure(devices)
            took_s = time.monotonic() - began_s
            self._hand_out(sample)
            self._rest(began_s, hurry_s=min(CALM_S, max(HURRY_S, took_s / HURRY_SHARE)))

    def _measure(self, devices: tuple[Device, ...]) -> Sample:
        now_s = self._clock()
        try:
            return self._devices.sample(self._roots(), now_s)
        except Exception as error:  # whatever it is, what could not be measured must be seen as that
            log.warning("the devices could not be measured", exc_info=error)
            reason = (
                error.message if isinstance(error, OrchestratorError) else f"{type(error).__name__}: {error}"
            )
            return Sample(now_s, errors={device.id: f"It cannot be measured: {reason}" for device in devices})

    def _hand_out(self, sample: Sample) -> None:
        self._latest = sample
        if self._is_closed:
            return
        try:
            self._publish(sample)
        except Exception:  # the monitor outlives its listener: others read `latest`
            if not self._is_closed:
                log.exception("a sample could not be published")

    def _rest(self, began_s: float, hurry_s: float) -> None:
        with self._wake:
            while not (self._is_asked or self._is_closed):
                left_s = began_s + (hurry_s if self._is_hurried else CALM_S) - time.monotonic()
                if left_s <= 0:
                    return
                self._wake.wait(left_s)
            self._is_asked = False
