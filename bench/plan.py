"""How long POST /plan thinks: one plan of a load among 200 models on 4 GPUs, against the planner alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

from bench.planner import MODELS, WORLDS, Case, models, packed, used
from bench.report import milliseconds, ratio, show
from orchestrator.control.forecast import preview_view
from orchestrator.core.entities import Model
from orchestrator.core.planner import make_plan
from orchestrator.core.preview import preview
from tests.core.worlds import entry, gpu, model, world

GPUS, GPU_MIB = 4, 24576
REPEATS = 20
WANTED: dict[str, Model] = {
    "fits beside the others": model("new", 10),
    "8 GB, needs victims": model("new", 8000),
    "40 GB split over up to 4, needs victims": model("new", 40000, gpu_counts=(1, 2, 4)),
    "30 GB on one GPU: refused for ever": model("new", 30000),
}


def full(seed: int, wanted: Model) -> Case:
    """4 GPUs nearly full of ready models; all others are in the catalogue."""
    dice = random.Random(seed)
    known = [replace(m, idle_after_s=None) for m in models(dice)[: MODELS - 1]]
    ready = packed(known, dice, GPUS)
    devices = [gpu(index, GPU_MIB) for index in range(GPUS)]
    return Case(world(devices, [*known, wanted], ready), used(ready, dice))


def timed_s(act: Callable[[], object]) -> list[float]:
    act()
    taken = []
    for _ in range(REPEATS):
        begun_s = time.perf_counter()
        act()
        taken.append(time.perf_counter() - begun_s)
    return taken


def row(name: str, wanted: Model) -> list[str]:
    cases = [full(seed, wanted) for seed in range(WORLDS)]
    bare = [timed_s(lambda c=queued(case): make_plan(c.snapshot, c.usage)) for case in cases]
    whole = [timed_s(lambda c=case: answer(c, wanted)) for case in cases]
    bare_s, whole_s = (median(taken for times in all_times for taken in times) for all_times in (bare, whole))
    worst_s = max(min(times) for times in whole)
    leaving = median(len(preview(case.snapshot, case.usage, wanted).evictions) for case in cases)
    return [
        name,
        f"{leaving:.0f}",
        milliseconds(bare_s),
        milliseconds(whole_s),
        milliseconds(worst_s),
        ratio(whole_s, bare_s),
    ]


def queued(case: Case) -> Case:
    """The same, with the wish really in the queue."""
    return replace(case, snapshot=replace(case.snapshot, entries={"new": entry("new", tries_now=True)}))


def answer(case: Case, wanted: Model) -> dict[str, object]:
    return preview_view(case.snapshot, preview(case.snapshot, case.usage, wanted), ())


def main() -> None:
    show(
        f"Plan of a load: {MODELS} models, {GPUS} GPUs (aim: under 5 ms)",
        ["asked for", "leave", "make_plan", "plan", "worst world", "to make_plan"],
        [row(name, wanted) for name, wanted in WANTED.items()],
        [
            f"{WORLDS} random worlds, each asked {REPEATS} times. `make_plan`: the planner alone, with the "
            "same wish in the queue. `plan`: the whole answer, ready for JSON, without what would fit, "
            "which takes some ten predictions in a thread of its own. `worst world`: by its fastest answer.",
        ],
    )


if __name__ == "__main__":
    main()
