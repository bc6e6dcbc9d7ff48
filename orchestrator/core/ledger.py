"""Who holds how many bytes where, and the one formula for what is available.

    available = free as measured - headroom - sum over holders of max(0, reserved - measured use)

What was promised and not yet taken is kept back; what was taken is already gone from `free`. So foreign
use and bytes that return late count by themselves, and a half-loaded model is counted once.
"""

from __future__ import annotations

from collections.abc import Iterable

from orchestrator.core.entities import Device, DeviceId, Reading
from orchestrator.core.lifecycle import Instance, State


def measured_use(instance: Instance, device: DeviceId, reading: Reading) -> int:
    """What the instance uses on the device: its processes' bytes, or the growth we put down to it.

    Where PIDs can be read by now, what was assumed before does not count: without processes it has nothing.
    """
    used = reading.by_attempt.get(instance.attempt or "")
    assumed = 0 if reading.attributed else instance.assumed_bytes.get(device, 0)
    return assumed if used is None else used


def kept_back(instance: Instance, device: DeviceId, reading: Reading) -> int:
    """Promised to the instance and not taken yet."""
    if not instance.holds_reservation:
        return 0
    return max(0, instance.placement.get(device, 0) - measured_use(instance, device, reading))


def available_bytes(device: Device, reading: Reading, holders: Iterable[Instance]) -> int:
    """What nobody holds and nobody was promised; negative while victims of a claim still leave."""
    promised = sum(kept_back(holder, device.id, reading) for holder in holders)
    return reading.free_bytes - device.headroom_bytes - promised


def held_bytes(instance: Instance, device: DeviceId, reading: Reading) -> int:
    """What becomes available once the instance is gone and the device has shown it."""
    if instance.state is State.RECLAIMING:
        return coming_back(instance, device, reading)
    if not instance.holds_reservation:
        return 0
    return max(instance.placement.get(device, 0), measured_use(instance, device, reading))


def freed_bytes(leavers: Iterable[Instance], device: DeviceId, reading: Reading) -> int:
    """What becomes available once all of them are gone.

    Of several that give back memory at the same time each may have held the bytes that are still
    unexplained; together they cannot free them twice.
    """
    leaving, returning = 0, 0
    own_of_returning = 0
    for leaver in leavers:
        if leaver.state is State.RECLAIMING:
            returning += coming_back(leaver, device, reading)
            own_of_returning += reading.by_attempt.get(leaver.attempt or "", 0)
        else:
            leaving += held_bytes(leaver, device, reading)
    return leaving + min(returning, own_of_returning + reading.unexplained_bytes)


def coming_back(instance: Instance, device: DeviceId, reading: Reading) -> int:
    """Bytes of a gone instance that the device still shows as used.

    They are its own processes' last bytes, or have become unexplained: more of the device is in use than
    its processes account for, beyond what was so before it left.
    """
    held = instance.held_bytes.get(device, 0)
    lingering = max(0, reading.unexplained_bytes - instance.unexplained_before.get(device, 0))
    return min(held, reading.by_attempt.get(instance.attempt or "", 0) + lingering)
