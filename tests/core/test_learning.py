"""What is learned of loads, and what is not: pure."""

from dataclasses import replace

import pytest

from orchestrator.core.entities import (
    HOST,
    MIB,
    Demand,
    Device,
    DeviceKind,
    Entry,
    ForeignProcess,
    Launch,
    Model,
    Reading,
    Recipe,
    Sample,
    Split,
    Variant,
)
from orchestrator.core.events import Ended
from orchestrator.core.fold import fold
from orchestrator.core.learned import (
    FAR,
    KEPT_LOADS,
    OOM_STEP_BYTES,
    Learned,
    Load,
    key_of,
    with_higher_floor,
    with_load,
)
from orchestrator.core.learning import KEPT, card_of, learn, with_learned, with_lessons
from orchestrator.core.lifecycle import Instance, State
from orchestrator.core.planner import make_plan
from orchestrator.core.preview import Alternatives, would_fit
from orchestrator.core.snapshot import Measured, Snapshot, apply

RECIPE = Recipe("file", "service", 8192, 999, 4, "f16", "f16", 1)
PREDICTED, PROMPT = 10_000 * MIB, 110 * MIB
GPU = Device("GPU-0", 0, "RTX 3090", DeviceKind.GPU, 24_000 * MIB, 512 * MIB, driver="580.1")
OTHER = replace(GPU, id="GPU-1", index=1)
RAM = Device(HOST, 0, "RAM", DeviceKind.HOST, 32_000 * MIB)
DEMAND = Demand(PREDICTED, 500 * MIB, "predicted", {"gpu0": {"first_prompt": PROMPT}, "host": {"weights": 1}})
MODEL = Model("m", DEMAND, Launch("s"), recipe=RECIPE)
CARD = card_of(GPU)


def learned(*used_mib: int, recipe: Recipe = RECIPE, predicted: int = PREDICTED) -> Learned:
    loads = (Load(f"a{i}", mib * MIB, mib * MIB, float(i)) for i, mib in enumerate(used_mib))
    return Learned(recipe, CARD, predicted, tuple(loads))


def state(*known: Learned, model: Model = MODEL, devices: tuple[Device, ...] = (GPU, OTHER, RAM)) -> Snapshot:
    return Snapshot(
        now_s=100.0,
        wall_s=1e9,
        seed="t",
        devices={device.id: device for device in devices},
        models={model.id: model},
        sample=Sample(99.0),
        learned={each.key: each for each in known},
    )


def demand(*known: Learned, model: Model = MODEL) -> Demand:
    return with_lessons(state(*known, model=model)).models["m"].demand


# --- what is believed


def test_a_load_near_the_prediction_counts_at_once_with_a_first_prompt() -> None:
    found = demand(learned(9_500))
    assert (found.gpu_bytes, found.source) == (9_500 * MIB + PROMPT, "measured")
    assert (found.host_bytes, found.breakdown["host"]) == (DEMAND.host_bytes, {"weights": 1})
    assert found.breakdown["gpu0"] == {"measured": found.gpu_bytes}


def test_what_a_load_grew_to_counts_as_it_is() -> None:
    known = with_load(learned(9_500), "a0", 9_700 * MIB, 5.0)
    assert known.loads == (Load("a0", 9_500 * MIB, 9_700 * MIB, 5.0),)
    assert demand(known).gpu_bytes == 9_700 * MIB


@pytest.mark.parametrize(("grown_mib", "added_mib"), [(0, 110), (54, 110), (55, 55), (100, 100), (130, 130)])
def test_a_first_prompt_is_predicted_until_one_was_seen(grown_mib: int, added_mib: int) -> None:
    known = with_load(learned(9_500), "a0", (9_500 + grown_mib) * MIB, 5.0)
    assert demand(known).gpu_bytes == (9_500 + added_mib) * MIB
    again = with_load(known, "a1", 9_500 * MIB, 6.0)
    assert demand(again).gpu_bytes == (9_500 + added_mib) * MIB, "the next load has not had its prompt yet"


