"""What goes in comes out again: across closing, a reboot, a cancelled caller and a failing save."""

import asyncio
import tempfile
import threading
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.control.ports import Changes
from orchestrator.core.entities import Failure, Note, Operation, OperationKind, OperationState
from orchestrator.core.errors import StoreError
from orchestrator.core.lifecycle import Instance, State
from orchestrator.store.repository import SqliteStore, open_store
from orchestrator.store.tables import InstanceRow, table_of
from tests.store.conftest import Opener

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
bytes_by_device = st.dictionaries(texts, st.integers(0, 2**50), max_size=3)
seconds = st.floats(allow_nan=False, allow_infinity=False)
failures = st.builds(
    Failure,
    message=texts,
    code=texts,
    exit_code=st.none() | st.integers(-64, 255),
    oom=st.booleans(),
    log_tail=st.lists(texts, max_size=3).map(tuple),
)
instances = st.builds(
    Instance,
    model=texts,
    state=st.sampled_from(State),
    since_s=seconds,
    failure=st.none() | failures,
    failures=st.integers(0, 10**6),
    retry_at_s=st.none() | seconds,
    load_time_s=st.floats(0, 1e6),
    unloads=st.lists(texts, max_size=3).map(tuple),
    unload_wanted=st.booleans(),
    force=st.booleans(),
    attempt=st.none() | texts,
    placement=bytes_by_device,
    claimed_at_s=seconds,
    started_at_s=seconds,
    ready_at_s=st.none() | seconds,
    host=st.none() | texts,
    port=st.none() | st.integers(1, 65535),
    drained_for=st.none() | texts,
    stop_reason=st.none() | texts,
    is_failing=st.booleans(),
    assumed_bytes=bytes_by_device,
    gone_at_s=st.none() | seconds,
    held_bytes=bytes_by_device,
    parameters=st.dictionaries(st.sampled_from(["context_size", "n_gpu_layers"]), st.integers(0, 1 << 20)),
    unexplained_before=bytes_by_device,
    reclaim_measured_s=seconds,
)

CLAIMED = Instance("m", State.CLAIMED, attempt="a1", placement={"GPU-1": 6}, claimed_at_s=5.0)


def test_every_field_of_an_instance_has_a_column() -> None:
    assert set(table_of(InstanceRow).columns.keys()) == {f.name for f in fields(Instance)}


@settings(max_examples=60, deadline=None)
@given(st.lists(instances, max_size=4))
def test_instances_come_back_as_they_were(saved: list[Instance]) -> None:
    expected = {instance.model: instance for instance in saved}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.db"
        store, _ = open_store(path, "boot", lambda: 1.0)
        asyncio.run(store.save(Changes(expected)))
        store.close()
        store, kept = open_store(path, "boot", lambda: 1.0)
        store.close()
    assert kept.instances == expected


async def test_the_newest_row_of_a_model_replaces_the_older(opened: Opener) -> None:
    store, _ = opened()
    ready = replace(CLAIMED, state=State.READY, ready_at_s=9.0, load_time_s=2.5, port=8001)
    await store.save(Changes({"m": CLAIMED}))
    await store.save(Changes({"m": ready}))
    store.close()
    _, kept = opened()
    assert kept.instances == {"m": ready}


async def test_pins_and_holds_come_and_go(opened: Opener) -> None:
    store, _ = opened()
    await store.save(Changes(pins={"a": True, "b": False, "c": True}, holds={"a": 12.5, "d": 13.5}))
    await store.save(Changes(pins={"c": None}, holds={"a": None, "d": None}))
    store.close()
    _, kept = opened()
    assert kept.pins == {"a": True, "b": False}
    assert kept.holds == {}


async def test_operations_are_kept_and_replaced(store: SqliteStore) -> None:
    running = Operation("o1", OperationKind.LOAD, "m", created_at=7.0)
    done = replace(running, state=OperationState.FAILED, message="no", code="x", freed_bytes=3, ended_at=8.0)
    await store.save(Changes(operations={"o1": running}))
    assert await store.operation("o1") == running
    await store.save(Changes(operations={"o1": done}))
    assert await store.operation("o1") == done
    assert await store.operation("o2") is None


async def test_the_owner_and_the_choice_stay(opened: Opener) -> None:
    store, first = opened()
    assert store.choice() is None
    store.remember_choice("docker", "nvml")
    store.close()
    store, again = opened()
    assert again.owner == first.owner
    assert store.choice() == ("docker", "nvml")


async def test_two_databases_have_two_owners(opened: Opener, tmp_path: Path) -> None:
    assert opened()[1].owner != opened(at=tmp_path / "other.db")[1].owner


