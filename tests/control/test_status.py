"""What is shown of a device, against the shape that is promised."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.api.shapes import DeviceView, ModelView
from orchestrator.control.status import device_view, model_view
from orchestrator.core.entities import MIB, Failure, ForeignProcess, Sample
from orchestrator.core.lifecycle import State
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