def test_a_load_far_from_the_prediction_counts_once_it_is_seen_twice() -> None:
    far = round(10_000 * (1 - FAR)) - 100
    assert demand(learned(far)) == DEMAND
    assert demand(learned(far, 5_000)) == DEMAND, "another odd one is no confirmation"
    assert demand(learned(far, far + 20)).source == "measured"
    assert demand(learned(9_500, 20_000)).gpu_bytes == 9_500 * MIB + PROMPT, "an odd one hides no good one"


def test_the_newest_loads_are_kept_and_the_highest_of_them_counts() -> None:
    known = learned(9_900, *[9_500] * KEPT_LOADS)
    kept = with_load(replace(known, loads=known.loads[:-1]), "new", 9_500 * MIB, 9.0)
    assert len(kept.loads) == KEPT_LOADS
    assert kept.measured_bytes(0) == 9_500 * MIB
    assert learned(9_900, 9_500).measured_bytes(0) == 9_900 * MIB


def test_growth_below_a_mib_is_no_news() -> None:
    known = learned(9_500)
    assert with_load(known, "a0", 9_500 * MIB + 1000, 5.0) is known
    assert with_load(known, "a0", 100 * MIB, 5.0) is known


# --- whose it is


@pytest.mark.parametrize(
    "change",
    [{"content": "x"}, {"service": "x"}, {"n_gpu_layers": 5}, {"parallel": 1}, {"gpus": 2}],
    ids=str,
)
def test_of_another_recipe_nothing_is_learned(change: dict[str, object]) -> None:
    other = replace(RECIPE, **change)  # type: ignore[arg-type]
    assert demand(learned(9_500, recipe=other)) == DEMAND
    assert key_of(other, CARD) != key_of(RECIPE, CARD)


@pytest.mark.parametrize("change", [{"context_size": 4096}, {"cache_type_k": "q8_0"}], ids=str)
def test_with_another_context_or_cache_the_measurement_is_moved(change: dict[str, object]) -> None:
    near = learned(7_800, recipe=replace(RECIPE, **change), predicted=8_000 * MIB)  # type: ignore[arg-type]
    found = demand(near)
    assert found.source == "measured, moved"
    assert found.gpu_bytes == 7_800 * MIB + PROMPT + PREDICTED - 8_000 * MIB
    assert demand(near, learned(9_500)).source == "measured", "its own goes first"


def test_the_nearest_context_is_moved() -> None:
    far = learned(7_000, recipe=replace(RECIPE, context_size=1024), predicted=7_000 * MIB)
    close = learned(9_000, recipe=replace(RECIPE, context_size=8448), predicted=10_000 * MIB)
    assert demand(far, close).gpu_bytes == 9_000 * MIB + PROMPT


@pytest.mark.parametrize("change", [{"driver": "590"}, {"name": "RTX 5090"}], ids=str)
def test_another_card_or_driver_is_another_thing(change: dict[str, str]) -> None:
    known = state(learned(9_500), devices=(replace(GPU, **change), RAM))  # type: ignore[arg-type]
    assert with_lessons(known) is known


def test_the_card_is_the_first_that_the_model_may_go_to() -> None:
    other = replace(OTHER, name="RTX 5090")
    known = replace(learned(9_500), card=card_of(other))
    there = state(known, model=replace(MODEL, devices=("GPU-1",)), devices=(GPU, other, RAM))
    assert with_lessons(there).models["m"].demand.source == "measured"
    assert with_lessons(state(known, devices=(GPU, other, RAM))).models["m"].demand == DEMAND


def test_without_a_gpu_nothing_is_learned() -> None:
    here = state(learned(9_500), devices=(RAM,))
    assert with_lessons(here) is here


def test_what_an_owner_declared_is_only_raised() -> None:
    model = replace(MODEL, demand=Demand(PREDICTED))
    assert demand(learned(9_500), model=model) == model.demand
    raised = demand(learned(10_400), model=model)
    assert (raised.gpu_bytes, raised.source) == (10_400 * MIB, "measured")


@pytest.mark.parametrize(
    ("predicted_mib", "counted_mib"),
    [(23_000, 23_488), (23_488, 23_488), (23_550, 23_550), (23_800, 23_710)],
    ids=["fits", "just fits", "does not fit", "takes less, and does not fit"],
)
def test_what_has_run_is_not_refused_for_what_it_grew_into_the_headroom(
    predicted_mib: int, counted_mib: int
) -> None:
    """Nothing would ever correct that, since it would never be loaded again."""
    model = replace(MODEL, demand=replace(DEMAND, gpu_bytes=predicted_mib * MIB))
    known = learned(23_600, predicted=predicted_mib * MIB)
    assert demand(known, model=model).gpu_bytes == counted_mib * MIB


