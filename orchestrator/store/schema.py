"""The schema's revisions: which this program knows, and how a database gets to the newest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

import orchestrator
from orchestrator.core.errors import SchemaTooNew, StoreError
from orchestrator.store.copies import newest_good, way_back

_PACKAGE = Path(orchestrator.__file__).parent


def migrate(engine: Engine, path: Path, before: Callable[[str], None]) -> None:
    """Bring the database to the newest revision. `before` is called with it if there is data to lose.

    Raises SchemaTooNew, or StoreError if it is another program's; a migration that fails leaves no trace.
    """
    config = Config()
    config.set_main_option("script_location", str(migrations_dir()).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    head = str(scripts.get_current_head())
    with engine.connect() as connection:
        current = _revision(connection, path)
        if current == head:
            return
        if current is not None and current not in revisions(scripts):
            raise _too_new(path, current, head)
        connection.rollback()  # SQLite cannot copy what is being written
        if current is not None:
            before(head)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def revisions(scripts: ScriptDirectory | None = None) -> frozenset[str]:
    """All that this program understands."""
    scripts = scripts or ScriptDirectory(str(migrations_dir()))
    return frozenset(script.revision for script in scripts.walk_revisions())


def migrations_dir() -> Path:
    """Where the migrations are: inside an installed package, or beside it in a checkout."""
    # The installed place first: beside an installed package, `migrations` may be anybody's.
    for place in (_PACKAGE / "_shipped" / "migrations", _PACKAGE.parent / "migrations"):
        if (place / "env.py").is_file():
            return place
    raise StoreError("The installation is incomplete: the folder 'migrations' is missing. Install it again.")


def _revision(connection: Connection, path: Path) -> str | None:
    """The schema's revision, None if the database is empty."""
    current = MigrationContext.configure(connection).get_current_revision()
    tables = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
    if current is None and tables:
        raise StoreError(f"{path} is a database of another program. Name another file as the database.")
    return current


def _too_new(path: Path, current: str, head: str) -> SchemaTooNew:
    known = revisions()
    rest = "no copy of before the change is there"
    if newest_good(path, known) is not None:
        rest = f"go back to before the change: {way_back(path, known)}"
    return SchemaTooNew(
        f"The database {path} was written by a newer version of this program (its schema is {current}, this "
        f"program knows up to {head}). Install the newer version again, or name another database, or {rest}"
    )
