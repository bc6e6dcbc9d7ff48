"""What `doctor` says: of a GPU by what that has reported and who has its memory, and of the catalogue."""

from pathlib import Path

import pytest

from orchestrator.catalogue.read import read_catalogue
from orchestrator.core.entities import Device, DeviceKind, Reading, Sample
from orchestrator.core.health import Blame, Incident, Reported
from orchestrator.core.lifecycle import State
from orchestrator.core.snapshot import Snapshot
from orchestrator.diagnosis import RECENT_S, catalogue_found, check_device, trouble_of
from orchestrator.settings import load_settings
from tests.core.worlds import gpu, instance, model, world

GPU = Device("GPU-0", 0, "RTX 3090", DeviceKind.GPU, 24 << 30)
NOW_S = 1.8e9


def house(*reported: Reported) -> Snapshot:
    sample = Sample(99.0, {GPU.id: Reading(0, 0, {})})
    return Snapshot(100.0, NOW_S, "t", {GPU.id: GPU}, {}, sample, incidents=reported)


@pytest.mark.parametrize(("ago_s", "warns"), [(60.0, True), (RECENT_S - 60, True), (RECENT_S + 60, False)])
def test_an_error_that_was_reported_is_a_warning_for_a_day(ago_s: float, warns: bool) -> None:
    found = trouble_of(house(Reported(NOW_S - ago_s, Incident(GPU.id, 31, Blame.PROGRAM, "XID 31"))), GPU.id)
    assert ("ago: XID 31" in found) is warns


def test_another_gpus_error_is_none_of_its() -> None:
    assert trouble_of(house(Reported(NOW_S, Incident("GPU-1", 31, Blame.PROGRAM, "XID 31"))), GPU.id) == ""


def test_the_catalogue_names_the_files_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "services" / "x").mkdir(parents=True)
    (tmp_path / "services" / "x" / "service.yaml").write_text("image: x\n")
    (tmp_path / "models.yaml").write_text("models: {a: {service: x, memory: 1GiB}}\n")

    def found(**chosen: str) -> str:
        settings = load_settings(**chosen)
        return catalogue_found(settings, read_catalogue(settings))

    assert found() == "1 model, 1 service (models.yaml)"
    assert found(models_dir="ggufs") == "1 model, 1 service (models.yaml, ggufs)"
    (tmp_path / "models.yaml").unlink()
    (tmp_path / "services").rename(tmp_path / "not here")
    assert found() == "2 models, 2 services (no models.yaml: the demos)"


@pytest.mark.parametrize(
    ("theirs_mib", "state", "status"),
    [
        (24100, None, "warning"),
        (23900, None, "ok"),
        (20000, State.STARTING, "warning"),
        (20000, State.CLAIMED, "ok"),
    ],
)
def test_headroom_and_promised_memory_that_others_have_is_a_warning(
    theirs_mib: int, state: State | None, status: str
) -> None:
    """A part of the headroom may be used, and while somebody makes room for a claim it is promised twice."""
    here = [instance("a", state, {"GPU-0": 4000})] if state else []
    snapshot = world(
        [gpu(0, 24176, headroom_mib=512)],
        [model("a", 4000)],
        here,
        used_mib={("a", "GPU-0"): 0} if here else {},
        foreign_mib={"GPU-0": theirs_mib},
    )
    check = check_device(snapshot, "GPU-0")
    assert check.status == status
    assert ("overcommitted by" in check.found) is (status == "warning")
    assert bool(check.advice) is (status == "warning")