def test_what_was_learned_is_forgotten_with_its_row() -> None:
    taught = with_lessons(state(learned(9_500)))
    assert with_learned(taught, {}).models["m"].demand == DEMAND


def test_over_two_gpus_each_counts_as_the_fullest() -> None:
    model = replace(MODEL, recipe=replace(RECIPE, gpus=2), demand=replace(DEMAND, gpu_bytes=2 * PREDICTED))
    found = demand(learned(9_500, recipe=replace(RECIPE, gpus=2)), model=model)
    assert found.gpu_bytes == 2 * (9_500 * MIB + PROMPT)
    assert found.breakdown.keys() == {"gpu0", "gpu1", "host"}


def test_what_one_gpu_has_shown_says_nothing_of_two() -> None:
    one = Split(PREDICTED, 500 * MIB, "predicted", DEMAND.breakdown)
    two = Split(6_000 * MIB, 800 * MIB, "predicted", {"gpu0": {"weights": 1}, "gpu1": {"weights": 1}})
    model = replace(MODEL, gpu_counts=(1, 2), demand=replace(DEMAND, splits=(one, two)))
    found = demand(learned(9_500), model=model)
    assert (found.over(1).gpu_bytes, found.over(1).source) == (9_500 * MIB + PROMPT, "measured")
    assert found.over(2).breakdown == two.breakdown
    assert (found.over(2).gpu_bytes, found.over(2).source) == (12_000 * MIB, "predicted")
    assert found.spread(["GPU-0", "GPU-1"]) == {"GPU-0": 6_000 * MIB, "GPU-1": 6_000 * MIB, HOST: 800 * MIB}


# --- what is noted


def seen(used: dict[str, int], *, attributed: bool = True, attempt: str = "a1") -> Sample:
    readings = {
        gpu: Reading(0, mib * MIB, {attempt: mib * MIB}, attributed=attributed) for gpu, mib in used.items()
    }
    return Sample(100.0, readings)


def running(model: Model = MODEL, gpus: tuple[str, ...] = ("GPU-0",), **more: object) -> Snapshot:
    instance = Instance(
        "m", State.READY, attempt="a1", ready_at_s=99.5, placement=dict.fromkeys((*gpus, HOST), PREDICTED)
    )
    here = replace(state(model=model), started_as={"a1": model})
    return replace(here, instances={"m": replace(instance, **more)})  # type: ignore[arg-type]


def test_a_ready_instance_is_noted_by_its_own_processes() -> None:
    after = learn(running(), seen({"GPU-0": 9_500}))
    (row,) = after.learned.values()
    assert (row.recipe, row.card, row.predicted_bytes) == (RECIPE, CARD, PREDICTED)
    assert row.loads == (Load("a1", 9_500 * MIB, 9_500 * MIB, 1e9),)
    assert after.models["m"].demand.source == "measured"
    again = learn(after, seen({"GPU-0": 9_500}))
    assert again is after, "no news is no change"


@pytest.mark.parametrize(("overhead_mib", "counted_mib"), [(0, 0), (9, 9), (32, 32), (500, 32)])
def test_what_its_start_cost_beside_its_processes_is_noted_within_reason(
    overhead_mib: int, counted_mib: int
) -> None:
    here = replace(running(), measured={"a1": {"GPU-0": Measured(overhead_bytes=overhead_mib * MIB)}})
    (row,) = learn(here, seen({"GPU-0": 9_500})).learned.values()
    assert row.loads[0].ready_bytes == (9_500 + counted_mib) * MIB