# ---- boots ----


async def test_a_restart_within_a_boot_is_told_from_a_reboot(opened: Opener) -> None:
    store, _ = opened()
    await store.save(Changes({"m": CLAIMED}))
    store.close()
    store, kept = opened()
    assert kept.same_boot
    store.close()
    _, kept = opened(boot="boot-2")
    assert not kept.same_boot
    assert kept.instances == {"m": CLAIMED}


async def test_a_crash_during_recovery_does_not_make_old_times_look_new(opened: Opener) -> None:
    store, _ = opened()
    await store.save(Changes({"m": CLAIMED}))
    store.close()
    store, _ = opened(boot="boot-2")
    await store.save(Changes(pins={"m": True}))  # not what recovery saves
    store.close()
    assert not opened(boot="boot-2")[1].same_boot


async def test_the_first_save_after_a_reboot_forgets_the_times_it_does_not_replace(opened: Opener) -> None:
    store, _ = opened()
    other = Instance("other", State.FAILED, since_s=3.0, failures=2, retry_at_s=99.0)
    await store.save(Changes({"m": CLAIMED, "other": other}))
    store.close()
    store, _ = opened(boot="boot-2")
    stopped = Instance("m", State.STOPPED, since_s=1.0)
    await store.save(Changes({"m": stopped}))
    store.close()
    _, kept = opened(boot="boot-2")
    assert kept.same_boot
    assert kept.instances == {"m": stopped, "other": replace(other, since_s=0.0, retry_at_s=None)}


# ---- history of attempts ----


async def follow(store: SqliteStore, *steps: Instance) -> None:
    for step in steps:
        await store.save(Changes({step.model: step}))


async def test_an_attempt_that_served_is_in_the_history(store: SqliteStore) -> None:
    starting = replace(CLAIMED, state=State.STARTING)
    ready = replace(starting, state=State.READY, ready_at_s=8.0)
    stopping = replace(ready, state=State.STOPPING, stop_reason="idle for 30 min")
    await follow(store, CLAIMED, starting, ready, stopping)
    await follow(store, replace(stopping, state=State.RECLAIMING), replace(stopping, state=State.STOPPED))
    (past,) = await store.attempts(limit=5)
    assert past.state is State.STOPPED
    assert past.placement == {"GPU-1": 6}
    assert past.reason == "idle for 30 min"
    assert past.started_at and past.ready_at and past.ended_at
    assert past.claimed_at < past.started_at < past.ready_at < past.ended_at
    assert past.exit_code is None


async def test_a_failed_attempt_keeps_its_reasons(store: SqliteStore) -> None:
    failure = Failure("It ran out of memory.", exit_code=137, oom=True, log_tail=("one", "two"))
    starting = replace(CLAIMED, state=State.STARTING)
    await follow(store, CLAIMED, starting, replace(starting, state=State.RECLAIMING))
    await follow(store, replace(starting, state=State.FAILED, failure=failure))
    (past,) = await store.attempts(limit=5, model="m")
    assert (past.state, past.reason) == (State.FAILED, "It ran out of memory.")
    assert (past.exit_code, past.oom, past.log_tail) == (137, True, ("one", "two"))
    assert past.ready_at is None


async def test_the_next_attempt_leaves_the_history_of_the_last_alone(store: SqliteStore) -> None:
    failed = replace(CLAIMED, state=State.FAILED, failure=Failure("It broke."))
    queued = replace(failed, state=State.QUEUED)
    second = replace(queued, state=State.CLAIMED, attempt="a2")
    given_up = replace(second, state=State.QUEUED)
    await follow(store, CLAIMED, failed, queued, second, given_up, replace(given_up, state=State.FAILED))
    newest, oldest = await store.attempts(limit=5)
    assert (oldest.id, oldest.state, oldest.reason) == ("a1", State.FAILED, "It broke.")
    assert (newest.id, newest.state, newest.reason) == ("a2", State.STOPPED, None)
    assert newest.started_at is None


# ---- the event log ----


async def test_events_come_oldest_first_and_by_model(store: SqliteStore) -> None:
    await store.log(
        (Note("a", "1", model="m"), Note("b", "2", model="n", attempt="x", data={"k": [1, None]}))
    )
    await store.log((Note("c", "3", model="m"),))
    assert [event.text for event in await store.events(limit=2)] == ["2", "3"]
    assert [event.text for event in await store.events(limit=9, model="m")] == ["1", "3"]
    (event,) = await store.events(limit=9, model="n")
    assert (event.kind, event.attempt, event.data) == ("b", "x", {"k": [1, None]})


