"""The soak in short, and that it would notice: a loss, a growth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.soak.load import Tally
from tests.soak.soak import MODELS, Limits, Report, grown, soak, soak_house
from tests.soak.vitals import Vitals

SECONDS = 25.0
VITALS = Vitals(rss_mib=100.0, descriptors=30, threads=20, tasks=15, database_mib=1.0)


@pytest.mark.timeout(240)
async def test_a_mixed_load_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    with soak_house(tmp_path, "process") as house:
        report = await soak(house, SECONDS, seed=1)
    print("\n".join(report.lines()))
    assert report.wrong == []
    assert report.tally.answered > 50
    assert report.swaps >= len(MODELS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rss_mib": 400.0}, "memory"),
        ({"descriptors": 90}, "descriptors"),
        ({"threads": 90}, "threads"),
        ({"tasks": 90}, "tasks"),
        ({"database_mib": 90.0}, "database"),
    ],
)
def test_growth_beyond_the_limit_is_told(change: dict[str, float], named: str) -> None:
    last = replace(VITALS, **change)  # type: ignore[arg-type]
    report = Report("process", 60.0, Tally(sent=2000), 9, VITALS, 1000, last, 120.0)
    (line,) = grown(report, Limits())
    assert line.startswith(named)
    assert grown(replace(report, last=VITALS), Limits()) == []
