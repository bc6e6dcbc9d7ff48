"""What was promised: a claim starts once its room is there, and is planned again if it will not come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from orchestrator.core.draft import Draft, remembered
from orchestrator.core.endings import replan
from orchestrator.core.entities import DeviceId, Start
from orchestrator.core.lifecycle import LEAVING, Instance, Signal, State
from orchestrator.core.measuring import MOST_OVERHEAD_BYTES, overhead_bytes
from orchestrator.core.snapshot import SAMPLE_LIMIT_S
from orchestrator.core.wording import mib

SETTLES_S = 10.0
"""How long what an engine was told to start may use memory before the engine has said which process it is."""


def start_the_claimed(draft: Draft) -> None:
    """Start every claim whose room is there, in the order of the claims: nobody passes one."""
    claims = sorted(
        (i for i in draft.instances.values() if i.state is State.CLAIMED),
        key=lambda i: (i.claimed_at_s, i.attempt or ""),
    )
    promised = [draft.kept_back(claim) for claim in claims]
    later: Counter[DeviceId] = Counter()
    for own in promised:
        later.update(own)
    for claim, own in zip(claims, promised, strict=True):
        later.subtract(own)
        if has_room(draft, claim, later):
            start(draft, claim)
        elif is_hopeless(draft, claim, later) or is_blind(draft, claim):
            draft.note(
                "replanned", f"the room promised to '{claim.model}' did not come; planning again", claim
            )
            replan(draft, claim)


def has_room(draft: Draft, claim: Instance, later: Counter[DeviceId]) -> bool:
    """Available, counting this claim and earlier ones, on a sample newer than the last release there."""
    return all(
        is_fresh(draft, device)
        and room_for(draft, device, later) >= 0
        and not is_start_in_the_dark(draft, claim, device)
        for device in claim.placement
    )


def room_for(draft: Draft, device: DeviceId, later: Counter[DeviceId]) -> int:
    """What is available to a claim; `later` is what those after it were promised and have not taken."""
    return draft.available(device) + later[device]


def is_fresh(draft: Draft, device: DeviceId) -> bool:
    if draft.reading(device) is None:
        draft.wake(draft.now_s + SAMPLE_LIMIT_S)
        return False
    return draft.snapshot.sample.taken_at_s >= draft.snapshot.released_at_s.get(device, 0.0)


@remembered
def is_on_the_move(draft: Draft, device: DeviceId) -> bool:
    """Somebody's processes end or begin: for a moment their bytes may be nobody's, and so count twice."""
    return any(
        i.state in (State.STOPPING, State.RECLAIMING)
        or (i.state is State.STARTING and may_have_more(draft, i, device))
        or is_newer_than_sample(draft, i)
        for i in draft.on_device(device)
    )


def is_newer_than_sample(draft: Draft, instance: Instance) -> bool:
    """It was measured before the engine said which process it is: there its bytes are a stranger's."""
    is_up = instance.state in (State.STARTING, State.READY) and instance.port is not None
    return is_up and draft.snapshot.sample.taken_at_s < instance.since_s


def may_count_twice(draft: Draft, device: DeviceId) -> bool:
    """A stranger there may be a start's own process, while what that was promised is kept back beside it."""
    reading = draft.reading(device)
    if reading is None or not reading.foreign:
        return False
    return any(
        (is_unnamed(draft, i) or is_newer_than_sample(draft, i)) and draft.kept_back(i)[device]
        for i in draft.on_device(device)
    )


def is_unnamed(draft: Draft, instance: Instance) -> bool:
    """The engine has not said yet which process it is."""
    is_starting = instance.state is State.STARTING and instance.port is None
    return is_starting and draft.now_s < instance.since_s + SETTLES_S


def may_have_more(draft: Draft, starting: Instance, device: DeviceId) -> bool:
    """It may be any process; or memory was taken since that nobody explains."""
    if is_unnamed(draft, starting):
        return True
    return overhead_bytes(draft.snapshot, starting.attempt or "", device) > MOST_OVERHEAD_BYTES


def is_start_in_the_dark(draft: Draft, claim: Instance, device: DeviceId) -> bool:
    """Where PIDs cannot be read, growth belongs to the one that starts: so one at a time."""
    reading = draft.reading(device)
    if reading is None or reading.attributed:
        return False
    return any(may_grow(draft, i) and i.model != claim.model for i in draft.on_device(device))


def may_grow(draft: Draft, instance: Instance) -> bool:
    """It starts; or it is ready, and the sample that its growth ends with is still to come."""
    is_ready_since_s = instance.ready_at_s or 0.0
    return instance.state is State.STARTING or is_ready_since_s > draft.snapshot.sample.taken_at_s


def is_hopeless(draft: Draft, claim: Instance, later: Counter[DeviceId]) -> bool:
    """Even with everybody gone who leaves, the room is not there: somebody else took it."""
    for device in claim.placement:
        if not is_fresh(draft, device) or room_for(draft, device, later) >= 0:
            continue
        if is_on_the_move(draft, device):
            continue  # too early to say
        leavers = (i for i in draft.on_device(device) if i.model != claim.model and i.state in LEAVING)
        if room_for(draft, device, later) + draft.freed_by(leavers, device) < 0:
            return True
    return False


def is_blind(draft: Draft, claim: Instance) -> bool:
    """One of its devices has not been measurable for a while: it must not keep the others."""
    sample = draft.snapshot.sample
    if not (sample.readings or sample.errors):
        return False  # the first sample is still to come
    return any(draft.snapshot.blind_s(device) > SAMPLE_LIMIT_S for device in claim.placement)


def start(draft: Draft, claim: Instance) -> None:
    started = draft.move(claim, Signal.START, started_at_s=draft.now_s)
    model = draft.model(claim.model)
    if model is not None:
        draft.wake(draft.now_s + model.start_timeout_s)
    chosen = dict(claim.parameters)
    text = f"'{claim.model}' starts on {described(draft, claim)}{in_words(chosen)}"
    draft.note("starting", text, started, **({"parameters": chosen} if chosen else {}))
    draft.act(Start(started.attempt or "", started.model, started.placement, started.parameters))


def in_words(parameters: Mapping[str, int]) -> str:
    """With what it is run, where that was chosen."""
    chosen = ", ".join(f"{name} {value}" for name, value in parameters.items())
    return f" with {chosen}" if chosen else ""


def described(draft: Draft, instance: Instance) -> str:
    return ", ".join(f"{draft.device_name(d)} ({mib(size)})" for d, size in instance.placement.items())
