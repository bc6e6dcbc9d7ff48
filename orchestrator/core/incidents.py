"""What GPUs report of themselves, as a part of the snapshot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import inf

from orchestrator.core.entities import MIB, DeviceId, Note, Reading, Sample
from orchestrator.core.health import Blame, Fault, Incident, Reported
from orchestrator.core.lifecycle import HAS_PROCESS, Instance
from orchestrator.core.snapshot import Snapshot

KEPT = 20

NOTED_ONCE_S = 10.0
"""The same error of the same GPU is noted once in so long: a card that fails may repeat it a hundred times a
second, and nothing else would be left in the event log."""

JUST_LEFT_S = 5.0
"""Who left the GPU so short a time ago may have done what is heard of now: most that fault end at once, and a
report is heard with the next sample only."""

BLIND_TOLD_S = 5.0

STRANGERS_BYTES = 96 * MIB
"""Less than any CUDA context takes, and more than what drivers put down to nobody: so much that no process
explains may be a program that cannot be seen."""


def incidents_heard(state: Snapshot, incidents: Iterable[Incident]) -> Snapshot:
    """Note what is news; a program's fault is put down to a model only where it can be nobody else's."""
    for incident in incidents:
        guilty = only_user(state, incident.device) if incident.blame is Blame.PROGRAM else None
        is_first_fault = guilty is not None and guilty.attempt not in state.faults
        if is_first_fault or not was_just_noted(state, incident):
            state = reported(state, incident, guilty)
        if is_first_fault and guilty is not None and guilty.attempt is not None:
            fault = Fault(state.now_s, incident.text)
            state = replace(state, faults={**state.faults, guilty.attempt: fault})
    return state


def was_just_noted(state: Snapshot, incident: Incident) -> bool:
    return any(
        known.incident == incident and abs(state.wall_s - known.at) < NOTED_ONCE_S
        for known in state.incidents
    )


def reported(state: Snapshot, incident: Incident, guilty: Instance | None) -> Snapshot:
    name = label_of(state, incident.device)
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


def with_blindness_told(state: Snapshot, sample: Sample) -> Snapshot:
    """Note once of a device that it has not been measurable for a while, and that it is again, before the
    sample is taken in. A hiccup is not worth a line."""
    before, last_s, notes = state.blind_since_s, state.sample.taken_at_s, []
    for device in {**before, **sample.errors}:
        since_s = before.get(device, sample.taken_at_s)
        was_told, name = last_s - since_s >= BLIND_TOLD_S, label_of(state, device)
        for_s, error = sample.taken_at_s - since_s, sample.errors.get(device)
        if error is not None and for_s >= BLIND_TOLD_S and not was_told:
            text = f"{name} has not been measurable for {for_s:.0f} s, and gets nothing meanwhile: {error}"
            notes.append(Note("unmeasured", text, data={"device": device}))
        if error is None and was_told:
            text = f"{name} can be measured again, after {for_s:.0f} s"
            notes.append(Note("measured", text, data={"device": device}))
    return replace(state, notes=(*state.notes, *notes)) if notes else state


def label_of(state: Snapshot, device: DeviceId) -> str:
    known = state.devices.get(device)
    return known.label if known else device


def with_strangers(state: Snapshot, sample: Sample) -> Snapshot:
    """When a program that is not ours was last seen on each GPU, or could have been there unseen."""
    seen = {d: sample.taken_at_s for d, reading in sample.readings.items() if may_have_strangers(reading)}
    return replace(state, strangers_s={**state.strangers_s, **seen}) if seen else state


def may_have_strangers(reading: Reading) -> bool:
    return bool(reading.foreign) or reading.unexplained_bytes > STRANGERS_BYTES


def only_user(state: Snapshot, device: DeviceId) -> Instance | None:
    """The one instance that uses the GPU; None if anybody else does, or has just left it, or may have."""
    reading = state.reading(device)
    left_s = max(state.released_at_s.get(device, -inf), state.strangers_s.get(device, -inf))
    if reading is None or not reading.attributed or state.now_s - left_s < JUST_LEFT_S:
        return None
    users = [i for i in state.instances.values() if i.state in HAS_PROCESS and device in i.placement]
    return users[0] if len(users) == 1 else None
