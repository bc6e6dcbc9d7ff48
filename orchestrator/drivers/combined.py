"""Several drivers of devices sampled as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.control.ports import Devices, Roots
from orchestrator.core.entities import AttemptId, Device, Sample
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
        whole = Sample(now_s)
        for number, part in enumerate(self._parts):
            try:
                sample = part.sample(roots, now_s)
            except OrchestratorError as error:
                sample = Sample(now_s, errors={d.id: error.message for d in self._of_part[number]})
            whole = joined(whole, sample)
        return whole

    def close(self) -> None:
        """Close the parts that are open."""
        for number in list(self._of_part):
            del self._of_part[number]
            self._parts[number].close()


def joined(one: Sample, other: Sample) -> Sample:
    """Both, of the same moment; no device is in both."""
    return Sample(
        one.taken_at_s,
        readings={**one.readings, **other.readings},
        errors={**one.errors, **other.errors},
        broken=one.broken | other.broken,
        telemetry={**one.telemetry, **other.telemetry},
        incidents=one.incidents + other.incidents,
    )
