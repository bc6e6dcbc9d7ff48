"""What the NVML driver makes of every error and every way in which a GPU can be wrong.

Never zeros: a GPU is read, or it is an error with its reason, and the one beside it is not disturbed.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress

import pynvml
import pytest

from orchestrator.control.ports import Roots
from orchestrator.core.entities import MIB, AttemptId, Reading, Sample
from orchestrator.core.errors import DeviceError
from orchestrator.drivers.nvml import NvmlDevices
from tests.mimic.process import mimic
from tests.nvml.simulated import SimulatedGpus
from tests.support import eventually

FREE_BYTES = [(24576 - 400) * MIB, (12288 - 300) * MIB]
NO_ROOTS: Mapping[AttemptId, Roots] = {}

CODES = {
    code: name
    for name, code in vars(pynvml).items()
    if re.fullmatch("NVML_ERROR_[A-Z_]+", name) and isinstance(code, int)
}

QUARANTINED = {15, 16}
"""Lost, or to be reset: an error until the GPU is found again by its UUID."""

DEGRADED = {1, 2, 6, 9, 18, 28, 999}
"""NVML or the handle broke down: an error, and NVML is initialised again, ever more rarely."""

CANNOT = {3, 4}
"""Not supported, no permission: a list of processes is done without, memory is an error."""

PASSING = {5, 7, 8, 10, 11, 12, 13, 14, 17, *range(19, 28), 29, 30}
"""An error for as long as the driver says so; the very next sample may be well."""

AGAIN = QUARANTINED | DEGRADED


@pytest.fixture
def nvml(gpus: SimulatedGpus) -> Iterator[NvmlDevices]:
    with suppress(pynvml.NVMLError):  # a test that failed may have left it in use
        pynvml.nvmlShutdown()
    nvml = NvmlDevices(0, list_every_s=0)  # every sample asks for everything
    nvml.open()
    yield nvml
    nvml.close()


def well(sample: Sample, gpus: SimulatedGpus, index: int = 0) -> Reading:
    """The GPU's reading. Raises AssertionError if any GPU is an error."""
    assert sample.errors == {}
    return sample.readings[gpus.uuids[index]]


def only_the_first_is_wrong(sample: Sample, uuids: list[str]) -> str:
    """The reason why the first cannot be read; the second can."""
    assert list(sample.readings) == [uuids[1]]
    assert sample.readings[uuids[1]].free_bytes == FREE_BYTES[1]
    assert list(sample.errors) == [uuids[0]]
    return sample.errors[uuids[0]]


def test_the_table_has_every_error_once() -> None:
    rows = [*QUARANTINED, *DEGRADED, *CANNOT, *PASSING]
    assert sorted(rows) == sorted(CODES)


@pytest.mark.parametrize("code", CODES, ids=CODES.get)
def test_memory_that_cannot_be_read_is_an_error(gpus: SimulatedGpus, nvml: NvmlDevices, code: int) -> None:
    well(nvml.sample(NO_ROOTS, 0.0), gpus)
    before = gpus.inits
    gpus.set_wrong(0, fault_memory=code)
    for now_s in (1.0, 2.5, 9.0):  # also after each initialisation
        reason = only_the_first_is_wrong(nvml.sample(NO_ROOTS, now_s), gpus.uuids)
        assert str(pynvml.NVMLError(code)) in reason
    assert gpus.inits - before == (2 if code in AGAIN else 0)
    gpus.heal()
    assert well(nvml.sample(NO_ROOTS, 9.1), gpus).free_bytes == FREE_BYTES[0]


@pytest.mark.parametrize("code", CODES, ids=CODES.get)
def test_processes_that_cannot_be_listed(gpus: SimulatedGpus, nvml: NvmlDevices, code: int) -> None:
    with gpus.hold_foreign(0, 500):
        gpus.set_wrong(0, fault_processes=code)
        sample = nvml.sample(NO_ROOTS, 1.0)
        if code not in CANNOT:
            only_the_first_is_wrong(sample, gpus.uuids)
            gpus.heal()
            assert [p.used_bytes for p in well(nvml.sample(NO_ROOTS, 30.0), gpus).foreign] == [500 * MIB]
            return
        blind = well(sample, gpus)
        assert (blind.free_bytes, blind.used_bytes) == (FREE_BYTES[0] - 500 * MIB, 500 * MIB)
        assert (blind.attributed, blind.foreign, blind.by_attempt) == (False, (), {})
        assert blind.unexplained_bytes == 500 * MIB
        assert not well(sample, gpus, 1).attributed, "nothing is listed there yet"


