"""Single stories on the simulated machine that random walks come across too rarely."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any

import pytest

from orchestrator.core.entities import HOST
from tests.control.machine import Manner
from tests.control.simulation import Client, Simulation, model


@pytest.fixture
def simulation() -> Iterator[Simulation]:
    """On GPU-0 there is room for one of `half`, `rest` and `dear`; `ram` is out of their way."""
    gpu_0: Any = {"devices": ("GPU-0",)}
    models = [model("half", 600, **gpu_0), model("rest", 500, **gpu_0), model("ram", 0, 600)]
    models.append(model("dear", 600, priority=52, **gpu_0))
    made = Simulation({m.id: m for m in models})
    try:
        made.pass_time(0.1)
        yield made
        made.promises.tell()
    finally:
        made.close()


def runs(simulation: Simulation, name: str) -> int:
    return len(simulation.machine.alive(name))


def test_what_is_stuck_half_loaded_keeps_all_it_was_promised(simulation: Simulation) -> None:
    """It has taken 300 of its 600 MiB, survives its kill, and takes the rest."""
    simulation.machine.manners["half"] = Manner(load_s=200.0, obeys="stuck")
    simulation.ask("half", 300.0, None)
    simulation.pass_time(10.0)
    simulation.machine.alive("half")[0].used["GPU-0"] = simulation.machine.alive("half")[0].full["GPU-0"] // 2
    simulation.pass_time(30.0)  # its start takes too long: it is to be stopped
    asked: Client = simulation.ask("rest", 30.0, 1.0)
    simulation.pass_time(25.0)
    assert simulation.machine.alive("half")[0].is_asked_to_end
    assert runs(simulation, "rest") == 0
    simulation.machine.release()
    simulation.pass_time(30.0)
    assert asked.ended is not None
    simulation.ask("rest", 30.0, None)
    simulation.pass_time(5.0)
    assert runs(simulation, "rest") == 1


def test_memory_that_never_comes_back_is_never_given_away(simulation: Simulation) -> None:
    simulation.machine.manners["half"] = Manner(lingers_s=inf)
    simulation.ask("half", 30.0, 0.0)
    simulation.pass_time(1.0)
    simulation.command("unload", "half", force=False, hold_s=None)
    simulation.pass_time(20.0)
    assert runs(simulation, "half") == 0
    asked = simulation.ask("rest", 30.0, 1.0)
    simulation.pass_time(5.0)
    assert runs(simulation, "rest") == 0
    assert asked.ended == "NotReady"


def test_what_an_engine_starts_after_its_caller_died_runs_once(simulation: Simulation) -> None:
    simulation.machine.is_slow = True
    simulation.ask("half", 60.0, None)
    simulation.progress(None)
    assert simulation.machine.requests
    simulation.kill(is_saved=True)
    simulation.progress(None)
    simulation.ask("half", 60.0, None)
    simulation.progress(None)
    simulation.machine.go_on()
    for _ in range(3):
        simulation.pass_time(10.0)
        simulation.resync()
    simulation.pass_time(1.0)
    assert runs(simulation, "half") == 1


def test_a_save_under_way_when_the_server_dies_leaves_nothing_behind(simulation: Simulation) -> None:
    """Whether or not it reached the disk."""
    for is_saved in (True, False):
        simulation.store_takes_s = 0.5
        simulation.command("load", "ram", pin=None)
        simulation.progress(3)
        simulation.kill(is_saved=is_saved)
        simulation.store_takes_s = 0.0
        simulation.pass_time(40.0)
        simulation.command("unload", "ram", force=True, hold_s=None)
        simulation.pass_time(5.0)
        assert simulation.machine.used_bytes(HOST) == 0
        simulation.promises.check_empty()


def test_a_busy_one_whose_room_is_no_longer_wanted_serves_on(simulation: Simulation) -> None:
    simulation.ask("half", 60.0, None)
    simulation.pass_time(12.0)
    simulation.ask("rest", 60.0, 1.0)
    simulation.pass_time(1.0)
    kept_out = simulation.ask("half", 60.0, 0.1)
    simulation.pass_time(1.0)
    assert kept_out.is_waiting, "its gate is closed while it drains"
    simulation.command("unload", "rest", force=False, hold_s=None)
    simulation.pass_time(1.0)
    assert kept_out.ended == "served"
    assert runs(simulation, "half") == 1


def test_what_nobody_waits_for_any_more_is_not_loaded(simulation: Simulation) -> None:
    user = simulation.ask("half", 60.0, None)
    simulation.pass_time(1.0)
    gone = simulation.ask("rest", 60.0, None)
    simulation.pass_time(1.0)
    simulation.leave(gone)
    simulation.pass_time(1.0)
    simulation.leave(user)
    simulation.pass_time(20.0)
    assert (runs(simulation, "half"), runs(simulation, "rest")) == (1, 0)
    assert not simulation.life.loop.snapshot.entries


def test_who_joins_a_wait_does_not_begin_it_anew(simulation: Simulation) -> None:
    """After 20 s it has risen to the priority of the busy one, which is then asked to leave."""
    simulation.ask("dear", 60.0, None)
    simulation.pass_time(12.0)
    for _ in range(2):
        simulation.ask("rest", 60.0, 1.0)
        simulation.pass_time(9.0)
    late = simulation.ask("dear", 1.0, 0.0)
    simulation.pass_time(0.5)
    assert late.ended == "served", "it has risen too early"
    simulation.pass_time(3.0)
    late = simulation.ask("dear", 1.0, 0.0)
    simulation.pass_time(0.5)
    assert late.is_waiting


def test_an_engine_that_starts_it_and_does_not_say_so_has_started_it_once(simulation: Simulation) -> None:
    simulation.machine.is_slow = True
    asked = simulation.ask("ram", 60.0, 1.0)
    simulation.progress(None)
    simulation.machine.go_on(answers=False)
    simulation.machine.is_slow = False
    simulation.pass_time(5.0)
    simulation.ask("ram", 60.0, 1.0)
    simulation.pass_time(5.0)
    assert asked.ended == "served"
    assert len(simulation.machine.processes) == 1


def test_nothing_starts_on_a_sample_that_is_too_old(simulation: Simulation) -> None:
    simulation.samples_lag_s = None
    simulation.pass_time(5.0)
    asked = simulation.ask("half", 30.0, 1.0)
    simulation.pass_time(1.0)
    assert (asked.ended, runs(simulation, "half")) == ("NotReady", 0)
    simulation.samples_lag_s = 0.0
    simulation.pass_time(1.0)
    asked = simulation.ask("half", 30.0, 1.0)
    simulation.pass_time(2.0)
    assert asked.ended == "served"
