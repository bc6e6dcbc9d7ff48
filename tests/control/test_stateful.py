"""The real loop, effects, recovery and resync under every mix of requests, faults and restarts.

Hypothesis draws what happens and how many awaits each task gets before the next thing happens. The
promises (promises.py) are checked on the simulated machine at every step; at the end faults heal, time
passes, and everything must have settled.

`ORCHESTRATOR_STATEFUL_EXAMPLES=5000` makes a long random run of it, another one each time.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from math import inf
from typing import ClassVar

import pytest
import structlog
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from orchestrator.control.ports import Exit
from orchestrator.core.entities import HOST, MIB, DeviceId, Model, ModelId
from tests.control.machine import DEVICES, Manner
from tests.control.simulation import Client, Simulation, flexible, model

LONG = int(os.environ.get("ORCHESTRATOR_STATEFUL_EXAMPLES", "0"))
EXAMPLES = LONG or int(os.environ.get("ORCHESTRATOR_STATEFUL_SHORT", "400"))
STEPS = 60
SHRINKS = (
    bool(LONG) or "ORCHESTRATOR_STATEFUL_SHRINKS" in os.environ
)  # takes minutes, and only after a failure

ENOUGH = 100
SEEN = (
    "started",
    "started late",
    "entered",
    "evicted",
    "stopped",
    "stopped with somebody inside",
    "opened again",
)
"""What so many examples must have come across: a promise about what never happens proves nothing."""

FIRST: Mapping[ModelId, Model] = {
    m.id: m
    for m in (
        model("small", 250, gpu_counts=(1, 2), idle_after_s=100.0),
        model("medium", 400, priority=52),
        model("big", 900, idle_after_s=300.0),
        model("pair", 1200, gpu_counts=(2,)),
        model("mixed", 300, 500, priority=49),
        model("ram", 0, 600),
        model("fixed", 200, pinned=True),
        flexible("flexible", 700, 500, 150),
    )
}
CATALOGUES: Mapping[str, Mapping[ModelId, Model]] = {
    "first": FIRST,
    "without medium": {name: m for name, m in FIRST.items() if name != "medium"},
    "small has grown": {
        **FIRST,
        "small": model("small", 450),
        "mixed": model("mixed", 300, 450, priority=51),
        "flexible": flexible("flexible", 720, 500),
    },
}

NAMES = st.sampled_from(sorted(FIRST))
PACES = st.sampled_from([None, None, None, 0, 1, 2, 3, 5, 9])
"""How many awaits everybody gets before the next thing happens; None: as many as they want."""
PICKS = st.integers(0, 9)
MANNERS = st.builds(
    Manner,
    load_s=st.sampled_from([0.0, 0.0, 0.4, 5.0, 25.0, inf]),
    exits_after_s=st.sampled_from([None, None, None, 0.0, 0.2, 6.0]),
    obeys=st.sampled_from(["at once", "at once", "grace", "stuck"]),
    lingers_s=st.sampled_from([0.0, 0.0, 0.3, 3.0, 20.0, inf]),
    exit_is_told=st.sampled_from([True, True, True, False]),
    oom=st.booleans(),
)


def is_slow(simulation: Simulation) -> None:
    simulation.machine.is_slow = True


def lists_late(simulation: Simulation) -> None:
    simulation.listing_takes_s = 4.0


ENGINE_NEWS: Mapping[str, Callable[[Simulation], object]] = {
    "goes away": lambda s: s.machine.go_away(cuts=False),
    "is cut off": lambda s: s.machine.go_away(cuts=True),
    "comes back": lambda s: s.machine.come_back(),
    "is slow": is_slow,
    "does what was asked": lambda s: s.machine.go_on(),
    "does what was asked and says nothing": lambda s: s.machine.go_on(answers=False),
    "lists late": lists_late,
    "lets the stuck die": lambda s: s.machine.release(),
}


def breaks(*devices: DeviceId) -> Callable[[Simulation], None]:
    def act(simulation: Simulation) -> None:
        simulation.machine.broken = dict.fromkeys(devices, "the GPU is lost")

    return act


def lags(seconds: float | None) -> Callable[[Simulation], None]:
    def act(simulation: Simulation) -> None:
        simulation.samples_lag_s = seconds

    return act


def foreign_goes(simulation: Simulation) -> None:
    if simulation.machine.foreign:
        simulation.machine.foreign.popitem()


DEVICE_NEWS: Mapping[str, Callable[[Simulation], None]] = {
    "GPU-0 is lost": breaks("GPU-0"),
    "RAM and GPU-1 are lost": breaks("GPU-1", HOST),
    "all can be measured": breaks(),
    "samples lag": lags(0.5),
    "samples lag much": lags(2.5),
    "samples lag too much": lags(4.0),
    "samples are missing": lags(None),
    "samples come at once": lags(0.0),
    "another program ends": foreign_goes,
}


class Orchestrator(RuleBasedStateMachine):
    """Each rule is something that can happen at any time."""

    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.s = Simulation(FIRST)

    @initialize()
    def begin(self) -> None:
        self.s.pass_time(0.1)

    # --- users

    @rule(
        name=NAMES,
        seconds=st.sampled_from([0.0, 0.2, 5.0, 40.0, 120.0]),
        use_s=st.sampled_from([0.0, 0.1, 8.0, 50.0, None]),
        pace=PACES,
    )
    def request(self, name: ModelId, seconds: float, use_s: float | None, pace: int | None) -> None:
        self.s.ask(name, seconds, use_s)
        self.s.progress(pace)

    @rule(names=st.lists(NAMES, min_size=2, max_size=5), pace=PACES)
    def requests_at_once(self, names: list[ModelId], pace: int | None) -> None:
        for name in names:
            self.s.ask(name, 60.0, 1.0)
        self.s.progress(pace)

    @rule(
        name=NAMES,
        rival=NAMES,
        seconds=st.sampled_from([5.0, 12.0]),
        gives_up=st.booleans(),
        pace=PACES,
    )
    def rivals(self, name: ModelId, rival: ModelId, seconds: float, gives_up: bool, pace: int | None) -> None:
        """One is used for as long as it likes, and somebody wants another one, for a while or in earnest."""
        self.s.ask(name, 60.0, None)
        self.s.pass_time(seconds)
        self.s.ask(rival, 60.0, 5.0)
        self.s.progress(pace)
        if gives_up:
            self.s.command("unload", rival, force=False, hold_s=None)
            self.s.progress(pace)

    @precondition(lambda self: self.s.clients)
    @rule(pick=PICKS, pace=PACES)
    def client_leaves(self, pick: int, pace: int | None) -> None:
        self.s.leave(picked(self.s, pick))
        self.s.progress(pace)

    @rule(name=NAMES, pin=st.sampled_from([None, None, True, False]), pace=PACES)
    def load(self, name: ModelId, pin: bool | None, pace: int | None) -> None:
        self.s.command("load", name, pin=pin)
        self.s.progress(pace)

    @rule(name=NAMES, force=st.booleans(), hold_s=st.sampled_from([None, None, 15.0]), pace=PACES)
    def unload(self, name: ModelId, force: bool, hold_s: float | None, pace: int | None) -> None:
        self.s.command("unload", name, force=force, hold_s=hold_s)
        self.s.progress(pace)

    @rule(which=st.sampled_from(sorted(CATALOGUES)), pace=PACES)
    def reload(self, which: str, pace: int | None) -> None:
        self.s.reload(CATALOGUES[which])
        self.s.progress(pace)

    # --- services

    @rule(name=NAMES, manner=MANNERS)
    def next_one_behaves(self, name: ModelId, manner: Manner) -> None:
        self.s.machine.manners[name] = manner

    @precondition(lambda self: self.s.machine.alive())
    @rule(pick=PICKS, oom=st.booleans(), pace=PACES)
    def crash(self, pick: int, oom: bool, pace: int | None) -> None:
        alive = self.s.machine.alive()
        self.s.machine.end(alive[pick % len(alive)], Exit(137, oom=oom, log_tail=("boom",)))
        self.s.progress(pace)

    # --- what goes wrong around us, and what comes back

    @rule(what=st.sampled_from(sorted(ENGINE_NEWS)), pace=PACES)
    def engine(self, what: str, pace: int | None) -> None:
        ENGINE_NEWS[what](self.s)
        self.s.progress(pace)

    @rule(pace=PACES)
    def resync(self, pace: int | None) -> None:
        self.s.resync()
        self.s.progress(pace)

    @rule(what=st.sampled_from(sorted(DEVICE_NEWS)), pace=PACES)
    def devices(self, what: str, pace: int | None) -> None:
        DEVICE_NEWS[what](self.s)
        self.s.progress(pace)

    @rule(device=st.sampled_from([*DEVICES]), mib=st.sampled_from([60, 300, 700]), pace=PACES)
    def foreign_comes(self, device: str, mib: int, pace: int | None) -> None:
        self.s.machine.admit_foreign(device, mib * MIB)
        self.s.progress(pace)

    @rule(problem=st.sampled_from([None, "the disk is full"]), takes_s=st.sampled_from([0.0, 0.7]))
    def store_is(self, problem: str | None, takes_s: float) -> None:
        self.s.store_problem = problem
        self.s.store_takes_s = takes_s

    @rule(pace=PACES)
    def all_is_well(self, pace: int | None) -> None:
        heal(self.s)
        self.s.progress(pace)

    # --- restarts, time

    @rule(is_saved=st.booleans(), reboot=st.sampled_from([False] * 7 + [True]), pace=PACES)
    def kill(self, is_saved: bool, reboot: bool, pace: int | None) -> None:
        self.s.kill(is_saved=is_saved, reboot=reboot)
        self.s.progress(pace)

    @rule(name=NAMES, is_saved=st.booleans(), pace=PACES)
    def caller_of_the_engine_dies(self, name: ModelId, is_saved: bool, pace: int | None) -> None:
        """What it asked for is still to be done; the engine does it some time later."""
        self.s.machine.is_slow = True
        self.s.ask(name, 60.0, 1.0)
        self.s.progress(None)
        self.s.kill(is_saved=is_saved)
        self.s.progress(pace)

    @rule(pace=PACES)
    def go_on(self, pace: int | None) -> None:
        self.s.progress(pace)

    @rule(seconds=st.sampled_from([0.03, 0.3, 1.0]))
    def a_moment_passes(self, seconds: float) -> None:
        self.s.pass_time(seconds)

    @rule(seconds=st.sampled_from([3.0, 12.0, 70.0]))
    def time_passes(self, seconds: float) -> None:
        self.s.pass_time(seconds)

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:  # else it has failed, and that is the news
                settle(self.s)
        finally:
            self.seen.update(self.s.promises.seen)
            self.s.close()


def picked(simulation: Simulation, pick: int) -> Client:
    clients = list(simulation.clients)
    return clients[pick % len(clients)]


def heal(simulation: Simulation) -> None:
    """Every fault ends; what has leaked stays leaked."""
    simulation.store_problem, simulation.store_takes_s = None, 0.0
    simulation.listing_takes_s, simulation.samples_lag_s = 0.0, 0.0
    simulation.machine.broken.clear()
    simulation.machine.foreign.clear()
    simulation.machine.manners.clear()
    simulation.machine.come_back()
    simulation.machine.release()


def settle(simulation: Simulation) -> None:
    """Faults end, clients leave, time passes: everything has ended; then unload all of it."""
    heal(simulation)
    for _ in range(4):  # a listing may be under way that is older than what it is compared with
        simulation.pass_time(30.0)
        simulation.machine.release()
        simulation.resync()
    simulation.pass_time(125.0)
    for client in list(simulation.clients):
        if not client.is_waiting:
            simulation.leave(client)
    simulation.pass_time(700.0)
    simulation.resync()
    simulation.progress(None)
    simulation.promises.check_settled()
    for name in FIRST:
        simulation.command("unload", name, force=False, hold_s=None)
    simulation.pass_time(30.0)
    simulation.promises.check_empty()


@pytest.mark.timeout(0 if LONG else 300)
def test_every_promise_holds_whatever_happens() -> None:
    configured = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        run_state_machine_as_test(
            Orchestrator,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                deadline=None,
                derandomize=not LONG,
                database=None,
                phases=(Phase.generate, Phase.shrink) if SHRINKS else (Phase.generate,),
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        structlog.configure(**configured)
    assert Orchestrator.seen["step"] >= 10 * EXAMPLES, Orchestrator.seen
    for what in SEEN if EXAMPLES >= ENOUGH else ():
        assert Orchestrator.seen[what], f"nothing was ever {what}: {Orchestrator.seen}"
