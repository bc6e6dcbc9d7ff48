"""Who waits is served: hot models give way, nobody swaps without end, queues are bounded, waits end."""

import asyncio
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from tests.e2e.world import World, mimic, until

GIB = 1024
STAY_S = 10.0
"""How long a busy model stays, at least, once it is ready."""

MODELS = {
    "hot": mimic(14 * GIB),
    "rival": mimic(14 * GIB),
    "veteran": mimic(14 * GIB),
    "newcomer": mimic(14 * GIB),
    "narrow": mimic(4 * GIB, load_s=1.5, queue_limit=3),
    "wide": mimic(20 * GIB, queue_limit=2),
    "lingering": mimic(14 * GIB, release_s=1.5),
    "beside": mimic(4 * GIB),
}


class Traffic:
    """Three clients that ask one model without a pause, so that it is never idle.

    Each asks for answers of another length: those who were let in together do not all end together, and one
    is under way also where the clients get no processor for a while.
    """

    def __init__(self, world: World, model: str) -> None:
        self._world = world
        self._model = model
        self._is_over = False
        self.answers: list[httpx.Response] = []
        self.longest_s = 0.0
        self._tasks = [asyncio.create_task(self._ask(answer_s)) for answer_s in (0.4, 0.65, 0.9)]

    async def _ask(self, answer_s: float) -> None:
        while not self._is_over:
            asked_s = time.monotonic()
            self.answers.append(await self._world.chat(self._model, delay_s=answer_s))
            self.longest_s = max(self.longest_s, time.monotonic() - asked_s)

    async def end(self) -> None:
        """Let them finish. Raises AssertionError unless every request was answered."""
        self._is_over = True
        await asyncio.gather(*self._tasks)
        assert {answer.status_code for answer in self.answers} == {200}, self.answers


# ---- hot models ----


async def test_a_steady_stream_of_requests_to_one_does_not_starve_another(world: World) -> None:
    await world.load("hot")
    traffic = Traffic(world, "hot")
    await until(lambda: len(traffic.answers) >= 4)
    asked_s = time.monotonic()
    answer = await world.chat("rival")
    waited_s = time.monotonic() - asked_s
    assert answer.status_code == 200, answer.text
    assert waited_s < STAY_S + 15
    await traffic.end()
    hot, rival = world.seen.runs("hot")[0], world.seen.runs("rival")[0]
    assert hot.last_s < rival.first_s


async def test_two_hot_models_take_turns_and_do_not_thrash(world: World) -> None:
    traffics = [Traffic(world, "hot"), Traffic(world, "rival")]
    await until(lambda: len(world.seen.runs("hot", "rival")) >= 4, timeout_s=75)
    for traffic in traffics:
        await traffic.end()
    runs = world.seen.runs("hot", "rival")
    for before, after in itertools.pairwise(runs):
        assert before.model != after.model, "they take turns"
        assert before.last_s < after.first_s
    stays_s = [run.last_s - run.first_s for run in runs[:3]]
    assert min(stays_s) > STAY_S - 0.5, f"a swap costs a load, so each stays a while: {stays_s}"
    assert max(traffic.longest_s for traffic in traffics) < 2 * STAY_S + 15, "nobody waits for long"


# ---- bounded queues and bounded waits ----


async def test_a_full_queue_refuses_the_next_and_says_when_to_come_back(world: World) -> None:
    asked = [world.ask("narrow") for _ in range(3)]
    await world.wait_queued("narrow", waiting=3)
    surplus = await asyncio.gather(*(world.chat("narrow") for _ in range(4)))
    for answer in surplus:
        assert answer.status_code in (429, 503), answer.text
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert answer.json()["error"]["code"] == "queue_full"
        assert answer.json()["error"]["queue_limit"] == 3
    assert (await world.chat("beside")).status_code == 200, "each model has a queue of its own"
    assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}
    world.seen.one_run("narrow")


async def test_a_deadline_ends_the_wait_and_nothing_else(world: World) -> None:
    stream = await world.busy("hot")
    asked_s = time.monotonic()
    patient = world.ask("rival")
    await world.wait_queued("rival")
    answer = await world.chat("rival", headers={"X-Deadline-Seconds": "1.5"})
    assert answer.status_code == 503, answer.text
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert 1.4 < time.monotonic() - asked_s < 8
    assert not patient.done()
    await world.wait_queued("rival", waiting=1)
    await world.let_flow("hot")
    assert (await patient).status_code == 200
    assert stream.is_complete


