"""NvmlDevices over the real pynvml and the simulated library."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest

from orchestrator.control.ports import Roots
from orchestrator.core.entities import HOST, MIB, AttemptId, DeviceKind, Reading, Sample
from orchestrator.core.errors import DeviceError
from orchestrator.drivers import nvml_owners as module
from orchestrator.drivers.combined import CombinedDevices
from orchestrator.drivers.host import HostDevice
from orchestrator.drivers.nvml import NvmlDevices
from tests.mimic.process import mimic
from tests.nvml.simulated import SimulatedGpus
from tests.support import eventually

HEADROOM_BYTES = 512 * MIB
UNINITIALIZED, GPU_IS_LOST, VERSION_CHANGED, UNKNOWN = 1, 15, 18, 999
NO_ROOTS: Mapping[AttemptId, Roots] = {}


@pytest.fixture
def nvml(gpus: SimulatedGpus) -> Iterator[NvmlDevices]:
    nvml = NvmlDevices(HEADROOM_BYTES, list_every_s=0)  # every sample asks for everything
    nvml.open()
    yield nvml
    nvml.close()


def reading(sample: Sample, uuid: str) -> Reading:
    assert not sample.errors
    return sample.readings[uuid]


# ---- finding ----


def test_the_gpus_are_found_by_uuid(gpus: SimulatedGpus) -> None:
    nvml = NvmlDevices(HEADROOM_BYTES)
    first, second = nvml.open()
    nvml.close()
    assert [first.id, second.id] == gpus.uuids
    assert (first.index, first.name, first.kind) == (0, "Simulated RTX 3090", DeviceKind.GPU)
    assert first.capacity_bytes == (24576 - 400) * MIB
    assert second.usable_bytes == (12288 - 300 - 512) * MIB


def test_without_a_driver(gpus: SimulatedGpus) -> None:
    gpus.set_init_fault(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    with pytest.raises(DeviceError, match="driver is not loaded"):
        NvmlDevices(0).open()


def test_without_a_library(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_text("this is no library")
    code = (
        "from orchestrator.drivers.nvml import NvmlDevices\n"
        "from orchestrator.core.errors import DeviceError\n"
        "try: NvmlDevices(0).open()\n"
        "except DeviceError as error: print(error.message)"
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "install the driver" in said.stdout, said.stderr


def test_without_a_gpu(gpus: SimulatedGpus) -> None:
    for index in gpus.indices:
        (gpus.root / f"gpu{index}").unlink()
    with pytest.raises(DeviceError, match="there is none"):
        NvmlDevices(0).open()


def test_a_gpu_that_is_broken_from_the_start(gpus: SimulatedGpus) -> None:
    gpus.set_fault(1, GPU_IS_LOST)
    nvml = NvmlDevices(0)
    good, bad = nvml.open()
    assert good.capacity_bytes > 0
    assert bad.capacity_bytes == 0
    assert "fell off the bus" in nvml.sample(NO_ROOTS, 1.0).errors[bad.id]
    nvml.close()
    gpus.set_fault(0, GPU_IS_LOST)
    with pytest.raises(DeviceError, match=f"{good.id}.*{bad.id}"):
        NvmlDevices(0).open()


# ---- memory and whose it is ----


def test_an_empty_card(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    sample = nvml.sample(NO_ROOTS, 7.5)
    assert sample.taken_at_s == 7.5
    empty = reading(sample, gpus.uuids[0])
    assert (empty.free_bytes, empty.used_bytes) == ((24576 - 400) * MIB, 0)
    assert (empty.by_attempt, empty.foreign, empty.unexplained_bytes) == ({}, (), 0)
    assert not empty.attributed, "an empty list does not prove that processes would be listed"


def test_a_root_process_is_its_attempt(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    both = ",".join(gpus.uuids)
    with mimic(gpus.env, mib=600, cuda_visible_devices=both) as running:
        running.wait_ready()
        sample = nvml.sample({"a1": Roots(running.pid)}, 1.0)
    for uuid in gpus.uuids:
        assert reading(sample, uuid).by_attempt == {"a1": 300 * MIB}
        assert reading(sample, uuid).used_bytes == 300 * MIB
        assert reading(sample, uuid).foreign == ()


def test_what_descends_from_a_root_is_its_attempt(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    with gpus.hold_foreign(0, 200):
        sample = nvml.sample({"a1": Roots(os.getpid())}, 1.0)
    assert reading(sample, gpus.uuids[0]).by_attempt == {"a1": 200 * MIB}


def test_who_got_the_number_of_a_dead_parent_is_no_parent(
    gpus: SimulatedGpus, nvml: NvmlDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's parent has ended, and its PID is by now that of an attempt which began later."""
    read, parent = module.read_process, os.getpid()
    with gpus.hold_foreign(0, 200) as pid:
        nvml.sample(NO_ROOTS, 1.0)
        stranger = read(pid)
        assert stranger is not None
        newer = replace(stranger, pid=parent, started_ticks=stranger.started_ticks + 1)
        monkeypatch.setattr(
            module, "read_process", lambda number: newer if number == parent else read(number)
        )
        after = reading(nvml.sample({"a1": Roots(parent)}, 2.0), gpus.uuids[0])
    assert (after.by_attempt, [each.pid for each in after.foreign]) == ({}, [pid])