@pytest.mark.parametrize("code", sorted(CANNOT))
def test_what_a_gpu_cannot_do_is_asked_once_and_again_after_an_initialisation(
    gpus: SimulatedGpus, nvml: NvmlDevices, code: int
) -> None:
    with gpus.hold_foreign(0, 500):
        gpus.set_wrong(0, fault_processes=code)
        assert not well(nvml.sample(NO_ROOTS, 1.0), gpus).attributed
        gpus.set_wrong(0, fault_processes=10)  # a time-out, if it were asked
        assert not well(nvml.sample(NO_ROOTS, 2.0), gpus).attributed
        gpus.heal()
        pynvml.nvmlShutdown()
        nvml.sample(NO_ROOTS, 3.0)
        seen = well(nvml.sample(NO_ROOTS, 4.0), gpus)
    assert seen.attributed
    assert [process.used_bytes for process in seen.foreign] == [500 * MIB]


@pytest.mark.parametrize("code", CODES, ids=CODES.get)
def test_graphics_processes_that_cannot_be_listed(gpus: SimulatedGpus, nvml: NvmlDevices, code: int) -> None:
    gpus.set_wrong(0, fault_graphics=code)
    with gpus.hold_foreign(0, 500):
        sample = nvml.sample(NO_ROOTS, 1.0)
    if code in CANNOT:
        assert well(sample, gpus).attributed, "who computes is listed, and that is what counts"
    else:
        only_the_first_is_wrong(sample, gpus.uuids)


@pytest.mark.parametrize("code", CODES, ids=CODES.get)
def test_an_initialisation_that_fails_is_said_at_the_start(gpus: SimulatedGpus, code: int) -> None:
    gpus.set_init_fault(code)
    with pytest.raises(DeviceError, match=re.escape(str(pynvml.NVMLError(code)))):
        NvmlDevices(0).open()
    gpus.heal()
    nvml = NvmlDevices(0)
    assert [device.id for device in nvml.open()] == gpus.uuids
    nvml.close()


@pytest.mark.parametrize("code", CODES, ids=CODES.get)
def test_an_initialisation_that_fails_later_is_made_again(
    gpus: SimulatedGpus, nvml: NvmlDevices, code: int
) -> None:
    pynvml.nvmlShutdown()
    gpus.set_init_fault(code)
    for now_s in (1.0, 2.0, 4.0):
        sample = nvml.sample(NO_ROOTS, now_s)
        assert (sample.readings, set(sample.errors)) == ({}, set(gpus.uuids))
    assert str(pynvml.NVMLError(code)) in sample.errors[gpus.uuids[1]]
    gpus.heal()
    assert well(nvml.sample(NO_ROOTS, 8.0), gpus).free_bytes == FREE_BYTES[0]


@pytest.mark.parametrize("code", CODES, ids=CODES.get)
def test_a_gpu_that_is_not_found_again_says_why(gpus: SimulatedGpus, nvml: NvmlDevices, code: int) -> None:
    gpus.set_wrong(0, fault_handle=code)
    pynvml.nvmlShutdown()
    nvml.sample(NO_ROOTS, 1.0)
    reason = only_the_first_is_wrong(nvml.sample(NO_ROOTS, 2.0), gpus.uuids)
    assert str(pynvml.NVMLError(code)) in reason
    gpus.heal()
    assert well(nvml.sample(NO_ROOTS, 4.0), gpus).free_bytes == FREE_BYTES[0]


