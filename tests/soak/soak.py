"""A mixed load with swaps for a set time, and what it cost: nothing may be lost, nothing may grow."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker

from tests.crash.audit import audit
from tests.e2e.recorder import Recorder
from tests.e2e.world import Engine, House, mimic, open_house, until
from tests.images.build import build_mimic
from tests.soak.load import Crowd, Tally
from tests.soak.vitals import Vitals, read_vitals

GIB = 1024
CLIENTS = 8
READ_EVERY_S = 2.0
AT_REST_S = 30.0
WARM_SHARE = 0.3
WARM_AT_LEAST_S = 8.0
NETWORK = "orchestrator-soak"
MODELS: dict[str, dict[str, Any]] = {
    "quick": mimic(4 * GIB),
    "steady": mimic(8 * GIB),
    "loads-slowly": mimic(7 * GIB, load_s=0.5),
    "stops-slowly": mimic(6 * GIB, release_s=0.4),
    "expires": mimic(3 * GIB, idle_after="2s"),
    "big": mimic(16 * GIB, load_s=0.3),
}
SETTINGS = {"event_retention": 2000, "stop_containers_on_exit": True}


@dataclass(frozen=True)
class Limits:
    """The most that a run may grow after its warm-up.

    Memory and database have an allowance to begin with, for what fills up once (caches, the kept history),
    and one for each 1000 requests. Everything else comes back to where it was, but for connections that
    are kept for the next request.
    """

    rss_mib: float = 10.0
    rss_mib_per_1000: float = 1.0
    database_mib: float = 8.0
    database_mib_per_1000: float = 2.0
    descriptors: int = 24
    threads: int = 24
    tasks: int = 12


@dataclass
class Report:
    engine: str
    seconds: float
    tally: Tally
    swaps: int
    warm: Vitals
    warm_sent: int
    last: Vitals
    most_rss_mib: float
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        t, warm, last = self.tally, self.warm, self.last
        refused = ", ".join(f"{code} {count}" for code, count in t.refused.most_common()) or "none"
        return [
            f"soak of {self.seconds:.0f} s, engine {self.engine}",
            f"requests     {t.sent} sent, {t.answered} answered, {t.left} left by their clients, "
            f"{len(t.lost)} lost",
            f"refusals     {t.refused.total()} documented 503s ({refused})",
            f"commands     {t.loads} loads, {t.unloads} unloads; {t.looks} looks",
            f"swaps        {self.swaps} starts on the device",
            f"memory       {warm.rss_mib:.1f} MiB after {self.warm_sent} requests, "
            f"{last.rss_mib:.1f} MiB at the end, {self.most_rss_mib:.1f} MiB at most",
            f"descriptors  {warm.descriptors} then {last.descriptors}",
            f"threads      {warm.threads} then {last.threads}",
            f"tasks        {warm.tasks} then {last.tasks}",
            f"database     {warm.database_mib:.2f} MiB then {last.database_mib:.2f} MiB",
            *(f"WRONG        {line}" for line in self.wrong),
        ]


def grown(report: Report, limits: Limits) -> list[str]:
    """What grew beyond the limits, in words."""
    warm, last = report.warm, report.last
    thousands = (report.tally.sent - report.warm_sent) / 1000
    allowed = {
        "memory (MiB)": (warm.rss_mib, last.rss_mib, limits.rss_mib + thousands * limits.rss_mib_per_1000),
        "database (MiB)": (
            warm.database_mib,
            last.database_mib,
            limits.database_mib + thousands * limits.database_mib_per_1000,
        ),
        "descriptors": (warm.descriptors, last.descriptors, limits.descriptors),
        "threads": (warm.threads, last.threads, limits.threads),
        "tasks": (warm.tasks or 0, last.tasks or 0, limits.tasks),
    }
    return [
        f"{what} grew from {before:.1f} to {after:.1f}, more than the {limit:.1f} allowed"
        for what, (before, after, limit) in allowed.items()
        if after - before > limit
    ]


async def soak(house: House, seconds: float, seed: int, limits: Limits = Limits()) -> Report:
    """Run the load; afterwards `wrong` has every loss, growth and disagreement."""
    began_s = time.monotonic()
    crowd = Crowd(house.server, list(MODELS), seed)
    warm_s = max(WARM_AT_LEAST_S, WARM_SHARE * seconds)
    with Recorder(house.gpus).running() as seen, house.gpus.watch_overbooking(0.01) as overbooking:
        async with crowd.running(CLIENTS):
            most_mib = await under_load(house, warm_s)
            warm = await at_rest(house, crowd)
            warm_sent = crowd.tally.sent
            crowd.resume()
            most_mib = max(most_mib, await under_load(house, seconds - (time.monotonic() - began_s)))
            last = await at_rest(house, crowd)
            disagreements = await audit(house, crowd.http)
        swaps = len(seen.runs())
    took_s = time.monotonic() - began_s
    report = Report(house.engine, took_s, crowd.tally, swaps, warm, warm_sent, last, most_mib)
    report.wrong = [
        *crowd.tally.lost,
        *([f"{crowd.tally.unexplained} requests are nowhere"] if crowd.tally.unexplained else []),
        *overbooking.moments,
        *house.gpus.overbooked(),
        *disagreements,
        *grown(report, limits),
    ]
    return report


async def under_load(house: House, seconds: float) -> float:
    """Let the crowd work so long; returns the most resident memory seen, in MiB."""
    until_s = time.monotonic() + seconds
    most_mib = 0.0
    while (left_s := until_s - time.monotonic()) > 0:
        await asyncio.sleep(min(READ_EVERY_S, left_s))
        most_mib = max(most_mib, (await asyncio.to_thread(read_vitals, house.server)).rss_mib)
    return most_mib


async def at_rest(house: House, crowd: Crowd) -> Vitals:
    """With every model unloaded and no request: what is held then is held for ever."""
    await crowd.quiet()
    for model in MODELS:
        answer = await crowd.http.post("/models/unload", json={"model": model})
        assert answer.status_code == 200, answer.text
    await until(lambda: house.gpus.used_mib(0) == 0, AT_REST_S, "the device should be empty")
    return await asyncio.to_thread(read_vitals, house.server)


@contextlib.contextmanager
def soak_house(folder: Path, engine: str) -> Iterator[House]:
    """A server for a soak. Containers get a network of their own, which goes with them."""
    if engine == "process":
        with open_house(folder, Engine("process"), MODELS, settings=SETTINGS) as house:
            yield house
        return
    chosen = Engine("docker", build_mimic(), f"{NETWORK}-{folder.name}")
    try:
        with open_house(folder, chosen, MODELS, settings=SETTINGS) as house:
            yield house
    finally:
        with contextlib.closing(docker.from_env()) as client:
            for network in client.networks.list(names=[chosen.network]):
                network.remove()