async def test_text_that_is_no_text_does_not_stop_a_save(store: SqliteStore) -> None:
    broken = b"caf\xe9".decode(errors="surrogateescape")
    failed = replace(CLAIMED, state=State.FAILED, failure=Failure(broken, log_tail=(broken,)))
    await follow(store, CLAIMED, failed)
    await store.log((Note("k", broken, data={"line": broken, "big": 2**70}),))
    (event,) = await store.events(limit=1)
    assert (event.text, event.data) == ("caf?", {"line": "caf?", "big": 2**70})
    assert (await store.attempts(limit=1))[0].log_tail == ("caf?",)


async def test_pruning_keeps_the_newest_and_what_still_runs(store: SqliteStore) -> None:
    await store.log(tuple(Note("k", str(n)) for n in range(10)))
    done = OperationState.SUCCEEDED
    operations = [Operation(f"o{n}", OperationKind.LOAD, "m", n, done, ended_at=n) for n in range(1, 5)]
    running = Operation("o0", OperationKind.LOAD, "m", created_at=0.0)
    await store.save(Changes(operations={o.id: o for o in (running, *operations)}))
    for attempt in ("a1", "a2", "a3"):
        await follow(
            store, replace(CLAIMED, attempt=attempt), replace(CLAIMED, attempt=attempt, state=State.FAILED)
        )
    await follow(store, replace(CLAIMED, attempt="a4"))

    await store.prune(keep_events=3, keep_operations=2, keep_attempts=2)

    assert [event.text for event in await store.events(limit=99)] == ["7", "8", "9"]
    left = [o.id for o in (running, *operations) if await store.operation(o.id)]
    assert left == ["o0", "o3", "o4"]
    assert [past.id for past in await store.attempts(limit=9)] == ["a4", "a3"]


async def test_an_event_id_is_never_given_twice(store: SqliteStore) -> None:
    await store.log((Note("k", "1"),))
    before = (await store.events(limit=1))[0].id
    await store.prune(keep_events=0, keep_operations=0, keep_attempts=0)
    assert await store.events(limit=1) == ()
    await store.log((Note("k", "2"),))
    assert (await store.events(limit=1))[0].id > before


# ---- all or nothing, and threads ----


async def test_a_save_that_fails_leaves_nothing_behind(opened: Opener) -> None:
    store, _ = opened()
    impossible = Operation("o", OperationKind.LOAD, None, created_at=1.0)  # type: ignore[arg-type]
    with pytest.raises(StoreError):
        await store.save(Changes({"m": CLAIMED}, operations={"o": impossible}, pins={"m": True}))
    await store.save(Changes(pins={"n": True}))
    store.close()
    _, kept = opened()
    assert (kept.instances, kept.pins) == ({}, {"n": True})


async def test_a_save_goes_on_when_its_caller_is_cancelled(opened: Opener) -> None:
    store, _ = opened()
    go_on = threading.Event()
    store._writing.submit(go_on.wait)  # so that the save is still in the queue when it is cancelled
    saving = asyncio.create_task(store.save(Changes({"m": CLAIMED})))
    await asyncio.sleep(0)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    go_on.set()
    store.close()
    assert opened()[1].instances == {"m": CLAIMED}


async def test_many_writers_and_readers_at_once(store: SqliteStore) -> None:
    async def work(n: int) -> None:
        await store.save(Changes({f"m{n}": replace(CLAIMED, model=f"m{n}", attempt=f"a{n}")}))
        await store.log((Note("k", str(n)),))
        assert await store.events(limit=1)

    await asyncio.gather(*(work(n) for n in range(50)))
    assert len(await store.events(limit=99)) == 50
    assert len(await store.attempts(limit=99)) == 50


async def test_a_claim_that_is_given_up_ends_its_attempt(store: SqliteStore) -> None:
    """Planned again, withdrawn, or forgotten over a restart: no process will ever tell its end."""
    claimed = Instance("m", State.CLAIMED, attempt="a1", placement={"GPU-0": 1})
    await store.save(Changes(instances={"m": claimed}))
    await store.save(Changes(instances={"m": claimed.without_attempt(State.QUEUED)}))
    await store.save(Changes(instances={"m": replace(claimed, attempt="a2")}))
    newest, given_up = await store.attempts(limit=5)
    assert (newest.id, newest.ended_at) == ("a2", None)
    assert (given_up.id, given_up.state, given_up.reason) == ("a1", "stopped", "given up")
    assert given_up.ended_at is not None
