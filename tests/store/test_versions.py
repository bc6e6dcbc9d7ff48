"""Every schema there was: from each one, with rows in it, to the newest; and released ones never change.

`schemas/REVISION.sql` is the schema as that revision's migration builds it, with rows as a program of
then left them. A new migration needs a new file: `python -m tests.store.test_versions` writes its
schema; the rows are added by hand.
"""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from orchestrator.core.entities import Download, HubFile, Recipe
from orchestrator.core.learned import Learned, Load
from orchestrator.core.lifecycle import Instance, State
from orchestrator.store.backup import check, restore
from orchestrator.store.copies import copies_of
from orchestrator.store.schema import migrations_dir
from tests.store.conftest import Opener
from tests.store.peer import numbered

SCHEMAS = Path(__file__).with_name("schemas")
REVISIONS = [s.revision for s in ScriptDirectory(str(migrations_dir())).walk_revisions()][::-1]
OLDER = REVISIONS[:-1]


def build(path: Path, revision: str) -> None:
    """Run the migrations from empty up to this one."""
    config = Config()
    config.set_main_option("script_location", str(migrations_dir()).replace("%", "%%"))
    with create_engine(f"sqlite:///{path}").connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
        connection.commit()


def schema(path: Path) -> list[str]:
    query = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name != 'sqlite_sequence' ORDER BY name"
    with closing(sqlite3.connect(path)) as connection:
        return [" ".join(sql.split()) + ";" for (sql,) in connection.execute(query)]


def left_by(revision: str, path: Path) -> None:
    """A database as a program with this schema left it."""
    path.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((SCHEMAS / f"{revision}.sql").read_text())


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_released_migration_still_builds_what_it_built(revision: str, tmp_path: Path) -> None:
    released = SCHEMAS / f"{revision}.sql"
    assert released.exists(), "write it with `python -m tests.store.test_versions`"
    left_by(revision, tmp_path / "released.db")
    build(tmp_path / "built.db", revision)
    assert schema(tmp_path / "built.db") == schema(tmp_path / "released.db")


@pytest.mark.parametrize("revision", REVISIONS)
def test_from_every_version_with_its_rows(revision: str, opened: Opener, path: Path) -> None:
    left_by(revision, path)
    store, kept = opened("boot-then")
    assert kept.owner == "owner-then"
    assert kept.same_boot
    assert kept.pins == {"alpha": True}
    assert kept.holds == {"beta": 1_800_000_600.0}
    assert list(kept.operations) == ["op-running"]
    assert kept.instances["alpha"] == Instance(
        "alpha",
        State.READY,
        since_s=50.0,
        load_time_s=2.5,
        attempt="a1",
        placement={"GPU-1": 64},
        claimed_at_s=40.0,
        started_at_s=41.0,
        ready_at_s=50.0,
        host="127.0.0.1",
        port=8001,
    )
    tiny = HubFile("tiny-Q8_0.gguf", 480, "b10b")
    name = "acme/tiny-GGUF"
    download = Download(f"{name}:Q8_0", name, "c0ffee", (tiny,), tiny.path, "op-running", alias=name)
    assert kept.downloads == ({} if revision == "0001" else {download.model: download})
    recipe = Recipe("480-b10b", "5e41", 8192, 999, 4, "f16", "f16", 1)
    buffers = {} if revision < "0006" else {"CUDA0": {"model": 4_671_737_856, "KV": 603_979_776}}
    load = Load("a1", 6_025_000_000, 6_038_000_000, 1_800_000_003.0, buffers)
    learned = Learned(recipe, "NVIDIA H100 80GB HBM3, driver 580.159.04", 6_044_000_000, (load,))
    assert kept.learned == ({} if revision < "0004" else {"33c8f0": learned})
    assert store.choice() == ("process", "host")
    assert [event.text for event in asyncio.run(store.events(limit=9))] == ["'alpha' is ready after 2.50 s"]
    assert [past.id for past in asyncio.run(store.attempts(limit=9))] == ["a1"]
    asyncio.run(store.save(numbered(1)))
    store.close()
    assert check(path).problem is None
    assert [copy.before for copy in copies_of(path)] == ([REVISIONS[-1]] if revision in OLDER else [])


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_copy_of_every_version_can_be_put_back(
    revision: str, opened: Opener, path: Path, tmp_path: Path
) -> None:
    opened()[0].close()
    left_by(revision, tmp_path / "old.db")
    restore(path, tmp_path / "old.db")
    store, kept = opened("boot-then")
    assert kept.instances["alpha"].attempt == "a1"
    assert kept.operations == {}
    store.close()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name in REVISIONS:
            target = SCHEMAS / f"{name}.sql"
            if not target.exists():
                build(Path(folder) / f"{name}.db", name)
                target.write_text("\n".join(schema(Path(folder) / f"{name}.db")) + "\n")
                print(f"{target}: add the rows of the one before, and alembic_version")
