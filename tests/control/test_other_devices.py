"""The real loop on cards that tell no more than free and used bytes, as other makers' may."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.core.entities import MIB
from orchestrator.core.lifecycle import State
from tests.control.machine import Manner
from tests.control.simulation import Simulation, model

GPU_0: dict[str, Any] = {"devices": ("GPU-0",)}


@pytest.fixture
def simulation() -> Iterator[Simulation]:
    """On GPU-0, 950 MiB for models: room for one of `big` and `other`, or for both small ones."""
    sizes = {"big": 600, "other": 500, "small": 300, "little": 300}
    made = Simulation({name: model(name, size, **GPU_0) for name, size in sizes.items()})
    made.machine.tells_little = True
    try:
        made.pass_time(0.1)
        yield made
        made.promises.tell()  # nothing was overbooked, nobody busy was evicted
    finally:
        made.close()


def state(simulation: Simulation, name: str) -> State:
    return simulation.life.loop.snapshot.instance(name).state


def used_mib(simulation: Simulation) -> int:
    return simulation.machine.used_bytes("GPU-0") // MIB


def test_one_makes_room_for_the_other(simulation: Simulation) -> None:
    simulation.ask("big", 30.0, 1.0)
    simulation.pass_time(5.0)
    assert used_mib(simulation) == 600
    simulation.ask("other", 30.0, 1.0)
    simulation.pass_time(5.0)
    assert (state(simulation, "big"), state(simulation, "other")) == (State.STOPPED, State.READY)
    assert used_mib(simulation) == 500


def test_two_that_fit_start_one_after_the_other(simulation: Simulation) -> None:
    simulation.machine.manners["small"] = simulation.machine.manners["little"] = Manner(load_s=4.0)
    for name in ("small", "little"):
        simulation.ask(name, 30.0, None)
    simulation.pass_time(2.0)
    assert len(simulation.machine.alive()) == 1, "the growth of two could not be told apart"
    simulation.pass_time(10.0)
    assert used_mib(simulation) == 600
    for name in ("small", "little"):
        assert state(simulation, name) is State.READY


def test_what_another_program_takes_counts(simulation: Simulation) -> None:
    simulation.machine.admit_foreign("GPU-0", 500 * MIB)
    asked = simulation.ask("big", 30.0, 1.0)
    simulation.pass_time(5.0)
    assert asked.ended == "NotReady"
    assert used_mib(simulation) == 500


def test_memory_that_comes_back_late_is_waited_for(simulation: Simulation) -> None:
    simulation.machine.manners["big"] = Manner(lingers_s=3.0)
    simulation.ask("big", 30.0, 0.0)
    simulation.pass_time(2.0)
    simulation.ask("other", 30.0, None)
    simulation.pass_time(2.0)
    assert state(simulation, "other") is State.CLAIMED
    simulation.pass_time(3.0)
    assert state(simulation, "other") is State.READY
    assert used_mib(simulation) == 500
