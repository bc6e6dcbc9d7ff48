"""What NVML tells of a GPU for display: load, temperature, power, memory errors, slowed clocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pynvml

from orchestrator.core.entities import DeviceId
from orchestrator.core.health import Telemetry
from orchestrator.drivers.nvml_errors import CANNOT, NVML_ERRORS, code_of

T = TypeVar("T")

_UNCORRECTED, _CORRECTED = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED
_SINCE_LOADED = pynvml.NVML_VOLATILE_ECC
# An idle card is not slowed, and clocks that somebody has set on purpose are not either.
_THROTTLED_BY = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "power limit",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware",
    pynvml.nvmlClocksEventReasonSyncBoost: "another GPU of its group",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "temperature",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "temperature (hardware)",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power supply",
}
# A driver without a function never has it; one that a card cannot do is not asked again.
_NEVER = CANNOT | {pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH}


class TelemetryReader:
    """Reads what a card can tell. What it cannot is None, and not asked for again until `forget`."""

    def __init__(self) -> None:
        self._cannot: set[tuple[DeviceId, str]] = set()

    def forget(self) -> None:
        """NVML was initialised again: another driver may tell more."""
        self._cannot.clear()

    def read(self, uuid: DeviceId, handle: Any) -> Telemetry:
        def ask(what: str, query: Callable[[], T]) -> T | None:
            return self._ask(uuid, what, query)

        rates = ask("load", lambda: pynvml.nvmlDeviceGetUtilizationRates(handle))
        power_mw = ask("power", lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
        limit_mw = ask("limit", lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        return Telemetry(
            utilization_percent=rates.gpu if rates else None,
            memory_utilization_percent=rates.memory if rates else None,
            temperature_c=ask("temperature", lambda: _temperature(handle)),
            power_w=None if power_mw is None else power_mw / 1000,
            power_limit_w=None if limit_mw is None else limit_mw / 1000,
            ecc_corrected=ask("corrected", lambda: _errors(handle, _CORRECTED)),
            ecc_uncorrected=ask("uncorrected", lambda: _errors(handle, _UNCORRECTED)),
            throttled_by=_throttled_by(ask("clocks", lambda: _clock_reasons(handle)) or 0),
        )

    def _ask(self, uuid: DeviceId, what: str, query: Callable[[], T]) -> T | None:
        """None also where the GPU is in trouble: whether it is, its memory tells."""
        if (uuid, what) in self._cannot:
            return None
        try:
            return query()
        except NVML_ERRORS as error:
            if code_of(error) in _NEVER:
                self._cannot.add((uuid, what))
            return None


def _temperature(handle: Any) -> int:
    celsius: int = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
    return celsius


def _errors(handle: Any, kind: int) -> int:
    count: int = pynvml.nvmlDeviceGetTotalEccErrors(handle, kind, _SINCE_LOADED)
    return count


def _clock_reasons(handle: Any) -> int:
    """A set of bits. Drivers before 535 know it by its old name."""
    try:
        reasons: int = pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
    except pynvml.NVMLError_FunctionNotFound:
        reasons = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    return reasons


def _throttled_by(reasons: int) -> tuple[str, ...]:
    return tuple(name for bit, name in _THROTTLED_BY.items() if reasons & bit)
