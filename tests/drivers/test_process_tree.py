"""Reading all of /proc often, and what that must not leave behind."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable

import pytest

from orchestrator.drivers import process_tree as tree


@pytest.mark.parametrize(
    "look",
    [
        lambda: tree.members("nobody", "none", os.getpid(), tree.started_ticks(os.getpid())),
        lambda: tree.marked_processes("nobody"),
        lambda: tree.read_environment(os.getpid()),
    ],
    ids=["members", "marked", "environment"],
)
def test_a_look_at_processes_interns_no_names(
    look: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python renews its table of interned names, 4 MiB, when enough of them have come and gone, and each
    thread in which that happens keeps the room. There are hundreds of names in one look."""
    me, intern, interned = threading.get_ident(), sys.intern, list[str]()

    def counting(text: str) -> str:
        if threading.get_ident() == me:
            interned.append(text)
        return intern(text)

    monkeypatch.setattr(sys, "intern", counting)
    look()
    monkeypatch.undo()
    assert interned == []
