"""What the self-check finds: one disagreement planted at a time, and none where all agree."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.control.ports import Exit, Found
from orchestrator.control.selfcheck import compare
from orchestrator.core.entities import Entry
from orchestrator.core.lifecycle import Instance, State
from orchestrator.core.snapshot import Snapshot
from tests.core.worlds import gpu, instance, model, world

GPU0 = "GPU-0"
RUNS = Found("a-1", "a", "127.0.0.1", 1)


def knowing(
    state: State = State.READY, used_mib: int = 600, foreign_mib: int = 0, **more: object
) -> Snapshot:
    return world(
        [gpu(0, 1000)],
        [model("a", 600)],
        [instance("a", state, {GPU0: 600}, **more)],
        used_mib={("a", GPU0): used_mib},
        foreign_mib={GPU0: foreign_mib},
    )


def differences(
    snapshot: Snapshot, found: tuple[Found, ...] = (RUNS,), rows: dict[str, Instance] | None = None
) -> list[str]:
    known = dict(snapshot.instances) if rows is None else rows
    return [difference.text for difference in compare(snapshot, found, known, snapshot)]


def test_all_agree() -> None:
    assert differences(knowing()) == []


@pytest.mark.parametrize("found", [(), (Found("a-1", "a", exit=Exit(1)),)])
def test_the_engine_does_not_run_what_serves(found: tuple[Found, ...]) -> None:
    assert differences(knowing(), found) == ["'a' is ready, but the engine does not run it"]


def test_the_engine_runs_what_nobody_knows() -> None:
    stranger = Found("b-7", "b", "127.0.0.1", 2)
    assert differences(knowing(), (RUNS, stranger)) == ["the engine runs an attempt of 'b' that nobody knows"]


def test_the_store_remembers_another_state() -> None:
    snapshot = knowing()
    row = replace(snapshot.instances["a"], state=State.STARTING)
    told = "'a' is ready, but the store remembers it as starting"
    assert differences(snapshot, rows={"a": row}) == [told]


def test_the_store_remembers_another_attempt() -> None:
    snapshot = knowing()
    assert len(differences(snapshot, rows={"a": replace(snapshot.instances["a"], attempt="a-0")})) == 1
    assert len(differences(snapshot, rows={})) == 1


def test_a_store_that_cannot_be_read_is_not_compared() -> None:
    snapshot = knowing()
    assert compare(snapshot, (RUNS,), None, snapshot) == ()


def test_it_uses_more_than_it_reserved() -> None:
    told = "'a' uses 700 MiB on GPU 0 (GPU 0), and reserved only 600 MiB"
    assert differences(knowing(used_mib=700)) == [told]
    assert differences(knowing(used_mib=650)) == [], "within the tolerance"


def test_it_uses_nothing_of_its_reservation() -> None:
    assert differences(knowing(used_mib=0)) == [
        "'a' serves, but uses nothing of its 600 MiB on GPU 0 (GPU 0)"
    ]


def test_other_programs_took_what_was_promised() -> None:
    told = (
        "GPU 0 (GPU 0) lacks 300 MiB for what is promised there: 100 MiB are free, "
        "others hold game (PID 99) 700 MiB (another program)"
    )
    assert differences(knowing(used_mib=200, foreign_mib=700)) == [told]


def test_room_that_a_claim_waits_for_is_not_overbooked() -> None:
    snapshot = knowing(State.STOPPING)
    claim = instance("b", State.CLAIMED, {GPU0: 900})
    waiting = replace(
        snapshot,
        instances={**snapshot.instances, "b": claim},
        entries={"b": Entry("b", 0.0, ("r",))},
    )
    assert differences(waiting) == []


def test_an_unmeasured_device_says_nothing() -> None:
    snapshot = knowing(used_mib=0)
    blind = replace(snapshot, sample=replace(snapshot.sample, readings={}, errors={GPU0: "lost"}))
    assert differences(blind) == []


def test_what_changed_while_it_was_read_is_left_to_the_next_time() -> None:
    before = knowing(State.STARTING)
    after = replace(before, instances={"a": replace(before.instances["a"], state=State.READY)})
    assert compare(before, (), {}, after) == ()


def test_a_difference_keeps_its_key_while_it_lasts() -> None:
    one, two = (compare(s, (RUNS,), None, s) for s in (knowing(used_mib=700), knowing(used_mib=720)))
    assert [d.key for d in one] == [d.key for d in two]
    assert one[0].text != two[0].text
