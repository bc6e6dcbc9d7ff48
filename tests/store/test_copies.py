"""Copies: when one is made, which are kept, what is wrong with one, and putting one back."""

import asyncio
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.control.ports import Changes
from orchestrator.core.entities import Note, Operation, OperationKind, OperationState
from orchestrator.core.errors import DatabaseInUse, StoreError
from orchestrator.store import backup, copies, database
from orchestrator.store.backup import back_up, check, restore
from orchestrator.store.copies import Copy, copies_of, copy_problem, surplus
from orchestrator.store.explain import Damaged
from orchestrator.store.files import beside
from orchestrator.store.repository import SqliteStore
from tests.store.conftest import Opener
from tests.store.peer import numbered

DAY_S = 86400.0
NOON = 1_800_014_400.0  # 12:00 UTC


def save(store: SqliteStore, number: int) -> None:
    asyncio.run(store.save(numbered(number)))


def fill(store: SqliteStore) -> None:
    asyncio.run(store.log(tuple(Note("k", "x" * 500, model=f"m{n}") for n in range(400))))


def damage(path: Path, start: int | None = None) -> bytes:
    """Overwrite ten pages in the middle, or all from `start`; the file as it is then."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2 if start is None else start)
        file.write(os.urandom(10 * 4096 if start is None else size - start))
    return path.read_bytes()


def names(path: Path) -> set[str]:
    return {file.name for file in path.parent.rglob("*") if file.is_file()}


@pytest.fixture
def two_copies(opened: Opener, path: Path) -> tuple[Copy, Copy]:
    """A closed database that says 3, with copies that say 1 and 2."""
    store, _ = opened()
    made = []
    for number in (1, 2):
        save(store, number)
        made.append(back_up(path, NOON + number))
    save(store, 3)
    fill(store)
    store.close()
    return made[0], made[1]


# ---- making them


def test_a_copy_is_one_plain_file_of_what_was_saved(opened: Opener, path: Path) -> None:
    store, _ = opened()
    save(store, 1)
    made = asyncio.run(store.back_up())
    save(store, 2)
    assert made is not None
    assert made.parent == path.parent / "backups"
    assert list(made.parent.iterdir()) == [made]
    with closing(sqlite3.connect(made)) as copy:
        assert copy.execute("SELECT load_time_s FROM instance").fetchall() == [(1.0,)]
        assert copy.execute("PRAGMA journal_mode").fetchone() == ("delete",)


async def test_a_copy_is_made_only_when_something_changed(store: SqliteStore) -> None:
    await store.save(numbered(1))
    assert await store.back_up() is not None
    assert await store.back_up() is None
    assert await store.health() is None
    assert await store.back_up() is None
    await store.log((Note("k", "news"),))
    assert await store.back_up() is not None


async def test_the_writer_goes_on_while_a_copy_is_made(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hold the copy at its most busy moment: its source open, its pages just read."""
    await store.save(numbered(1))
    at_work, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    whole_check = copies.full_problem

    def held(connection: sqlite3.Connection) -> str | None:
        loop.call_soon_threadsafe(at_work.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
        return whole_check(connection)

    monkeypatch.setattr(backup, "full_problem", held)
    copying = asyncio.create_task(store.back_up())
    await at_work.wait()
    await store.save(numbered(2))
    assert (await store.instances())["m"].load_time_s == 2
    assert not copying.done()
    go_on.set()
    made = await copying
    assert made is not None
    assert copy_problem(made) is None
    assert await store.back_up() is not None  # what was written meanwhile is not in the first one


def test_a_copy_that_finds_no_room_leaves_the_others(
    two_copies: tuple[Copy, Copy], opened: Opener, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names(path)
    usage = shutil.disk_usage(path.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(StoreError, match=r"No copy .* nearly full"):
        back_up(path, NOON + 9)
    assert names(path) == before


def test_a_damaged_database_is_not_copied_over_good_copies(two_copies: tuple[Copy, Copy], path: Path) -> None:
    damage(path)
    before = names(path)
    with pytest.raises(Damaged, match=rf"damaged .*last good copy is {two_copies[1].path}"):
        back_up(path, NOON + 9)
    assert names(path) - before <= {"orchestrator.db-shm", "orchestrator.db-wal"}
    assert copies_of(path) == [two_copies[1], two_copies[0]]


def test_what_a_killed_copy_left_goes_in_time(opened: Opener, path: Path) -> None:
    opened()[0].close()
    first = back_up(path, NOON).path
    left, fresh = (first.with_name(f"orchestrator-{name}.db.part") for name in ("old", "new"))
    left.touch()
    fresh.touch()
    os.utime(left, (NOON - DAY_S * 900,) * 2)
    back_up(path, NOON + 1)
    assert not left.exists()
    assert fresh.exists()  # another command's, perhaps


# ---- which are kept


def test_three_and_one_a_day_for_a_week_and_one_before_each_schema() -> None:
    def copy(at: float, before: str | None = None) -> Copy:
        return copies.new_copy(Path("/state/o.db"), at, before)

    minutes = [copy(NOON - n * 900) for n in range(20)]
    days = [copy(NOON - n * DAY_S - k) for n in range(1, 12) for k in (0, 100)]
    old, new, other = copy(NOON - 99 * DAY_S, "0002"), copy(NOON - 98 * DAY_S, "0002"), copy(5.0, "0003")
    dropped = surplus([*minutes, *days, old, new, other], NOON)
    kept = [c for c in [*minutes, *days, old, new, other] if c not in dropped]
    assert kept == [*minutes[:3], *days[0:12:2], new, other]


@given(st.lists(st.floats(0, 60 * DAY_S)), st.floats(0, 90 * DAY_S))
def test_the_newest_is_always_kept_and_the_rest_is_bounded(times: list[float], now: float) -> None:
    made = [Copy(Path(str(n)), at) for n, at in enumerate(times)]
    dropped = surplus(made, now)
    kept = [copy for copy in made if copy not in dropped]
    assert len(kept) >= min(3, len(made))
    if made:
        assert max(copy.made_at for copy in made) in {copy.made_at for copy in kept}
    assert len([copy for copy in kept if copy.made_at <= now]) <= 3 + 8


def test_a_clock_that_was_wrong_never_drops_the_copy_just_made(opened: Opener, path: Path) -> None:
    opened()[0].close()
    for n in range(5):
        back_up(path, NOON + n)
    made = back_up(path, 60.0)  # 1970
    assert made.path.exists()


# ---- noticing damage


def test_a_damaged_file_is_refused_with_the_way_back(
    two_copies: tuple[Copy, Copy], opened: Opener, path: Path
) -> None:
    broken = damage(path)
    with pytest.raises(Damaged) as refused:
        opened()
    said = refused.value.message
    assert f"{path} is damaged" in said
    assert f"The last good copy is {two_copies[1].path}, made " in said
    assert f"orchestrator database restore {two_copies[1].path} --database {path}" in said
    assert path.read_bytes() == broken


def test_a_copy_that_is_bad_itself_is_not_the_way_back(
    two_copies: tuple[Copy, Copy], opened: Opener, path: Path
) -> None:
    damage(path)
    two_copies[1].path.write_bytes(b"x" * 5000)
    with pytest.raises(Damaged, match=str(two_copies[0].path)):
        opened()


def test_damage_without_a_copy_says_so(opened: Opener, path: Path) -> None:
    store, _ = opened()
    fill(store)
    store.close()
    damage(path)
    with pytest.raises(Damaged, match=r"There is no copy of it"):
        opened()


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["lost", "empty"])
def test_a_lost_database_is_not_begun_anew_where_copies_are(
    two_copies: tuple[Copy, Copy], opened: Opener, path: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(path)
    with pytest.raises(Damaged, match=r"(missing|empty), but there are copies .*database restore"):
        opened()
    shutil.rmtree(path.parent / "backups")
    assert opened()[1].instances == {}


async def test_damage_found_by_a_write_ends_writing_and_stays_known(
    two_copies: tuple[Copy, Copy], opened: Opener, path: Path
) -> None:
    store, _ = opened()
    damage(path, 4096)  # as a disk would, under the server: every page but the first
    with pytest.raises(Damaged, match="damaged"):
        for number in range(3):
            await store.save(numbered(number))
            await store.log((Note("k", "x"),))
    said = str(await store.health())
    assert f"restore {two_copies[1].path}" in said
    with pytest.raises(Damaged):
        await store.save(Changes(pins={"m": True}))
    with pytest.raises(Damaged):
        await store.events(limit=1)


async def test_damage_that_only_a_whole_look_finds_is_found_by_the_copy(
    two_copies: tuple[Copy, Copy], opened: Opener, path: Path
) -> None:
    store, _ = opened()
    damage(path)
    with pytest.raises(Damaged):
        await store.back_up()
    assert "damaged" in str(await store.health())
    assert copies_of(path) == [two_copies[1], two_copies[0]]


def test_looking_for_damage_at_the_start_has_a_limit(
    opened: Opener, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened()[0].close()
    rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            f"INSERT INTO event (at, kind, text, data) {rows} SELECT i, 'k', hex(zeroblob(99)), '{{}}' FROM n"
        )
    with closing(copies.reader_of(path)) as connection:
        assert copies.quick_problem(connection, 100.0) is None
        with pytest.raises(TimeoutError):
            copies.quick_problem(connection, 0.001)
        assert connection.execute("SELECT count(*) FROM event").fetchone() == (100000,)
    monkeypatch.setattr(database, "CHECK_LIMIT_S", 0.001)
    save(opened()[0], 1)


# ---- putting one back


def test_restoring_the_newest_keeps_what_was_there(
    two_copies: tuple[Copy, Copy], opened: Opener, path: Path
) -> None:
    owner = opened_owner(opened)
    broken = damage(path)
    done = restore(path)
    assert done.copy == two_copies[1].path
    assert done.aside is not None
    assert done.aside.read_bytes() == broken
    _, kept = opened()
    assert kept.instances["m"].load_time_s == 2
    assert kept.owner == owner


def opened_owner(opened: Opener) -> str:
    store, kept = opened()
    store.close()
    return kept.owner


def test_restoring_a_chosen_one(two_copies: tuple[Copy, Copy], opened: Opener, path: Path) -> None:
    restore(path, two_copies[0].path)
    assert opened()[1].instances["m"].load_time_s == 1


def test_a_log_beside_the_database_goes_aside_with_it(two_copies: tuple[Copy, Copy], path: Path) -> None:
    beside(path, "-wal").write_bytes(b"what the file lacks")
    done = restore(path)
    assert done.aside is not None
    assert beside(done.aside, "-wal").read_bytes() == b"what the file lacks"
    assert not beside(path, "-wal").exists()


def test_two_restores_at_the_same_moment_keep_both(two_copies: tuple[Copy, Copy], path: Path) -> None:
    asides = {restore(path, at=NOON).aside for _ in range(2)}
    assert all(aside and aside.exists() for aside in asides)
    assert len(asides) == 2


def test_nothing_is_restored_while_a_server_runs(
    two_copies: tuple[Copy, Copy], opened: Opener, path: Path
) -> None:
    store, _ = opened()
    with pytest.raises(DatabaseInUse):
        restore(path)
    save(store, 4)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"x" * 5000, "not a database"), (b"", "not a database of this program")],
)
def test_what_is_no_good_copy_is_refused(
    two_copies: tuple[Copy, Copy], path: Path, tmp_path: Path, content: bytes | None, words: str
) -> None:
    bad = tmp_path / "bad.db"
    if content is not None:
        bad.write_bytes(content)
    before = names(path), path.read_bytes()
    with pytest.raises(StoreError, match=rf"{words}.*Nothing was changed.*{two_copies[0].path}"):
        restore(path, bad)
    assert (names(path), path.read_bytes()) == before


