"""What GPUs report of themselves, as a part of the snapshot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from orchestrator.core.entities import DeviceId, Note
from orchestrator.core.health import Blame, Fault, Incident, Reported
from orchestrator.core.lifecycle import HAS_PROCESS, Instance
from orchestrator.core.snapshot import Snapshot

KEPT = 20


def incidents_heard(state: Snapshot, incidents: Iterable[Incident]) -> Snapshot:
    """Note each; a program's fault is put down to a model only where it can be nobody else's."""
    for incident in incidents:
        guilty = only_user(state, incident.device) if incident.blame is Blame.PROGRAM else None
        state = reported(state, incident, guilty)
        if guilty is not None and guilty.attempt is not None:
            fault = state.faults.get(guilty.attempt) or Fault(state.now_s, incident.text)
            state = replace(state, faults={**state.faults, guilty.attempt: fault})
    return state


def reported(state: Snapshot, incident: Incident, guilty: Instance | None) -> Snapshot:
    device = state.devices.get(incident.device)
    name = device.label if device else incident.device
    whose = f"; '{guilty.model}' alone was on it" if guilty else ""
    note = Note(
        "gpu_error",
        f"{name} reports {incident.text}{whose}",
        guilty.model if guilty else None,
        guilty.attempt if guilty else None,
        {"device": incident.device, "xid": incident.code, "blame": incident.blame.value},
    )
    kept = (*state.incidents, Reported(state.wall_s, incident))[-KEPT:]
    return replace(state, incidents=kept, notes=(*state.notes, note))


def only_user(state: Snapshot, device: DeviceId) -> Instance | None:
    """The one instance that uses the GPU; None if there are several, or anybody else, or who knows whom."""
    reading = state.reading(device)
    if reading is None or not reading.attributed or reading.foreign:
        return None
    users = [i for i in state.instances.values() if i.state in HAS_PROCESS and device in i.placement]
    return users[0] if len(users) == 1 else None
