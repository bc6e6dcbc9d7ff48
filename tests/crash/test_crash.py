"""`kill -9` at any moment under load, again and again: nothing doubled, orphaned, lost or stuck.

CRASH_ROUNDS=100 CRASH_SEED=4711 pytest tests/crash/test_crash.py -s

The seed repeats what is asked, when, and when the kill is due; how fast the machine is then, it cannot.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.rounds import MODELS, MOMENTS, STOP_GRACE, run_rounds
from tests.e2e.world import Engine, open_house

SETTINGS = {"stop_containers_on_exit": False}
SERVICES = {"mimic": {"stop_grace": STOP_GRACE}}


@pytest.mark.timeout(3600)
async def test_killed_at_random_moments_it_recovers(
    engine: Engine, tmp_path: Path, seed: int, rounds: int
) -> None:
    print(f"\ncrash test: engine {engine.name}, CRASH_SEED={seed}, {rounds} rounds")
    with open_house(tmp_path, engine, MODELS, settings=SETTINGS, services=SERVICES) as house:
        done = await run_rounds(house, rounds, seed, print)
    assert len(done) == rounds
    if rounds >= 2 * len(MOMENTS):
        assert sum(one.adopted for one in done) > 0, "the load left nothing to adopt: it proves little"
