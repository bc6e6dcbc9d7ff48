"""What was learned comes out as it went in, can be read beside a server, and is forgotten row by row."""

import asyncio
from pathlib import Path

import pytest

from orchestrator.control.ports import Changes
from orchestrator.core.entities import Recipe
from orchestrator.core.errors import DatabaseInUse, StoreError
from orchestrator.core.learned import Learned, Load
from orchestrator.store.learned import forget, look
from tests.store.conftest import Opener

RECIPE = Recipe("480-b10b", "5e41", 8192, 999, 4, "q8_0", "q4_0", 2)
ROW = Learned(RECIPE, "H100, driver 580", 6 << 30, (Load("a", 5 << 30, 5 << 30, 1.5), Load("b", 1, 2, 3.0)))
OTHER = Learned(RECIPE, "H200, driver 580", 6 << 30, floor_bytes=7 << 30)


def test_rows_are_added_replaced_and_removed(opened: Opener, path: Path) -> None:
    store, kept = opened()
    assert kept.learned == {}
    asyncio.run(store.save(Changes(learned={ROW.key: ROW, OTHER.key: OTHER})))
    assert look(path) == {ROW.key: ROW, OTHER.key: OTHER}, "also while a server has it open"
    longer = Learned(RECIPE, ROW.card, 1, ROW.loads[1:])
    assert longer.key == ROW.key
    asyncio.run(store.save(Changes(learned={longer.key: longer, OTHER.key: None})))
    store.close()
    assert opened()[1].learned == {ROW.key: longer}


def test_rows_are_forgotten_only_while_no_server_runs(opened: Opener, path: Path) -> None:
    store, _ = opened()
    asyncio.run(store.save(Changes(learned={ROW.key: ROW, OTHER.key: OTHER})))
    with pytest.raises(DatabaseInUse):
        forget(path, [ROW.key])
    store.close()
    forget(path, [ROW.key])
    assert look(path) == {OTHER.key: OTHER}


def test_without_a_database_that_is_said_and_none_is_made(path: Path) -> None:
    with pytest.raises(StoreError, match="There is no database"):
        look(path)
    assert not path.exists()
