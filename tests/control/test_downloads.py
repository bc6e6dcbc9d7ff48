"""Downloads over a hub in memory: saved before they begin, joined, cancelled, and gone on with."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.control.downloads import Downloads
from orchestrator.control.ports import Changes, Wanted
from orchestrator.core.downloads import after
from orchestrator.core.entities import Download, DownloadState, HubFile, Operation, OperationKind
from orchestrator.core.errors import HubError, NotDownloadable, StoreError, UnknownModel
from orchestrator.core.events import DownloadEnded, Event
from orchestrator.core.lifecycle import State
from tests.control.world import NOBODY, World, model, turning

NAME = "o/m:Q4"
ONE = Download(NAME, "o/m", "c0ffee", (HubFile("m-Q4.gguf", 100, "b10b"),), "m-Q4.gguf", "", alias="o/m")


class FakeHub:
    """Has one model. Fetches and removals are held while their events are cleared."""

    def __init__(self, saved: Callable[[], Download | None]) -> None:
        self.fetching, self.finding, self.removing = asyncio.Event(), asyncio.Event(), asyncio.Event()
        for event in (self.fetching, self.finding, self.removing):
            event.set()
        self.fetches: list[Download | None] = []  # the row that was saved when each began
        self.cancelled = 0
        self.removed: list[Collection[Path]] = []
        self.problem: HubError | None = None
        self._saved = saved

    async def find(self, wanted: Wanted, promised_bytes: int) -> Download:
        await self.finding.wait()
        return ONE if wanted.model is None else replace(ONE, model=wanted.model, alias=None, is_listed=True)

    async def fetch(self, download: Download, report: Callable[[int], None]) -> None:
        self.fetches.append(self._saved())
        report(50)
        try:
            await self.fetching.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.problem is not None:
            raise self.problem

    async def remove(self, download: Download, others: Collection[Path]) -> int:
        await self.removing.wait()
        self.removed.append(others)
        if self.problem is not None:
            raise self.problem
        return 100


class House:
    def __init__(self, *kept: Download) -> None:
        self.world = World({m.id: m for m in (model("small", 300), model("listed", 200, problem="absent"))})
        self.loop = self.world.loop
        self.store = self.world.store
        kinds = {DownloadState.REMOVING: OperationKind.REMOVE, DownloadState.RUNNING: OperationKind.DOWNLOAD}
        running = [Operation(d.operation, kinds[d.state], d.model, 1.0) for d in kept]
        self.loop._snapshot = replace(
            self.loop.snapshot,
            downloads={d.model: d for d in kept},
            operations={operation.id: operation for operation in running},
        )
        self.hub = FakeHub(lambda: self.store.downloads.get(NAME))
        self.downloads = Downloads(
            self.loop,
            self.hub,
            listed=self.listed,
            renew=self.renew,
            files_of_others=lambda _: [Path("/other")],
        )
        self.world.engine.sizes_mib = {NAME: 100, "small": 300}

    @staticmethod
    def listed(name: str) -> Wanted | None:
        if name == "small":
            raise NotDownloadable("it is a file")
        return Wanted("o/m", "listed", "*") if name == "listed" else None

    async def renew(self, *news: Event) -> None:
        """As the server does it: the models of the files, and those that were downloaded."""
        known = self.loop.snapshot
        models = {name: known.models[name] for name in ("small", "listed")}
        for download in functools.reduce(after, news, known.downloads).values():
            if download.state is not DownloadState.REMOVING:
                problem = None if download.state is DownloadState.COMPLETE else "coming"
                models[download.model] = model(download.model, 100, problem=problem)
        await self.loop.renew(models, known.devices, *news)

    def status(self, operation: str) -> tuple[str, str | None]:
        found = self.loop.snapshot.operations[operation]
        return found.state.value, found.code

    async def ended(self, operation: str) -> None:
        await self.world.until(lambda: self.loop.snapshot.operations[operation].ended_at is not None)


@asynccontextmanager
async def living(house: House) -> AsyncIterator[House]:
    async with turning(house.world, NOBODY):
        house.world.measure()
        work = asyncio.create_task(house.downloads.run())
        await house.world.turns()
        yield house
        assert not work.done(), "it ended by itself"
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with living(House()) as house:
        yield house


async def test_it_is_saved_before_it_begins(house: House) -> None:
    outcome = await house.downloads.ask("o/m")
    await house.ended(outcome.operation.id)
    (row,) = house.hub.fetches
    assert row is not None
    assert (row.state, row.operation) == (DownloadState.RUNNING, outcome.operation.id)
    assert house.status(outcome.operation.id) == ("succeeded", None)
    complete = house.store.downloads[NAME]
    assert complete is not None
    assert complete.state is DownloadState.COMPLETE
    assert house.loop.snapshot.models[NAME].problem is None


async def test_all_who_ask_at_once_join_one(house: House) -> None:
    house.hub.finding.clear()
    house.hub.fetching.clear()
    asked = [asyncio.create_task(house.downloads.ask(name)) for name in ("o/m", NAME, "o/m")]
    await asyncio.sleep(0)
    house.hub.finding.set()
    outcomes = await asyncio.gather(*asked)
    late = await house.downloads.ask("o/m")
    assert {outcome.operation.id for outcome in [*outcomes, late]} == {late.operation.id}
    house.hub.fetching.set()
    await house.ended(late.operation.id)
    assert len(house.hub.fetches) == 1


async def test_one_that_is_here_is_a_success_at_once(house: House) -> None:
    await house.ended((await house.downloads.ask(NAME)).operation.id)
    house.hub.finding.clear()  # the hub is not even asked
    again = await house.downloads.ask("o/m")
    assert house.status(again.operation.id) == ("succeeded", None)
    assert len(house.hub.fetches) == 1


async def test_nothing_begins_that_could_not_be_saved(house: House) -> None:
    house.store.problem = "the disk is full"
    with pytest.raises(StoreError):
        await house.downloads.ask("o/m")
    house.store.problem = None
    assert house.hub.fetches == []
    assert house.loop.snapshot.downloads == {}
    outcome = await house.downloads.ask("o/m")
    await house.ended(outcome.operation.id)


async def test_one_that_fails_is_forgotten_with_its_reason(house: House) -> None:
    house.hub.problem = HubError("no luck", "checksum_mismatch")
    outcome = await house.downloads.ask("o/m")
    await house.ended(outcome.operation.id)
    assert house.status(outcome.operation.id) == ("failed", "checksum_mismatch")
    assert house.store.downloads == {NAME: None}
    assert NAME not in house.loop.snapshot.models


async def test_removing_cancels_and_takes_what_has_come(house: House) -> None:
    house.hub.fetching.clear()
    coming = await house.downloads.ask("o/m")
    await house.world.until(lambda: house.hub.fetches)
    removal = await house.downloads.remove("o/m")
    assert house.status(coming.operation.id) == ("failed", "download_cancelled")
    assert house.hub.cancelled == 1
    await house.ended(removal.operation.id)
    assert house.status(removal.operation.id) == ("succeeded", None)
    assert house.hub.removed == [[Path("/other")]]
    assert house.store.downloads == {NAME: None}
    house.hub.fetching.set()
    await house.ended((await house.downloads.ask("o/m")).operation.id)
    assert len(house.hub.fetches) == 2


async def test_a_model_in_use_is_not_pulled_from_under_its_request(house: House) -> None:
    await house.ended((await house.downloads.ask(NAME)).operation.id)
    gate = await house.world.ask(NAME)
    removal = await house.downloads.remove(NAME)
    await house.world.until(lambda: house.world.state(NAME) == State.DRAINING)
    await house.world.turns(3)
    assert house.hub.removed == []
    assert (await house.downloads.remove(NAME)).operation.id == removal.operation.id
    with pytest.raises(NotDownloadable, match="is being removed"):
        await house.downloads.ask(NAME)
    gate.leave()
    await house.world.at_rest(NAME)
    await house.ended(removal.operation.id)
    assert house.hub.removed == [[Path("/other")]]
    assert house.loop.snapshot.downloads == {}


async def test_a_removal_that_fails_leaves_the_model(house: House) -> None:
    await house.ended((await house.downloads.ask(NAME)).operation.id)
    house.hub.problem = HubError("not ours to delete")
    removal = await house.downloads.remove(NAME)
    await house.ended(removal.operation.id)
    assert house.status(removal.operation.id) == ("failed", "hub_error")
    assert house.loop.snapshot.models[NAME].problem is None
    house.hub.problem = None
    await house.ended((await house.downloads.remove(NAME)).operation.id)


async def test_what_the_files_name_is_no_ones_to_remove(house: House) -> None:
    with pytest.raises(NotDownloadable, match="a file of the catalogue names it"):
        await house.downloads.remove("small")
    with pytest.raises(UnknownModel):
        await house.downloads.remove("nobody")
    with pytest.raises(NotDownloadable, match="it is a file"):
        await house.downloads.ask("small")


async def test_a_listed_one_is_forgotten_once_it_is_complete(house: House) -> None:
    outcome = await house.downloads.ask("listed")
    await house.ended(outcome.operation.id)
    assert house.status(outcome.operation.id) == ("succeeded", None)
    assert house.store.downloads == {"listed": None}


@pytest.mark.parametrize("state", [DownloadState.RUNNING, DownloadState.REMOVING])
async def test_a_new_life_of_the_server_goes_on(state: DownloadState) -> None:
    kept = replace(ONE, operation="op-then", state=state)
    async with living(House(kept)) as house:
        await house.ended("op-then")
        assert house.status("op-then") == ("succeeded", None)
        assert bool(house.hub.fetches) == (state is DownloadState.RUNNING)
        assert bool(house.hub.removed) == (state is DownloadState.REMOVING)


async def test_progress_is_shown_and_not_saved(house: House) -> None:
    house.hub.fetching.clear()
    await house.downloads.ask("o/m")
    await house.world.until(lambda: house.loop.snapshot.downloaded_bytes.get(NAME) == 50)
    saves: list[Changes] = []
    house.store.before_save = saves.append
    await house.world.turns(3)
    assert saves == []
    house.hub.fetching.set()
    await house.world.until(lambda: not house.loop.snapshot.downloaded_bytes)


async def test_removals_at_once_are_one(house: House) -> None:
    await house.ended((await house.downloads.ask(NAME)).operation.id)
    outcomes = await asyncio.gather(*(house.downloads.remove(NAME) for _ in range(3)))
    for outcome in outcomes:
        await house.ended(outcome.operation.id)
    assert len({outcome.operation.id for outcome in outcomes}) == 1
    assert len(house.hub.removed) == 1


async def test_a_removal_right_after_the_question_takes_all_away_once(house: House) -> None:
    asked = asyncio.create_task(house.downloads.ask(NAME))
    await house.world.until(lambda: NAME in house.loop.snapshot.downloads)
    removal = await house.downloads.remove(NAME)
    await house.ended((await asked).operation.id)
    await house.ended(removal.operation.id)
    assert len(house.hub.removed) == 1
    assert house.loop.snapshot.downloads == {}


async def test_a_removal_that_meets_the_download_s_own_failure_is_done(house: House) -> None:
    house.hub.fetching.clear()
    coming = await house.downloads.ask(NAME)
    await house.world.until(lambda: house.hub.fetches)
    house.loop.inbox.post(DownloadEnded(NAME, "no luck", "hub_error"))  # is folded first, in the same turn
    removal = await house.downloads.remove(NAME)
    await house.ended(removal.operation.id)
    assert house.status(coming.operation.id) == ("failed", "hub_error")
    assert house.status(removal.operation.id) == ("succeeded", None)
    assert house.loop.snapshot.downloads == {}