def test_the_database_is_no_copy_of_itself(two_copies: tuple[Copy, Copy], path: Path) -> None:
    with pytest.raises(StoreError, match="the database itself"):
        restore(path, path)


def test_old_wishes_are_not_carried_out_again(opened: Opener, path: Path) -> None:
    store, _ = opened()
    running = Operation("o", OperationKind.UNLOAD, "m", created_at=1.0)
    asyncio.run(store.save(Changes(operations={"o": running})))
    back_up(path, NOON)
    store.close()
    restore(path)
    store, kept = opened()
    assert kept.operations == {}
    ended = asyncio.run(store.operation("o"))
    assert ended is not None
    assert (ended.state, ended.code) == (OperationState.FAILED, "restored")
    assert ended.ended_at is not None


class Interrupted(BaseException):
    """Stands for a kill: nothing after it is done."""


@pytest.mark.parametrize("step", range(1, 5))
def test_a_restore_killed_at_any_step_can_be_called_again(
    two_copies: tuple[Copy, Copy], opened: Opener, path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps are the renames: the fresh copy, the old file, its log, and into the place."""
    broken = damage(path)
    beside(path, "-wal").write_bytes(b"log")
    count = 0

    def counted(original: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def call(self: Path, to: Path) -> Path:
            nonlocal count
            count += 1
            if count == step:
                raise Interrupted
            return original(self, to)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "rename"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        with pytest.raises(Interrupted):
            restore(path, at=NOON)
    with pytest.raises(StoreError):
        opened()  # neither the damaged one nor an empty one is served from
    restore(path, at=NOON)
    assert opened()[1].instances["m"].load_time_s == 2
    asides = [file for file in path.parent.glob("*.aside-*") if not file.name.endswith("-wal")]
    assert [file.read_bytes() for file in asides if file.stat().st_size > 100] == [broken]


# ---- looking


def test_a_check_reads_all_and_changes_nothing(two_copies: tuple[Copy, Copy], path: Path) -> None:
    sound = check(path)
    assert (sound.problem, sound.copies) == (None, (two_copies[1], two_copies[0]))
    assert sound.size_bytes == path.stat().st_size
    broken = damage(path)
    assert check(path).problem
    assert path.read_bytes() == broken


def test_a_check_of_nothing(path: Path) -> None:
    with pytest.raises(StoreError, match="There is no database"):
        check(path)
