"""Kill the server with SIGKILL at a random moment under load, start it again, compare; and again.

The rounds of a run share one database, so that damage adds up. Everything random comes from one seed.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

import httpx

from tests.crash.audit import Row, audit, claims, environment, meta, rows, running
from tests.e2e.recorder import Recorder
from tests.e2e.world import House, mimic, until, whole_text
from tests.soak.load import REFUSALS, Crowd

GIB = 1024
MODELS = {
    "quick": mimic(4 * GIB),
    "steady": mimic(6 * GIB),
    "slow-to-load": mimic(7 * GIB, load_s=0.6),
    "slow-to-stop": mimic(6 * GIB, release_s=0.5),
    "deaf": mimic(5 * GIB, ignore_sigterm=1),
    "big": mimic(18 * GIB, load_s=0.2),
}
STOP_GRACE = "1s"
CLIENTS = 6
RANDOM_WITHIN_S = 2.5
AFTER_EVENT_S = 0.03
RECOVERY_WITHIN_S = 2.0
DOWN_S = 0.7
PATIENCE_S = (0.0, 0.5, 2.0)
MOMENT_S = 20.0
ADOPTED = "found running, adopted"


@dataclass(frozen=True)
class Moment:
    """When to kill: at a line of the server's log, at something the engine shows, or at a time."""

    name: str
    line: str = ""
    sees_engine: bool = False
    within_s: float = AFTER_EVENT_S
    is_recovering: bool = False


MOMENTS = (
    Moment("any time", within_s=RANDOM_WITHIN_S),
    Moment("a start was just ordered", r" starts on "),
    Moment("the engine just made something", sees_engine=True),
    Moment("a stop was just ordered", r" stops: "),
    Moment("one just became ready", r" is ready after "),
    Moment("memory just came back", r" gave back "),
    Moment("while it recovers", within_s=RECOVERY_WITHIN_S, is_recovering=True),
)


@dataclass
class Round:
    """What happened in one round. `wrong` is empty if all agreed afterwards."""

    number: int
    moment: str
    adopted: int = 0
    wrong: list[str] = field(default_factory=list)