async def test_who_comes_back_after_a_503_is_as_old_as_before(world: World) -> None:
    stream = await world.busy("hot")
    answer = await world.chat("veteran", headers={"X-Deadline-Seconds": "1"})
    assert answer.status_code == 503, answer.text
    await until(lambda: queue_is_empty(world))
    later = world.ask("newcomer")
    await world.wait_queued("newcomer")
    again = world.ask("veteran")
    await world.wait_queued("veteran")
    ages_s = {entry["model"]: entry["for_s"] for entry in (await world.get("/state"))["queue"]}
    assert ages_s["veteran"] > ages_s["newcomer"] + 0.9, "it had waited a second already"
    await world.let_flow("hot")
    assert [answer.status_code for answer in await asyncio.gather(later, again)] == [200, 200]
    assert stream.is_complete
    assert [run.model for run in world.seen.runs()] == ["hot", "veteran", "newcomer"]


# ---- clients that leave ----


@contextmanager
def nothing_starts(world: World, model: str) -> Iterator[None]:
    before = len(world.seen.runs(model))
    yield
    assert len(world.seen.runs(model)) == before


async def hang_up(*asked: "asyncio.Task[httpx.Response]") -> None:
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


async def queue_is_empty(world: World) -> bool:
    return not (await world.get("/state"))["queue"]


async def test_clients_that_leave_the_queue_leave_nothing_in_it(world: World) -> None:
    """Also a full queue has room again; and what nobody waits for any more is not loaded."""
    stream = await world.busy("hot")
    waiting = [world.ask("wide"), world.ask("wide")]
    await world.wait_queued("wide", waiting=2)
    assert (await world.chat("wide")).json()["error"]["code"] == "queue_full"
    with nothing_starts(world, "wide"):
        await hang_up(waiting[0])
        await world.wait_queued("wide", waiting=1)
        await hang_up(waiting[1])
        await until(lambda: queue_is_empty(world))
        await world.let_flow("hot")
        await stream.wait_end()
        assert stream.is_complete
        await world.wait_sample()
    assert (await world.view("wide"))["state"] == "stopped"
    assert world.seen.holding("hot") == {0: 14 * GIB}, "nobody made room for one that nobody wants"


async def test_a_client_that_leaves_a_claim_stops_neither_the_load_nor_others(world: World) -> None:
    await world.load("lingering")
    asked = [world.ask("wide"), world.ask("wide")]
    await world.wait_state("wide", "claimed")
    await hang_up(asked[0])
    assert (await asked[1]).status_code == 200
    view = await world.view("wide")
    assert (view["state"], view["instance"]["in_flight"]) == ("ready", 0)
    assert (await world.stats("wide"))["requests"] == 1
    world.seen.one_run("wide")


async def test_everybody_who_leaves_at_once_leaves_exact_counts(world: World) -> None:
    """Some while they wait, some while they stream, some with the request half sent."""
    await world.load("beside")
    await world.hold("beside")
    streams = [world.stream("beside", tokens=50) for _ in range(6)]
    for stream in streams:
        await stream.wait_begun()
    waiting = [world.ask("narrow") for _ in range(3)]
    await world.wait_queued("narrow", waiting=3)
    host, port = world.server.url.removeprefix("http://").split(":")
    half = [await asyncio.open_connection(host, int(port)) for _ in range(3)]
    for _, writer in half:
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999\r\n\r\n{")
    await asyncio.gather(*(stream.leave() for stream in streams), hang_up(*waiting))
    for _, writer in half:
        writer.close()

    async def is_quiet() -> bool:
        stats = await world.stats("beside")
        instance = (await world.view("beside"))["instance"]
        return stats["in_flight"] == instance["in_flight"] == 0 and stats["client_left"] == 6

    await until(is_quiet)
    await until(lambda: queue_is_empty(world))
    await world.let_flow("beside")
    assert (await world.chat("beside")).status_code == 200
    assert (await world.chat("narrow")).status_code == 200
    world.seen.one_run("narrow")