def test_the_nearest_root_wins(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    with gpus.hold_foreign(0, 200) as pid:
        sample = nvml.sample({"far": Roots(os.getpid()), "near": Roots(pid)}, 1.0)
    assert reading(sample, gpus.uuids[0]).by_attempt == {"near": 200 * MIB}


def test_a_mark_in_the_environment_is_enough(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    marked = gpus.env | {"ORCHESTRATOR_ATTEMPT": "a1"}
    with mimic(marked, mib=100, cuda_visible_devices=0) as running:
        running.wait_ready()
        not_ours = nvml.sample({"a2": Roots(1 << 30)}, 1.0)
        ours = nvml.sample({"a1": Roots(1 << 30)}, 2.0)
    assert reading(ours, gpus.uuids[0]).by_attempt == {"a1": 100 * MIB}
    assert [p.pid for p in reading(not_ours, gpus.uuids[0]).foreign] == [running.pid]


def test_whose_it_was_it_stays_until_it_is_gone(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    """The engine sees an end before the device does: until then the bytes are not a stranger's."""
    with gpus.hold_foreign(0, 200) as pid:
        nvml.sample({"a1": Roots(pid)}, 1.0)
        after = reading(nvml.sample({}, 2.0), gpus.uuids[0])
    assert (after.by_attempt, after.foreign) == ({"a1": 200 * MIB}, ())


@pytest.mark.parametrize(
    "line", ["0::/docker/{}", "0::/system.slice/docker-{}.scope", "4:memory:/docker/{}/x"]
)
def test_a_container_comes_before_everything_else(
    gpus: SimulatedGpus, nvml: NvmlDevices, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    container, read_text = "ab" * 32, module._read_text
    monkeypatch.setattr(
        module,
        "_read_text",
        lambda pid, name: line.format(container) + "\n" if name == "cgroup" else read_text(pid, name),
    )
    with gpus.hold_foreign(0, 100) as pid:
        sample = nvml.sample({"by_pid": Roots(pid), "by_id": Roots(1 << 30, container)}, 1.0)
    assert reading(sample, gpus.uuids[0]).by_attempt == {"by_id": 100 * MIB}


@pytest.mark.parametrize(
    ("cgroup", "container"),
    [
        ("0::/system.slice/docker-{0}.scope\n", "ab" * 32),
        ("5:memory:/docker/{0}\n1:cpu:/docker/{0}\n0::/\n", "ab" * 32),
        ("0::/../{0}\n", "ab" * 32),
        ("0::/docker/{0}/docker/{1}\n", "ab" * 32),  # an engine in a container: ours knows the outer one
        ("0::/user.slice/user-1000.slice/session-2.scope\n", None),
        ("", None),
    ],
)
def test_a_stranger_is_in_its_container(
    gpus: SimulatedGpus,
    nvml: NvmlDevices,
    monkeypatch: pytest.MonkeyPatch,
    cgroup: str,
    container: str | None,
) -> None:
    text, read_text = cgroup.format("ab" * 32, "01" * 32), module._read_text
    monkeypatch.setattr(
        module, "_read_text", lambda pid, name: text if name == "cgroup" else read_text(pid, name)
    )
    with gpus.hold_foreign(0, 100) as pid:
        (stranger,) = reading(nvml.sample({"a1": Roots(1 << 30, "ef" * 32)}, 1.0), gpus.uuids[0]).foreign
    assert (stranger.pid, stranger.container) == (pid, container)


def test_a_stranger_is_foreign_until_it_is_registered(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    with gpus.hold_foreign(1, 900) as pid:
        before = reading(nvml.sample(NO_ROOTS, 1.0), gpus.uuids[1])
        after = reading(nvml.sample({"a1": Roots(pid)}, 2.0), gpus.uuids[1])
    (stranger,) = before.foreign
    assert (stranger.pid, stranger.used_bytes) == (pid, 900 * MIB)
    assert stranger.name.startswith("python")
    assert after.by_attempt == {"a1": 900 * MIB}


def test_memory_of_nobody_is_unexplained(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    with gpus.hold_foreign(0, 100):
        gpus.set_extra_used(0, 300)
        late = reading(nvml.sample(NO_ROOTS, 1.0), gpus.uuids[0])
    assert (late.used_bytes, late.unexplained_bytes) == (400 * MIB, 300 * MIB)
    assert late.attributed
    assert eventually(lambda: reading(nvml.sample(NO_ROOTS, 2.0), gpus.uuids[0]).attributed)


def test_where_no_process_was_ever_seen_nothing_is_attributed(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    gpus.set_extra_used(0, 3000)
    sample = nvml.sample(NO_ROOTS, 1.0)
    assert not reading(sample, gpus.uuids[0]).attributed
    assert reading(sample, gpus.uuids[0]).unexplained_bytes == 3000 * MIB
    with gpus.hold_foreign(1, 100):
        nvml.sample(NO_ROOTS, 2.0)
        proven = nvml.sample(NO_ROOTS, 3.0)
    assert [reading(proven, uuid).attributed for uuid in gpus.uuids] == [True, True]


def list_of(*processes: tuple[int, int | None]) -> Callable[[object], list[SimpleNamespace]]:
    return lambda handle: [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in processes]


def test_bytes_the_driver_does_not_tell(
    gpus: SimulatedGpus, nvml: NvmlDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", list_of((os.getpid(), None)))
    told = reading(nvml.sample({"a1": Roots(os.getpid())}, 1.0), gpus.uuids[0])
    assert (told.by_attempt, told.attributed) == ({}, False)


def test_a_process_in_both_lists_counts_once(
    gpus: SimulatedGpus, nvml: NvmlDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", list_of((os.getpid(), 50)))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetGraphicsRunningProcesses", list_of((os.getpid(), 70), (2, 9)))
    both = reading(nvml.sample({"a1": Roots(os.getpid())}, 1.0), gpus.uuids[0])
    assert both.by_attempt == {"a1": 70}
    assert [process.used_bytes for process in both.foreign] == [9]


@pytest.mark.parametrize("used_mib", [[0, 100, 200, 300], [500, 400, 300, 200]], ids=["takes", "gives back"])
def test_what_moves_during_a_sample_is_never_free_and_taken_at_once(
    gpus: SimulatedGpus, nvml: NvmlDevices, monkeypatch: pytest.MonkeyPatch, used_mib: list[int]
) -> None:
    """Memory moves beside each list of processes: of the last two readings the fuller one counts."""
    ask, steps = pynvml.nvmlDeviceGetComputeRunningProcesses, iter(used_mib)

    def disturb(handle: object) -> object:
        if pynvml.nvmlDeviceGetUUID(handle) == gpus.uuids[0]:
            gpus.set_extra_used(0, next(steps))
        return ask(handle)

    gpus.set_extra_used(0, next(steps))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", disturb)
    moved = reading(nvml.sample(NO_ROOTS, 1.0), gpus.uuids[0])
    assert moved.free_bytes == (24576 - 400 - 300) * MIB


def test_what_moved_once_is_read_again(
    gpus: SimulatedGpus, nvml: NvmlDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that takes its memory just after it was listed would have it as its own and as nobody's."""
    ask, holders = pynvml.nvmlDeviceGetComputeRunningProcesses, ExitStack()

    def then_take(handle: object) -> object:
        listed = ask(handle)
        if not gpus.used_mib(0):
            holders.enter_context(gpus.hold_foreign(0, 500))
        return listed

    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", then_take)
    with holders:
        seen = reading(nvml.sample(NO_ROOTS, 1.0), gpus.uuids[0])
        assert [process.used_bytes for process in seen.foreign] == [500 * MIB]
        assert (seen.unexplained_bytes, seen.free_bytes) == (0, (24576 - 400 - 500) * MIB)


def test_a_process_that_has_just_ended_keeps_its_name(
    gpus: SimulatedGpus, nvml: NvmlDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpus.hold_foreign(0, 100) as pid:
        nvml.sample({"a1": Roots(pid)}, 1.0)
        monkeypatch.setattr(module, "read_process", lambda pid: None)
        sample = nvml.sample({"a1": Roots(pid)}, 2.0)
    assert reading(sample, gpus.uuids[0]).by_attempt == {"a1": 100 * MIB}


# ---- errors ----


@pytest.mark.parametrize("code", [GPU_IS_LOST, UNKNOWN, UNINITIALIZED, VERSION_CHANGED, 3, 4, 16])
def test_a_gpu_that_fails_leaves_the_other_alone(gpus: SimulatedGpus, nvml: NvmlDevices, code: int) -> None:
    gpus.set_fault(0, code)
    for now_s in (1.0, 2.5, 9.0):  # also after each initialisation
        sample = nvml.sample(NO_ROOTS, now_s)
        assert list(sample.readings) == [gpus.uuids[1]]
        assert list(sample.errors) == [gpus.uuids[0]]
    gpus.set_fault(0, 0)
    assert reading(nvml.sample(NO_ROOTS, 10.0), gpus.uuids[0]).free_bytes > 0


def test_a_lost_initialisation_is_made_again(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    pynvml.nvmlShutdown()
    broken = nvml.sample(NO_ROOTS, 10.0)
    assert (set(broken.errors), broken.readings) == (set(gpus.uuids), {})
    assert nvml.sample(NO_ROOTS, 10.9).readings == {}
    assert set(nvml.sample(NO_ROOTS, 11.0).readings) == set(gpus.uuids)


def test_initialising_again_is_tried_ever_more_rarely(
    gpus: SimulatedGpus, nvml: NvmlDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []
    init = pynvml.nvmlInit
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: (tries.append(now_s), init()))
    gpus.set_init_fault(VERSION_CHANGED)
    pynvml.nvmlShutdown()
    now_s = 0.0
    while now_s < 200:
        errors = nvml.sample(NO_ROOTS, now_s).errors
        assert set(errors) == set(gpus.uuids)
        now_s += 0.5
    assert tries == [1, 3, 7, 15, 31, 63, 123, 183]
    assert "restart the server" in errors[gpus.uuids[0]]
    gpus.set_init_fault(0)
    now_s = 250.0
    assert set(nvml.sample(NO_ROOTS, now_s).readings) == set(gpus.uuids)
    pynvml.nvmlShutdown()
    nvml.sample(NO_ROOTS, 300.0)
    now_s = 301.0
    assert set(nvml.sample(NO_ROOTS, now_s).readings) == set(gpus.uuids)  # soon again, after it was well


def test_gpus_keep_their_uuid_when_their_order_changes(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    uuids = gpus.uuids
    first, second, aside = (gpus.root / name for name in ("gpu0", "gpu1", "aside"))
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    pynvml.nvmlShutdown()
    nvml.sample(NO_ROOTS, 1.0)
    sample = nvml.sample(NO_ROOTS, 2.0)
    assert reading(sample, uuids[0]).free_bytes == (24576 - 400) * MIB
    assert reading(sample, uuids[1]).free_bytes == (12288 - 300) * MIB


def test_a_gpu_that_is_gone_after_initialising(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    uuids = gpus.uuids
    (gpus.root / "gpu1").unlink()
    pynvml.nvmlShutdown()
    nvml.sample(NO_ROOTS, 1.0)
    sample = nvml.sample(NO_ROOTS, 2.0)
    assert list(sample.readings) == [uuids[0]]
    assert "not there any more" in sample.errors[uuids[1]]


def test_a_library_too_old(gpus: SimulatedGpus, nvml: NvmlDevices, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_old(handle: object) -> None:
        raise pynvml.NVMLLibraryMismatchError("unversioned")

    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", too_old)
    assert "too old" in nvml.sample(NO_ROOTS, 1.0).errors[gpus.uuids[0]]


def test_a_driver_without_the_second_version_of_the_query(
    gpus: SimulatedGpus, nvml: NvmlDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = pynvml.nvmlDeviceGetMemoryInfo

    def first_only(handle: object, version: object = None) -> object:
        if version:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        return ask(handle)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", first_only)
    assert reading(nvml.sample(NO_ROOTS, 1.0), gpus.uuids[0]).free_bytes == (24576 - 400) * MIB


# ---- with the RAM ----


def test_gpus_and_ram_as_one(gpus: SimulatedGpus) -> None:
    both = CombinedDevices((NvmlDevices(0), HostDevice(1 << 30, "ram")))
    assert both.name == "nvml+host"
    assert [device.id for device in both.open()] == [*gpus.uuids, HOST]
    gpus.set_fault(0, GPU_IS_LOST)
    sample = both.sample(NO_ROOTS, 4.0)
    both.close()
    assert sample.taken_at_s == 4.0
    assert set(sample.readings) == {gpus.uuids[1], HOST}
    assert set(sample.errors) == {gpus.uuids[0]}


def test_what_was_opened_is_closed_when_the_next_part_fails(gpus: SimulatedGpus) -> None:
    class Broken(HostDevice):
        def open(self) -> tuple[()]:
            raise DeviceError("no RAM")

    both = CombinedDevices((NvmlDevices(0), Broken(1, "ram")))
    with pytest.raises(DeviceError, match="no RAM"):
        both.open()
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        pynvml.nvmlDeviceGetCount()


def test_a_part_that_raises_is_errors_for_its_devices_only(
    gpus: SimulatedGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = NvmlDevices(0)
    both = CombinedDevices((nvml, HostDevice(1 << 30, "ram")))
    both.open()

    def fail(roots: object, now_s: float) -> Sample:
        raise DeviceError("NVML hiccup")

    monkeypatch.setattr(nvml, "sample", fail)
    sample = both.sample(NO_ROOTS, 1.0)
    both.close()
    assert list(sample.readings) == [HOST]
    assert sample.errors == dict.fromkeys(gpus.uuids, "NVML hiccup")


# ---- how often processes are listed ----


@pytest.fixture
def counted(gpus: SimulatedGpus, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[NvmlDevices, list[str]]]:
    """The driver as it is used, and the GPUs whose processes were listed."""
    listed: list[str] = []
    query = pynvml.nvmlDeviceGetComputeRunningProcesses

    def count(handle: object) -> object:
        listed.append(pynvml.nvmlDeviceGetUUID(handle))
        return query(handle)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", count)
    nvml = NvmlDevices(HEADROOM_BYTES)
    nvml.open()
    yield nvml, listed
    nvml.close()


def test_processes_are_listed_seldom_while_nothing_moves(
    gpus: SimulatedGpus, counted: tuple[NvmlDevices, list[str]]
) -> None:
    nvml, listed = counted
    for step in range(21):
        nvml.sample({}, step * 0.5)
    assert sorted(listed) == sorted(gpus.uuids * 3), "at 0, 5 and 10 s"


def test_processes_are_listed_at_once_where_memory_moves(
    gpus: SimulatedGpus, counted: tuple[NvmlDevices, list[str]]
) -> None:
    nvml, listed = counted
    first = gpus.uuids[0]
    nvml.sample({}, 0.0)
    with gpus.hold_foreign(0, 500) as pid:
        eventually(lambda: gpus.processes(0) == {pid: 500})
        seen = nvml.sample({}, 0.5)
        assert [process.pid for process in reading(seen, first).foreign] == [pid]
    eventually(lambda: gpus.used_mib(0) == 0)
    assert reading(nvml.sample({}, 1.0), first).foreign == ()
    assert listed.count(first) == 3


def test_processes_are_listed_at_once_when_the_attempts_are_others(
    gpus: SimulatedGpus, counted: tuple[NvmlDevices, list[str]]
) -> None:
    nvml, _ = counted
    with gpus.hold_foreign(0, 500) as pid:
        assert reading(nvml.sample({}, 0.0), gpus.uuids[0]).by_attempt == {}
        registered = reading(nvml.sample({"a1": Roots(pid)}, 0.5), gpus.uuids[0])
        assert registered.by_attempt == {"a1": 500 * MIB}