@pytest.mark.parametrize(
    ("here", "sample"),
    [
        (running(), seen({"GPU-0": 9_500}, attributed=False)),
        (running(), seen({"GPU-0": 0})),
        (running(), seen({})),
        (running(), seen({"GPU-0": 9_500}, attempt="another")),
        (running(state=State.STARTING, ready_at_s=None), seen({"GPU-0": 9_500})),
        (running(state=State.STOPPING), seen({"GPU-0": 9_500})),
        (running(ready_at_s=100.5), seen({"GPU-0": 9_500})),
        (replace(running(), started_as={}), seen({"GPU-0": 9_500})),
        (running(gpus=("GPU-0", "GPU-1")), seen({"GPU-0": 5_000, "GPU-1": 5_000})),
        (running(replace(MODEL, recipe=None)), seen({"GPU-0": 9_500})),
        (
            running(replace(MODEL, recipe=replace(RECIPE, gpus=2)), gpus=("GPU-0", "GPU-1")),
            seen({"GPU-0": 5_000}),
        ),
    ],
    ids=[
        "PIDs unreadable", "nothing seen", "no reading", "foreign", "starting", "leaving", "older sample",
        "started by somebody else", "split otherwise", "nothing to remember it by", "one GPU of two",
    ],
)  # fmt: skip
def test_what_is_no_measurement_of_its_own_is_not_noted(here: Snapshot, sample: Sample) -> None:
    assert learn(here, sample) is here


BUFFERS = {"CUDA0": {"model": 7_000 * MIB, "KV": 1_100 * MIB, "compute": 300 * MIB}, "CPU": {"model": MIB}}


def test_what_its_log_says_is_noted_with_the_load_and_is_the_parts_of_the_footprint() -> None:
    here = learn(running(), seen({"GPU-0": 9_500}))
    told = replace(here, logged={"a1": BUFFERS})
    after = learn(told, seen({"GPU-0": 9_500}))
    (row,) = after.learned.values()
    assert row.loads == (Load("a1", 9_500 * MIB, 9_500 * MIB, 1e9, BUFFERS),)
    assert learn(after, seen({"GPU-0": 9_500})) is after, "no news is no change"
    parts = {"weights": 7_000 * MIB, "kv_cache": 1_100 * MIB, "compute": 300 * MIB}
    found = after.models["m"].demand
    assert found.breakdown["gpu0"] == parts | {"other": 1_100 * MIB + PROMPT}
    assert (found.gpu_bytes, found.source) == (9_500 * MIB + PROMPT, "measured")
    grown = replace(after, logged={})
    (row,) = learn(grown, seen({"GPU-0": 9_600})).learned.values()
    assert row.loads[0] == Load("a1", 9_500 * MIB, 9_600 * MIB, 1e9, BUFFERS), "what was said stays said"


def test_parts_are_of_the_newest_load_that_counts_and_has_said_them() -> None:
    said, odd = BUFFERS, {"CUDA0": {"model": MIB}}
    loads = (
        Load("a0", 9_500 * MIB, 9_500 * MIB, 1.0, odd),
        Load("a1", 9_500 * MIB, 9_500 * MIB, 2.0, said),
        Load("a2", 9_500 * MIB, 9_500 * MIB, 3.0),
        Load("a3", 100 * MIB, 100 * MIB, 4.0, odd),
    )
    assert demand(replace(learned(), loads=loads)).breakdown["gpu0"]["weights"] == 7_000 * MIB


def test_over_several_gpus_each_has_the_parts_of_the_fullest() -> None:
    two = replace(MODEL, recipe=replace(RECIPE, gpus=2), demand=replace(DEMAND, gpu_bytes=2 * PREDICTED))
    loads = (Load("a1", 9_500 * MIB, 9_500 * MIB, 2.0, {"CUDA0": {"model": MIB}, "CUDA1": BUFFERS["CUDA0"]}),)
    assert two.recipe is not None
    row = Learned(two.recipe, CARD, PREDICTED, loads)
    found = demand(row, model=two)
    assert found.breakdown["gpu0"] == found.breakdown["gpu1"]
    assert found.breakdown["gpu1"]["weights"] == 7_000 * MIB
    assert sum(found.breakdown["gpu1"].values()) * 2 == found.gpu_bytes


def test_what_is_noted_is_of_the_model_as_it_was_started() -> None:
    """The catalogue was read again meanwhile: what runs still runs as it was written before."""
    newer = replace(MODEL, recipe=replace(RECIPE, context_size=1024))
    after = learn(replace(running(), models={"m": newer}), seen({"GPU-0": 9_500}))
    assert [row.recipe for row in after.learned.values()] == [RECIPE]


