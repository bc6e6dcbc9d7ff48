"""What is shown of a device, against the shape that is promised."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from orchestrator.api.shapes import DeviceView, ModelView, PlanView
from orchestrator.control.forecast import preview_view
from orchestrator.control.status import device_view, model_view
from orchestrator.core.entities import (
    MIB,
    Demand,
    Failure,
    ForeignProcess,
    Launch,
    Model,
    Sample,
    Split,
    Variant,
)
from orchestrator.core.lifecycle import State
from orchestrator.core.preview import preview
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.verdicts import Broken
from orchestrator.core.wording import explain
from tests.core.worlds import gpu, instance, model, world

GPU0 = "GPU-0"
COMFY, NAMELESS = "c0" * 32, "07" * 32


def test_what_a_model_holds_where_nobody_can_see_it_is_not_zero() -> None:
    snapshot = world([gpu(0, 24000)], [model("a", 600)], [instance("a", State.READY, {GPU0: 600})])
    held = {"reserved_mib": 600, "used_mib": 600}
    assert memory_of(snapshot) == {GPU0: held}
    lost = replace(snapshot, sample=Sample(snapshot.now_s, {}, {GPU0: "it left the bus"}))
    assert memory_of(lost) == {GPU0: {**held, "used_mib": None}}


@pytest.mark.parametrize(
    ("failure", "has_log"),
    [
        (Failure("there is no image", "image_missing"), False),
        (Failure("it exited with code 3", exit_code=3), True),
        (Failure("it was not healthy in time"), True),
    ],
    ids=lambda value: str(getattr(value, "code", value)),
)
def test_only_what_ran_has_a_log_to_look_at(failure: Failure, has_log: bool) -> None:
    snapshot = world([gpu(0, 24000)], [model("a", 600)], [instance("a", State.FAILED, failure=failure)])
    view = ModelView.model_validate(model_view(snapshot, "a"))
    assert view.failure is not None
    assert view.failure.has_log is has_log
    told = explain(Broken("a", failure, None), 0.0).message
    assert ("orchestrator logs a" in told) is has_log


def memory_of(snapshot: Snapshot) -> object:
    view = ModelView.model_validate(model_view(snapshot, "a"))
    assert view.instance is not None
    return {device: part.model_dump() for device, part in view.instance.memory.items()}


def test_each_foreign_process_is_shown_with_its_container() -> None:
    foreign = (
        ForeignProcess(10, "python3", 12000 * MIB, COMFY),
        ForeignProcess(11, "pt_main_thread", 288 * MIB, COMFY),
        ForeignProcess(12, "whisper", 3 * MIB, NAMELESS),
        ForeignProcess(812, "Xorg", 900 * MIB),
    )
    snapshot = world([gpu(0, 24000)], [], container_names={COMFY: "comfyui"})
    reading = replace(snapshot.sample.readings[GPU0], foreign=foreign)
    view = device_view(replace(snapshot, sample=replace(snapshot.sample, readings={GPU0: reading})), GPU0)
    fields = ("pid", "name", "container", "container_name", "used_mib")
    assert view["foreign"] == [
        dict(zip(fields, values, strict=True))
        for values in (
            (10, "python3", COMFY, "comfyui", 12000),
            (11, "pt_main_thread", COMFY, "comfyui", 288),
            (12, "whisper", NAMELESS, None, 3),
            (812, "Xorg", None, None, 900),
        )
    ]
    assert view["foreign_mib"] == 13191
    assert DeviceView.model_validate(view).model_dump()["foreign"] == view["foreign"]


def test_what_is_lacking_is_no_negative_room() -> None:
    """Others have 24100 of 24176 MiB, so that 436 of the headroom of 512 are theirs."""
    snapshot = world([gpu(0, 24176, headroom_mib=512)], [model("a", 1)], foreign_mib={GPU0: 24100})
    view = DeviceView.model_validate(device_view(snapshot, GPU0))
    assert (view.available_mib, view.overcommitted_mib, view.free_mib) == (0, 436, 76)
    (device,) = planned(snapshot)["devices"]
    fields = ("available_mib", "available_after_mib", "overcommitted_mib")
    assert [device[field] for field in fields] == [0, 0, 436]
    roomy = device_view(world([gpu(0, 24176, headroom_mib=512)], []), GPU0)
    assert (roomy["available_mib"], roomy["overcommitted_mib"]) == (23664, 0)


# --- footprints


def over_two() -> Demand:
    """5000 MiB on one GPU, 3000 on each of two."""
    one, each = {"weights": 5000 * MIB}, {"weights": 3000 * MIB}
    splits = (
        Split(5000 * MIB, 0, "measured", {"gpu0": one}),
        Split(3000 * MIB, 0, "predicted", {"gpu0": each, "gpu1": each}),
    )
    return Demand(5000 * MIB, source="measured", breakdown={"gpu0": one}, splits=splits)


def flexible() -> Model:
    """8000 MiB or 5000 on one GPU, by its context."""
    larger = Variant({"context_size": 32}, Demand(8000 * MIB), Launch("test"))
    least = Variant({"context_size": 8}, over_two(), Launch("test"))
    return model("a", 0, demand=least.demand, variants=(larger, least), gpu_counts=(1, 2))


@pytest.mark.parametrize(
    ("context_size", "placement", "expected"),
    [
        (32, {GPU0: 8000}, (8000, False)),
        (8, {GPU0: 5000}, (5000, False)),
        (8, {GPU0: 3000, "GPU-1": 3000}, (6000, False)),
        (None, {}, (5000, True)),
        (None, {GPU0: 7000}, (5000, True)),
    ],
)
def test_the_footprint_is_of_the_way_in_which_it_runs(
    context_size: int | None, placement: dict[str, int], expected: tuple[int, bool]
) -> None:
    """One that was taken over runs as nobody knows."""
    chosen = {"context_size": context_size} if context_size else {}
    here = instance("a", State.READY if placement else State.STOPPED, placement, parameters=chosen)
    view = model_view(world([gpu(0, 24000), gpu(1, 24000)], [flexible()], [here]), "a")
    footprint = ModelView.model_validate(view).footprint
    assert footprint is not None
    assert (footprint.gpu_mib, footprint.is_least) == expected
    assert len(footprint.breakdown) == (len(placement) or 1 if context_size != 32 else 0)


def planned(snapshot: Snapshot) -> dict[str, Any]:
    found = preview(snapshot, {}, snapshot.models["a"])
    return PlanView.model_validate(preview_view(snapshot, found, ())).model_dump()


def test_a_plan_shows_the_footprint_of_the_way_that_it_tells() -> None:
    over_both = planned(world([gpu(0, 3500), gpu(1, 3500)], [flexible()]))
    assert [device["takes_mib"] for device in over_both["devices"]] == [3000, 3000]
    assert over_both["footprint"]["source"] == "predicted", "only on one GPU was it measured"
    assert over_both["footprint"]["breakdown"] == {"gpu0": {"weights": 3000}, "gpu1": {"weights": 3000}}
    refused = planned(world([gpu(0, 2500), gpu(1, 2500)], [flexible()]))
    assert refused["refusal"]["needed_mib"] == 3000
    assert (refused["footprint"]["gpu_mib"], len(refused["footprint"]["breakdown"])) == (6000, 2)
