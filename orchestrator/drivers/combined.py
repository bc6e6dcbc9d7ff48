"""Several drivers of devices sampled as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.control.ports import Devices, Roots
from orchestrator.core.entities import AttemptId, Device, DeviceId, Reading, Sample
from orchestrator.core.errors import OrchestratorError


class CombinedDevices:
    """The devices of all parts, such as the GPUs and the RAM."""

    def __init__(self, parts: Sequence[Devices]) -> None:
        self._parts = tuple(parts)
        self._of_part: dict[int, tuple[Device, ...]] = {}
        self.name = "+".join(part.name for part in self._parts)

    def open(self) -> tuple[Device, ...]:
        """Raises DeviceError if any part does; the others are closed again."""
        try:
            for number, part in enumerate(self._parts):
                self._of_part[number] = part.open()
        except Exception:
            self.close()
            raise
        return tuple(device for devices in self._of_part.values() for device in devices)

    def sample(self, roots: Mapping[AttemptId, Roots], now_s: float) -> Sample:
        readings: dict[DeviceId, Reading] = {}
        errors: dict[DeviceId, str] = {}
        for number, part in enumerate(self._parts):
            try:
                sample = part.sample(roots, now_s)
            except OrchestratorError as error:
                errors |= {device.id: error.message for device in self._of_part[number]}
                continue
            readings |= sample.readings
            errors |= sample.errors
        return Sample(now_s, readings, errors)

    def close(self) -> None:
        """Close the parts that are open."""
        for number in list(self._of_part):
            del self._of_part[number]
            self._parts[number].close()