def house_of(count: int) -> tuple[Snapshot, Sample]:
    """So many models of one recipe, each ready on a GPU of its own and using a little more than the last."""
    gpus = [replace(GPU, id=f"GPU-{n}", index=n) for n in range(count)]
    models = [replace(MODEL, id=f"m{n}") for n in range(count)]
    here = replace(state(devices=(*gpus, RAM)), models={m.id: m for m in models})
    instances = [
        Instance(m.id, State.READY, attempt=f"a{n}", ready_at_s=99.5, placement={f"GPU-{n}": PREDICTED})
        for n, m in enumerate(models)
    ]
    here = replace(
        here,
        instances={each.model: each for each in instances},
        started_as={f"a{n}": m for n, m in enumerate(models)},
    )
    used = {n: (9_500 + 10 * n) * MIB for n in range(count)}
    return here, Sample(100.0, {f"GPU-{n}": Reading(0, size, {f"a{n}": size}) for n, size in used.items()})


@pytest.mark.parametrize("count", [2, KEPT_LOADS, KEPT_LOADS + 3])
def test_each_of_several_models_of_one_recipe_is_noted_once(count: int) -> None:
    here, sample = house_of(count)
    for _ in range(2 * count):
        before, here = here, learn(here, sample)
    assert here is before, "what is known is not news"
    (row,) = here.learned.values()
    attempts = {load.attempt for load in row.loads}
    assert len(attempts) == len(row.loads) == min(count, KEPT_LOADS)


def test_all_that_one_sample_shows_is_noted() -> None:
    """One of them may be gone before the next."""
    here, sample = house_of(3)
    (row,) = learn(here, sample).learned.values()
    assert {load.attempt for load in row.loads} == {"a0", "a1", "a2"}