class Rounds:
    """Rounds on one house, whose server runs at the beginning of each and at its end."""

    def __init__(self, house: House, crowd: Crowd, http: httpx.AsyncClient, seed: int) -> None:
        self._house = house
        self._crowd = crowd
        self._http = http
        self._rng = random.Random(seed)
        self._owner = meta(house)["owner"]

    async def run(self, number: int) -> Round:
        moment = MOMENTS[number % len(MOMENTS)]
        this = Round(number, moment.name)
        if not moment.is_recovering:
            await self._wait(moment)
        self._kill()
        if moment.is_recovering:
            await self._kill_while_it_recovers(moment)
        killed_at = time.time()
        before = {row.attempt: row for row in rows(self._house) if row.state == "ready"}
        await self._disturb()
        survivors = {attempt: before[attempt] for attempt in running(self._house).models if attempt in before}
        await asyncio.sleep(self._rng.uniform(0, DOWN_S))
        await asyncio.to_thread(self._house.server.start)
        self._crowd.came_up()
        this.adopted = len(survivors)
        this.wrong += await self._adopted(survivors, killed_at)
        await self._crowd.quiet(patience_s=self._rng.choice(PATIENCE_S))
        this.wrong += await audit(self._house, self._http)
        this.wrong += await self._serves()
        if meta(self._house)["owner"] != self._owner:
            this.wrong.append("the owner's id has changed")
        self._crowd.resume()
        return this

    def _kill(self) -> None:
        self._crowd.going_down()
        self._house.server.kill()

    async def _kill_while_it_recovers(self, moment: Moment) -> None:
        self._house.server.launch()
        await asyncio.sleep(self._rng.uniform(0, moment.within_s))
        self._kill()

    async def _wait(self, moment: Moment) -> None:
        """Until the moment has come, and a random while longer."""
        if moment.line:
            await self._until_line(re.compile(moment.line))
        elif moment.sees_engine:
            await self._until_made()
        await asyncio.sleep(self._rng.uniform(0, moment.within_s))

    async def _until_line(self, line: re.Pattern[str]) -> None:
        path = self._house.server.log_file
        with path.open(errors="replace") as log:
            log.seek(0, os.SEEK_END)
            await until(lambda: line.search(log.read()), MOMENT_S, f"the log should say {line.pattern!r}")

    async def _until_made(self) -> None:
        """Something new of ours: a container (started or not), or a process's folder."""
        seen = self._made()
        await until(lambda: self._made() - seen, MOMENT_S, "the engine should make something")

    def _made(self) -> set[str]:
        if self._house.engine == "process":
            return {path.name for path in (self._house.server.state_dir / "attempts").iterdir()}
        found = running(self._house)
        return {*found.models, *found.unstarted}

    async def _disturb(self) -> None:
        """Now and then one of them dies while nobody watches."""
        held = sorted(pid for index in self._house.gpus.indices for pid in self._house.gpus.processes(index))
        if held and self._rng.random() < 0.3:
            pid = self._rng.choice(held)
            attempt = environment(pid).get("ORCHESTRATOR_ATTEMPT")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            await until(lambda: attempt not in running(self._house).models, MOMENT_S, f"{pid} should end")

    async def _adopted(self, survivors: dict[str, Row], killed_at: float) -> list[str]:
        """Each that was ready and still ran was taken over, and not started a second time."""
        events = (await self._http.get("/log?limit=1000")).json()["events"]
        news = [event for event in events if event["at"] >= killed_at and event["kind"] == "recovered"]
        taken_over = {event["attempt"] for event in news if ADOPTED in event["text"]}
        return [
            f"'{row.model}' {attempt} ran on and was not adopted"
            for attempt, row in survivors.items()
            if attempt not in taken_over
        ]

    async def _serves(self) -> list[str]:
        """A request is answered, whatever was under way."""
        model = self._rng.choice(list(MODELS))
        body = {"model": model, "messages": [{"role": "user", "content": "hello"}], "mimic": {"tokens": 3}}
        answer = await self._http.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            return [f"'{model}' answers {answer.status_code} {answer.text}"]
        text = answer.json()["choices"][0]["message"]["content"]
        return [] if text == whole_text(model, 3) else [f"'{model}' answers {text!r}"]


def overlaps(seen: Recorder) -> list[str]:
    """Models of which two processes held memory at the same time."""
    wrong = []
    for model in MODELS:
        runs = seen.runs(model)
        wrong += [f"'{model}' ran twice: {a} and {b}" for a, b in pairwise(runs) if b.first_s < a.last_s]
    return wrong


async def run_rounds(house: House, count: int, seed: int, tell: Callable[[str], None]) -> list[Round]:
    """So many rounds under load. Raises AssertionError at the first that leaves something wrong."""
    crowd = Crowd(house.server, list(MODELS), seed, REFUSALS)
    done: list[Round] = []
    with Recorder(house.gpus).running() as seen, house.gpus.watch_overbooking(0.01) as overbooking:
        async with (
            crowd.running(CLIENTS),
            httpx.AsyncClient(base_url=house.server.url, timeout=120, trust_env=False) as http,
        ):
            rounds = Rounds(house, crowd, http, seed)
            for number in range(count):
                this = await rounds.run(number)
                done.append(this)
                tell(f"round {number} ({this.moment}): {this.adopted} adopted, {len(this.wrong)} wrong")
                found = this.wrong + crowd.tally.lost + overlaps(seen) + overbooking.moments
                assert found == [], f"seed {seed}, round {number}, {this.moment}: {found}"
            await crowd.quiet()
            assert (crowd.tally.unexplained, crowd.broken()) == (0, []), crowd.tally
    assert overbooking.samples > 0
    assert overbooking.moments == []
    assert house.gpus.overbooked() == [], "a start that did not fit"
    assert not claims(house) or set(claims(house)) <= set(running(house).models)
    tell(f"{crowd.tally}")
    return done
