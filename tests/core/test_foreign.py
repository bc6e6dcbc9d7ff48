"""Whose the foreign memory is: names in the snapshot, and who is told in a refusal."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core import events as ev
from orchestrator.core.entities import MIB, ForeignProcess, Reading, Sample
from orchestrator.core.fold import fold
from orchestrator.core.foreign import foreign_holdings
from orchestrator.core.lifecycle import State
from orchestrator.core.planner import make_plan
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.verdicts import Holding, Refused, Unmeasured
from orchestrator.core.wording import explain, held_by
from tests.core.worlds import NOW_S, entry, gpu, instance, model, world

GPU0 = "GPU-0"
COMFY, OTHER = "c0" * 32, "07" * 32
COMFY_MAIN = ForeignProcess(10, "python3", 12000 * MIB, COMFY)
COMFY_CHILD = ForeignProcess(11, "pt_main_thread", 288 * MIB, COMFY)
DESKTOP = ForeignProcess(812, "Xorg", 900 * MIB)


def shown(*processes: ForeignProcess, taken_at_s: float = NOW_S) -> Sample:
    used = sum(process.used_bytes for process in processes)
    return Sample(taken_at_s, {GPU0: Reading(24000 * MIB - used, used, {}, processes)})


def seeing(*processes: ForeignProcess, **more: object) -> Snapshot:
    made = world([gpu(0, 24000)], [model("a", 20000)], entries=[entry("a")])
    return replace(made, sample=shown(*processes), **more)  # type: ignore[arg-type]


def after(snapshot: Snapshot, *events: ev.Event) -> Snapshot:
    return fold(snapshot, events, now_s=snapshot.now_s, wall_s=snapshot.wall_s)


# ---- names ----


def test_a_name_is_known_while_the_sample_shows_its_container() -> None:
    state = after(seeing(COMFY_MAIN), ev.ContainerNamed(COMFY, "comfyui"))
    assert state.container_names == {COMFY: "comfyui"}
    state = after(state, ev.Sampled(shown(COMFY_CHILD, DESKTOP)))
    assert state.container_names == {COMFY: "comfyui"}
    assert after(state, ev.Sampled(shown(DESKTOP))).container_names == {}


def test_a_name_that_comes_when_its_container_is_gone_is_not_kept() -> None:
    assert after(seeing(DESKTOP), ev.ContainerNamed(COMFY, "comfyui")).container_names == {}


def test_the_newest_name_counts() -> None:
    state = after(seeing(COMFY_MAIN), ev.ContainerNamed(COMFY, "a"), ev.ContainerNamed(COMFY, "b"))
    assert state.container_names == {COMFY: "b"}


# ---- who holds how much ----


def test_the_processes_of_a_container_are_one_holder_and_the_largest_is_first() -> None:
    holdings = foreign_holdings((DESKTOP, COMFY_CHILD, COMFY_MAIN), {COMFY: "comfyui"})
    assert holdings == (
        Holding("comfyui", 12288 * MIB, "container, not ours"),
        Holding("Xorg (PID 812)", 900 * MIB, "another program"),
    )


@pytest.mark.parametrize(
    ("processes", "who"),
    [
        ((COMFY_MAIN,), "python3 (PID 10) in c0c0c0c0c0c0"),
        ((COMFY_MAIN, COMFY_CHILD), "2 processes in c0c0c0c0c0c0"),
    ],
)
def test_a_container_without_a_name_is_known_by_its_id(
    processes: tuple[ForeignProcess, ...], who: str
) -> None:
    (holding,) = foreign_holdings(processes, {OTHER: "another"})
    assert (holding.holder, holding.why_kept) == (who, "container, not ours")


def refused(snapshot: Snapshot) -> Refused:
    (verdict,) = make_plan(snapshot, {}).verdicts.values()
    assert isinstance(verdict, Refused)
    return verdict


def test_a_refusal_names_the_container_with_its_bytes() -> None:
    told = explain(refused(seeing(COMFY_MAIN, DESKTOP, container_names={COMFY: "comfyui"})), NOW_S)
    assert told.code == "no_room_now"
    assert told.message == (
        "'a' needs 20000 MiB, but only 11100 MiB of GPU 0 (GPU 0) can be made available now; the rest is "
        "held by comfyui 12000 MiB (container, not ours), Xorg (PID 812) 900 MiB (another program). "
        "Nothing was unloaded. Free some of it and try again."
    )
    assert told.details["holders"] == [
        {"holder": "comfyui", "held_mib": 12000, "why_kept": "container, not ours"},
        {"holder": "Xorg (PID 812)", "held_mib": 900, "why_kept": "another program"},
    ]


def test_a_refusal_names_pinned_models_and_others_by_size() -> None:
    rock = instance("rock", State.READY, {GPU0: 6000})
    snapshot = world(
        [gpu(0, 24000)], [model("rock", 6000, pinned=True), model("a", 20000)], [rock], [entry("a")]
    )
    used = 12900 * MIB + 6000 * MIB
    reading = Reading(24000 * MIB - used, used, {"rock-1": 6000 * MIB}, (DESKTOP, COMFY_MAIN))
    snapshot = replace(snapshot, sample=Sample(NOW_S, {GPU0: reading}))
    assert [h.holder for h in refused(snapshot).holders] == [
        "python3 (PID 10) in c0c0c0c0c0c0",
        "rock",
        "Xorg (PID 812)",
    ]


def test_of_many_holders_the_last_are_a_sum() -> None:
    small = tuple(Holding(f"p{n}", n * MIB, "another program") for n in (9, 8, 7, 6, 5, 4, 3))
    assert held_by(small).endswith("p5 5 MiB (another program), 2 more 7 MiB")
    assert "more" not in held_by(small[:5])
    assert held_by(()) == ""


def test_what_nobody_lists_is_held_by_nobody_we_know() -> None:
    reading = Reading(4000 * MIB, 20000 * MIB, {}, unexplained_bytes=20000 * MIB)
    snapshot = replace(seeing(), sample=Sample(NOW_S, {GPU0: reading}))
    told = explain(refused(snapshot), NOW_S)
    assert "held by nobody we know 20000 MiB (memory of no process)" in told.message
    assert told.details["holders"] == [
        {"holder": "nobody we know", "held_mib": 20000, "why_kept": "memory of no process"}
    ]


def test_a_reason_that_devices_share_is_said_once_with_their_names() -> None:
    errors = {"GPU-a": "the driver hangs.", "GPU-b": "the driver hangs.", "GPU-c": "it must be reset."}
    labels = {"GPU-a": "GPU 0 (RTX 3090)", "GPU-b": "GPU 1 (RTX 3090)"}
    told = explain(Unmeasured("a", errors, labels), NOW_S)
    assert "(GPU 0 (RTX 3090), GPU 1 (RTX 3090): the driver hangs; GPU-c: it must be reset). " in told.message
    assert told.details["devices"] == errors