def test_one_of_several_models_of_one_recipe_grows() -> None:
    here, sample = house_of(2)
    here = learn(learn(here, sample), sample)
    grown = Reading(0, 9_900 * MIB, {"a0": 9_900 * MIB})
    after = learn(here, replace(sample, readings={**sample.readings, "GPU-0": grown}))
    (row,) = after.learned.values()
    uses = {load.attempt: (load.ready_bytes // MIB, load.peak_bytes // MIB) for load in row.loads}
    assert uses == {"a0": (9_500, 9_900), "a1": (9_510, 9_510)}


def test_two_models_of_one_recipe_that_were_predicted_otherwise_are_no_news_to_each_other() -> None:
    here, sample = house_of(2)
    other = replace(MODEL, id="m1", demand=replace(DEMAND, gpu_bytes=12_000 * MIB))
    here = replace(here, models={**here.models, "m1": other}, started_as={**here.started_as, "a1": other})
    for _ in range(4):
        before, here = here, learn(here, sample)
    assert here is before


def test_the_oldest_rows_go() -> None:
    rows = [
        replace(learned(100, recipe=replace(RECIPE, content=str(n))), loads=(Load("a", 1, 1, float(n)),))
        for n in range(KEPT + 5)
    ]
    kept = with_learned(state(), {row.key: row for row in rows}).learned
    assert len(kept) == KEPT
    assert rows[0].key not in kept
    assert rows[-1].key in kept


# --- out of memory


def test_a_floor_is_above_what_was_not_enough_and_below_what_there_is() -> None:
    known = with_higher_floor(learned(), PREDICTED, GPU.usable_bytes)
    assert known.floor_bytes == PREDICTED + PREDICTED // 20
    assert demand(known).gpu_bytes == known.floor_bytes
    assert with_higher_floor(learned(), 100 * MIB, GPU.usable_bytes).floor_bytes == 100 * MIB + OOM_STEP_BYTES
    assert with_higher_floor(learned(), PREDICTED, PREDICTED + 1).floor_bytes == PREDICTED + 1
    assert with_higher_floor(known, 100 * MIB, GPU.usable_bytes) == known, "a floor only rises"


@pytest.mark.parametrize(("foreign_mib", "is_raised"), [(0, True), (14_000, True), (14_001, False)])
def test_a_start_whose_room_others_took_raises_no_floor(foreign_mib: int, is_raised: bool) -> None:
    """With a floor it might never fit beside them again, and nothing but a load clears that."""
    here = running(state=State.STARTING, ready_at_s=None)
    strangers = (ForeignProcess(7, "game", foreign_mib * MIB),)
    here = replace(here, sample=Sample(99.9, {"GPU-0": Reading(0, 0, {"a1": 1}, strangers)}))
    ended = Ended("m", "a1", 1, log_tail=("CUDA error: out of memory",))
    after = fold(here, [ended], now_s=100.0, wall_s=1e9)
    assert after.instance("m").is_failing
    assert (after.models["m"].demand.source, bool(after.learned)) == (
        ("raised after running out of memory", True) if is_raised else ("predicted", False)
    )


def test_a_load_that_gets_ready_clears_the_floor() -> None:
    known = with_higher_floor(learned(), PREDICTED, GPU.usable_bytes)
    assert with_load(known, "a9", 9_500 * MIB, 1.0).floor_bytes == 0


# --- what is run as it fits


def way(context_size: int, predicted_mib: int) -> Variant:
    parts = {"gpu0": {"first_prompt": PROMPT}}
    recipe = replace(RECIPE, context_size=context_size)
    launch = Launch("s", command=(str(context_size),))
    return Variant(
        {"context_size": context_size}, Demand(predicted_mib * MIB, 0, "predicted", parts), launch, recipe
    )


LONG, SHORT = way(16384, 11_000), way(8192, 10_000)
AUTO = replace(MODEL.as_variant(SHORT), variants=(LONG, SHORT))


def test_a_load_teaches_its_own_variant_and_moves_the_others() -> None:
    known = learned(10_800, recipe=LONG.recipe or RECIPE, predicted=11_000 * MIB)
    taught = with_lessons(state(known, model=AUTO)).models["m"]
    long, short = taught.variants
    assert (long.demand.source, long.demand.gpu_bytes) == ("measured", 10_800 * MIB + PROMPT)
    assert (short.demand.source, short.demand.gpu_bytes) == ("measured, moved", 9_800 * MIB + PROMPT)
    assert (taught.demand, taught.recipe, taught.launch) == (short.demand, SHORT.recipe, SHORT.launch)
    assert with_lessons(state(known, model=taught)).models["m"] == taught
    assert with_lessons(state(model=taught)).models["m"].variants[0].demand == LONG.demand, "it is forgotten"


def test_an_attempt_is_remembered_as_the_variant_that_was_started() -> None:
    snapshot = replace(
        state(model=AUTO, devices=(GPU,)), sample=Sample(99.0, {GPU.id: Reading(24_000 * MIB, 0)})
    )
    snapshot = replace(snapshot, entries={"m": Entry("m", 99.0, ("r",))})
    after = apply(snapshot, make_plan(snapshot, {}))
    attempt = after.instances["m"].attempt or ""
    assert after.instances["m"].parameters == {"context_size": 16384}
    assert after.started_as[attempt].recipe == LONG.recipe
    ready = replace(after.instances["m"], state=State.READY, ready_at_s=100.0)
    seen = Sample(101.0, {GPU.id: Reading(13_000 * MIB, 11_000 * MIB, {attempt: 10_900 * MIB})})
    known = learn(replace(after, instances={"m": ready}), seen)
    assert [row.recipe for row in known.learned.values()] == [LONG.recipe]
    assert known.models["m"].variants[0].demand.source == "measured"


def test_what_would_fit_is_told_by_what_was_learned() -> None:
    """By its prediction the shorter context would not fit; by the measurement, moved, it does."""
    tight = replace(GPU, capacity_bytes=9_900 * MIB, headroom_bytes=0)
    reading = {GPU.id: Reading(9_900 * MIB, 0)}
    snapshot = replace(state(learned(9_700), devices=(tight,)), sample=Sample(99.0, reading))
    snapshot = with_lessons(snapshot)
    ways = Alternatives(
        [[{"context_size": 4096}]], lambda _: replace(DEMAND, gpu_bytes=9_950 * MIB, host_bytes=0)
    )
    (fitting,) = would_fit(snapshot, {}, snapshot.models["m"], ways)
    assert (fitting.demand.source, fitting.demand.gpu_bytes) == ("measured, moved", 9_650 * MIB + PROMPT)
