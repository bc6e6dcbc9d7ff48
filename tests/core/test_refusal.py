"""Why a model is refused: what it asks for and is not here, what it needs of how many GPUs, what helps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.core.entities import HOST, MIB, Demand, Launch, Model, Variant
from orchestrator.core.lifecycle import State
from orchestrator.core.planner import make_plan
from orchestrator.core.snapshot import Snapshot
from orchestrator.core.verdicts import Refused
from orchestrator.core.wording import Told, explain
from tests.core.worlds import NOW_S, busy, entry, gpu, instance, model, ram, world

CARDS = [replace(gpu(n, 24176, headroom_mib=512), name="RTX 3090") for n in (0, 1)]
BOTH = frozenset({"context_size", "n_gpu_layers"})


def house(wanted: Model, cards: int = 2) -> Snapshot:
    return world([*CARDS[:cards], ram(20000)], [wanted], entries=[entry(wanted.id)])


def told(wanted: Model, cards: int = 2) -> Told:
    verdict = make_plan(house(wanted, cards), {}).verdicts[f"r-{wanted.id}"]
    assert isinstance(verdict, Refused)
    return explain(verdict, NOW_S)


def test_more_gpus_than_there_are() -> None:
    found = told(model("g3", 3072, gpu_counts=(3,)))
    assert (found.code, found.status) == ("cannot_ever_fit", 409)
    assert found.message == (
        "'g3' is to be split over 3 GPUs, and there are only 2 here: GPU 0 (RTX 3090), GPU 1 (RTX 3090). "
        "Nothing was unloaded. Let its entry say `gpus: 2` or `gpus: auto`."
    )
    assert "there is only 1 here: GPU 0 (RTX 3090)." in told(model("g3", 3072, gpu_counts=(3,)), 1).message


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (("GPU-123",), "GPU-123, and no GPU here has that UUID"),
        (("GPU-0", "GPU-123"), "GPU-123, and no GPU here has that UUID"),
        (("GPU-123", "GPU-456"), "GPU-123 and GPU-456, and no GPU here has those UUIDs"),
    ],
)
def test_a_uuid_that_no_gpu_has(devices: tuple[str, ...], said: str) -> None:
    found = told(model("lost", 3072, devices=devices, gpu_counts=(len(devices),)))
    assert found.code == "cannot_ever_fit"
    assert found.message == (
        f"'lost' asks for {said}. GPU 0 (RTX 3090) is GPU-0, GPU 1 (RTX 3090) is GPU-1. "
        "Nothing was unloaded. Correct `gpus` in its entry."
    )


def test_a_uuid_where_there_is_no_gpu() -> None:
    found = told(model("lost", 3072, devices=("GPU-123",)), cards=0)
    assert "no GPU here has that UUID. There is none." in found.message


def test_over_several_gpus_the_whole_is_said_and_what_each_can_give() -> None:
    found = told(model("huge", 61440, gpu_counts=tuple(range(1, 17))))
    assert found.message == (
        "'huge' needs 61440 MiB over 2 GPUs, 30720 MiB on each, but GPU 0 (RTX 3090) can give at most "
        "23664 MiB even when empty. Nothing was unloaded. "
        "Take a smaller model, or correct the `memory` that its entry declares."
    )
    assert (found.details["gpus"], found.details["needed_mib"]) == (2, 30720)


def predicted(gpu_mib: int, **more: object) -> Model:
    demand = Demand(gpu_mib * MIB, source="predicted")
    return replace(model("a", 0), demand=demand, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wanted", "advice"),
    [
        (predicted(99999), "Take a smaller model."),
        (
            predicted(99999, tunable=frozenset({"context_size"})),
            "Take a smaller model or a smaller context_size.",
        ),
        (
            predicted(99999, tunable=BOTH),
            "Take a smaller model, a smaller context_size or fewer n_gpu_layers.",
        ),
        (predicted(40000), "Take a smaller model, or allow more `gpus`."),
        (predicted(40000, devices=("GPU-1",)), "Take a smaller model, or allow more `gpus`."),
        (predicted(60000, gpu_counts=(1, 2)), "Take a smaller model."),
        (
            model("a", 99999),
            "Take a smaller model, or correct the `memory` that its entry declares.",
        ),
        (
            model("a", 40000),
            "Take a smaller model, allow more `gpus`, or correct the `memory` that its entry declares.",
        ),
    ],
)
def test_what_is_advised_could_help(wanted: Model, advice: str) -> None:
    assert told(wanted).message.endswith(f"Nothing was unloaded. {advice}")


def test_in_ram_fewer_layers_on_a_gpu_are_no_advice() -> None:
    wanted = replace(predicted(0, devices=(HOST,), tunable=BOTH), demand=Demand(0, 30000 * MIB, "predicted"))
    assert told(wanted).message == (
        "'a' needs 30000 MiB, but RAM (host) can give at most 20000 MiB even when empty. "
        "Nothing was unloaded. "
        "Raise host_memory_mib in orchestrator.yaml, or take a smaller model or a smaller context_size."
    )


def test_what_can_never_be_is_said_of_the_device_that_is_too_small() -> None:
    """A pinned model leaves less of the card than of the RAM, but it could go some day."""
    rock = instance("rock", State.READY, {"GPU-0": 20000})
    models = [model("rock", 20000, pinned=True), model("a", 20000, 30000)]
    snapshot = world([CARDS[0], ram(20000)], models, [rock], [entry("a")])
    verdict = make_plan(snapshot, {}).verdicts["r-a"]
    assert isinstance(verdict, Refused)
    assert (verdict.device, verdict.forever) == (HOST, True)


def layers_to_choose(*ways: tuple[int, int, int]) -> Model:
    """(layers on the GPU, MiB there, MiB in RAM), the largest first."""
    variants = tuple(
        Variant({"n_gpu_layers": count}, Demand(on_gpu * MIB, in_ram * MIB, "predicted"), Launch("test"))
        for count, on_gpu, in_ram in ways
    )
    return replace(model("a", 0), demand=variants[-1].demand, variants=variants)


def test_of_the_layers_to_choose_the_number_that_comes_closest_is_told() -> None:
    """None on the GPU would need the most RAM."""
    found = told(layers_to_choose((80, 44000, 500), (40, 22000, 22000), (0, 400, 44369)), cards=1)
    assert found.message == (
        "'a' needs 22000 MiB with n_gpu_layers 40, but RAM (host) can give at most 20000 MiB even when "
        "empty. Nothing was unloaded. Raise host_memory_mib in orchestrator.yaml, or take a smaller model."
    )
    assert found.details["parameters"] == {"n_gpu_layers": 40}


@pytest.mark.parametrize("is_busy", [False, True])
def test_what_does_not_fit_into_ram_without_the_gpu_can_still_have_room_made_there(is_busy: bool) -> None:
    wanted = layers_to_choose((80, 20000, 500), (40, 12000, 18000), (0, 400, 44369))
    here = instance("b", State.READY, {"GPU-0": 15000})
    snapshot = world([CARDS[0], ram(20000)], [wanted, model("b", 15000)], [here], [entry("a")])
    plan = make_plan(snapshot, busy("b") if is_busy else {})
    assert plan.verdicts == {}
    placed = plan.instances["a"]
    assert placed.state is State.CLAIMED
    assert placed.parameters == {"n_gpu_layers": 40 if is_busy else 80}, "the busy leave for the least only"
    assert plan.instances["b"].state is (State.DRAINING if is_busy else State.STOPPING)


def test_a_place_is_kept_for_the_least_that_can_be() -> None:
    wanted = layers_to_choose((80, 20000, 500), (40, 12000, 18000), (0, 400, 44369))
    young = instance("b", State.READY, {"GPU-0": 15000}, ready_at_s=NOW_S - 1)
    models = [wanted, model("b", 15000), model("c", 8500)]
    snapshot = world([CARDS[0], ram(20000)], models, [young], [entry("a", 40.0), entry("c", 1.0)])
    plan = make_plan(snapshot, busy("b"))
    assert plan.instances["c"].state is State.STARTING, "beside 12000 MiB there is room for it"
    assert plan.entries["a"].place_since_s == NOW_S
    assert plan.entries["a"].reason.startswith("it needs 30000 MiB, ")
