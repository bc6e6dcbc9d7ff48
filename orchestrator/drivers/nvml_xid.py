"""NVIDIA's error numbers (XID) in words, and whose fault each usually is.

Source: NVIDIA's XID catalogue. A number that is not here is reported as it is and blamed on nobody.
"""

from __future__ import annotations

from orchestrator.core.entities import DeviceId
from orchestrator.core.health import Blame, Incident

RECOVERY_ACTION_CHANGED = 154

_PROGRAM: dict[int, str] = {
    13: "an illegal instruction or access of a program",
    31: "a program's access to memory that it does not have",
    32: "a damaged command buffer of a program",
    69: "an illegal command of a program",
    94: "a memory error that was contained; the program that met it is lost",
}
_GPU: dict[int, str] = {
    62: "its own controller stopped",
    64: "a damaged row of memory could not be replaced",
    79: "it fell off the bus",
    95: "a memory error that could not be contained",
    109: "a change of contexts timed out",
    119: "its system processor did not answer",
    120: "its system processor failed",
    140: "a memory error that was not recovered from",
    143: "its start failed",
}
_NOBODY: dict[int, str] = {
    43: "a program's work was stopped",
    45: "a program's work was cleaned up after it ended, or after another error",
    48: "a memory error of two bits; what used the GPU may be lost",
    63: "a damaged row of memory is to be replaced",
    74: "an error of an NVLink connection",
    92: "many memory errors that were corrected",
    121: "an error of its chip-to-chip connection that was corrected",
    RECOVERY_ACTION_CHANGED: "what is needed for its recovery has changed",
}
_WORDS = {**_PROGRAM, **_GPU, **_NOBODY}

_ACTIONS: dict[int, str] = {
    1: "it must be reset",
    2: "the machine must be rebooted",
    4: "what runs there should end, and it must be reset",
    6: "its bus must be reset",
    7: "the machine must be rebooted",
}
_WORKS_MEANWHILE = frozenset({4})


def incident_of(device: DeviceId, xid: int) -> Incident:
    blame = Blame.PROGRAM if xid in _PROGRAM else Blame.GPU if xid in _GPU else Blame.NOBODY
    words = _WORDS.get(xid, "NVIDIA's catalogue of XID errors says what it means")
    return Incident(device, xid, blame, f"XID {xid}: {words}")


def action_in_words(action: int) -> str | None:
    """What the driver wants done, by its recovery action; None where the GPU may be used as it is."""
    return _ACTIONS.get(action)


def works_meanwhile(action: int) -> bool:
    """Whether what runs there goes on until the action is taken."""
    return action in _WORKS_MEANWHILE