def test_the_trouble_of_one_gpu_is_not_everybodys_for_long(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    """To find a lost GPU, NVML is shut down for all. If it does not come up then, it is tried soon again."""
    gpus.set_wrong(0, lost=1)
    now_s = 0.0
    while now_s < 200:  # by now it is looked for once a minute
        only_the_first_is_wrong(nvml.sample(NO_ROOTS, now_s), gpus.uuids)
        now_s += 0.5
    gpus.set_init_fault(999)
    while nvml.sample(NO_ROOTS, now_s).readings:
        now_s += 0.5
    gpus.set_init_fault(0)
    only_the_first_is_wrong(nvml.sample(NO_ROOTS, now_s + 1.0), gpus.uuids)


# ---- a GPU that goes and comes back ----


def test_a_lost_gpu_is_found_again_by_its_uuid(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    uuids = gpus.uuids
    gpus.set_wrong(0, lost=1)
    for now_s in (0.0, 1.0, 3.0):
        assert "fell off the bus" in only_the_first_is_wrong(nvml.sample(NO_ROOTS, now_s), uuids)
    gpus.heal()
    gpus.swap(0, 1)
    only_the_first_is_wrong(nvml.sample(NO_ROOTS, 6.9), uuids)  # its old handle is dead for ever
    sample = nvml.sample(NO_ROOTS, 7.0)
    assert sample.errors == {}
    assert [sample.readings[uuid].free_bytes for uuid in uuids] == FREE_BYTES


def test_a_gpu_that_is_taken_out_and_put_back(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    uuids = gpus.uuids
    gone = gpus.unplug(0)
    for now_s in (0.0, 1.0, 3.0):
        reason = only_the_first_is_wrong(nvml.sample(NO_ROOTS, now_s), uuids)
    assert "not there any more" in reason
    assert gpus.plug(gone) == 1
    sample = nvml.sample(NO_ROOTS, 7.0)
    assert [sample.readings[uuid].free_bytes for uuid in uuids] == FREE_BYTES


def test_a_gpu_that_is_lost_at_the_start_does_not_keep_the_other_from_use(gpus: SimulatedGpus) -> None:
    gpus.set_wrong(0, lost=1)
    nvml = NvmlDevices(0)
    (device,) = nvml.open()
    assert device.id == gpus.uuids[1]
    assert well(nvml.sample(NO_ROOTS, 1.0), gpus, 1).free_bytes == FREE_BYTES[1]
    nvml.close()
    gpus.set_wrong(1, lost=1)
    with pytest.raises(DeviceError, match=r"GPU 0: .*fell off the bus.*GPU 1: .*fell off the bus"):
        NvmlDevices(0).open()


# ---- processes that cannot be seen ----


@pytest.mark.parametrize(
    "blindness",
    [{"hide_processes": 1}, {"pid_offset": 1 << 23}, {"hide_usage": 1}],
    ids=lambda b: next(iter(b)),
)
def test_memory_counts_although_its_processes_cannot_be_seen(
    gpus: SimulatedGpus, nvml: NvmlDevices, blindness: dict[str, int]
) -> None:
    gpus.set_wrong(0, **blindness)
    with mimic(gpus.env, mib=600, cuda_visible_devices="0") as running:
        running.wait_ready()
        blind = well(nvml.sample({"a1": Roots(running.pid)}, 1.0), gpus)
        assert (blind.free_bytes, blind.used_bytes) == (FREE_BYTES[0] - 600 * MIB, 600 * MIB)
        assert (blind.by_attempt, blind.foreign) == ({}, ())
        assert blind.unexplained_bytes == 600 * MIB
        assert not blind.attributed
        assert not well(nvml.sample(NO_ROOTS, 1.5), gpus, 1).attributed, "the other is no better known"
        gpus.heal()
        seen = well(nvml.sample({"a1": Roots(running.pid)}, 2.0), gpus)
    assert (seen.by_attempt, seen.unexplained_bytes, seen.attributed) == ({"a1": 600 * MIB}, 0, True)


def test_a_gpu_that_has_hidden_who_uses_what_is_not_trusted_when_it_is_empty(
    gpus: SimulatedGpus, nvml: NvmlDevices
) -> None:
    with gpus.hold_foreign(0, 100), gpus.hold_foreign(1, 100):
        gpus.set_wrong(0, hide_usage=1)
        nvml.sample(NO_ROOTS, 1.0)
    eventually(lambda: gpus.used_mib(0) == 0)
    empty = nvml.sample(NO_ROOTS, 2.0)
    assert [well(empty, gpus, index).attributed for index in (0, 1)] == [False, True]
    gpus.heal()
    with gpus.hold_foreign(0, 100):
        assert well(nvml.sample(NO_ROOTS, 3.0), gpus).attributed


def test_memory_that_comes_back_late_belongs_to_nobody(gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
    with mimic(gpus.env, mib=700, cuda_visible_devices="0", late_s=3600) as running:
        running.wait_ready()
        roots = {"a1": Roots(running.pid)}
        assert well(nvml.sample(roots, 1.0), gpus).by_attempt == {"a1": 700 * MIB}
        running.process.terminate()
        running.wait_exit()
    late = well(nvml.sample(NO_ROOTS, 2.0), gpus)
    assert (late.free_bytes, late.unexplained_bytes) == (FREE_BYTES[0] - 700 * MIB, 700 * MIB)
    assert (late.by_attempt, late.foreign, late.attributed) == ({}, (), True)
    gpus.give_back_late()
    assert well(nvml.sample(NO_ROOTS, 3.0), gpus).free_bytes == FREE_BYTES[0]
