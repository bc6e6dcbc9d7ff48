"""A closed database of root's, in a folder that others may read, for those who try it as somebody else."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.store.database import Database
from tests.support import open_folder

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@contextmanager
def database_of_root() -> Iterator[Path]:
    with open_folder() as folder:
        path = folder / "state" / "orchestrator.db"
        Database(path).close()
        path.chmod(0o644)
        path.parent.chmod(0o755)
        yield path
