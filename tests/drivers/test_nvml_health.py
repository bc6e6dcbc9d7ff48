"""What GPUs tell of themselves: readings for display, XIDs, and whether they may be used at all."""

from collections.abc import Iterator
from contextlib import suppress

import pynvml
import pytest

from orchestrator.core.entities import Sample
from orchestrator.core.health import Blame, Telemetry
from orchestrator.drivers.nvml import TELL_EVERY_S, NvmlDevices
from tests.drivers.conftest import TWO_GPUS
from tests.nvml.simulated import SimulatedGpus

NOT_SUPPORTED, NOT_FOUND, TIMEOUT, GPU_IS_LOST, RESET_REQUIRED, UNKNOWN = 3, 6, 10, 15, 16, 999
VERSION_MISMATCH = 18
NEVER_TOLD = {3, 4, 13, 25}
"""Not supported, no permission, no such function or version: not asked again."""

POWER_CAP, IDLE, HOT = 0x4, 0x1, 0x40
RESET, REBOOT, DRAIN_PEERS, DRAIN_AND_RESET = 1, 2, 3, 4


@pytest.fixture
def nvml(gpus: SimulatedGpus) -> Iterator[NvmlDevices]:
    with suppress(pynvml.NVMLError):  # a test that failed may have left it in use
        pynvml.nvmlShutdown()
    nvml = NvmlDevices(0)
    nvml.open()
    yield nvml
    nvml.close()


class Watch:
    """The driver, sampled at times that a test need not choose."""

    def __init__(self, gpus: SimulatedGpus, nvml: NvmlDevices) -> None:
        self.first, self.second = gpus.uuids
        self._nvml = nvml
        self._now_s = 0.0

    def sample(self) -> Sample:
        """Late enough for everything that is read now and then."""
        self._now_s += TELL_EVERY_S
        return self._nvml.sample({}, self._now_s)

    def settled(self) -> Sample:
        """The second of two: what one sample learns of a GPU counts in the next."""
        self.sample()
        return self.sample()


@pytest.fixture
def watch(gpus: SimulatedGpus, nvml: NvmlDevices) -> Watch:
    return Watch(gpus, nvml)


# ---- for display ----


def test_a_card_tells_how_it_is(gpus: SimulatedGpus, watch: Watch) -> None:
    gpus.set_readings(0, temperature_c=83, power_mw=341_500, power_limit_mw=350_000, utilization=98)
    gpus.set_readings(0, ecc_corrected=7, ecc_uncorrected=1, clocks_event_reasons=POWER_CAP | HOT | IDLE)
    assert watch.sample().telemetry == {
        watch.first: Telemetry(98, 49, 83, 341.5, 350.0, 7, 1, ("power limit", "temperature (hardware)")),
        watch.second: Telemetry(0, 0, 40, 20.0, 350.0, 0, 0, ()),
    }


def test_an_idle_card_is_not_slowed_down(gpus: SimulatedGpus, watch: Watch) -> None:
    gpus.set_readings(0, clocks_event_reasons=IDLE)
    assert watch.sample().telemetry[watch.first].throttled_by == ()


@pytest.mark.parametrize("code", [*range(1, 31), 999])
def test_what_cannot_be_told_is_nothing_and_never_an_error(
    gpus: SimulatedGpus, watch: Watch, code: int
) -> None:
    gpus.set_readings(0, utilization=50)
    gpus.set_wrong(0, fault_telemetry=code)
    sample = watch.sample()
    assert sample.telemetry[watch.first] == Telemetry()
    assert sample.telemetry[watch.second].temperature_c == 40
    assert sample.errors == {}
    gpus.heal()
    again = watch.sample().telemetry[watch.first]
    assert again == Telemetry() if code in NEVER_TOLD else again.utilization_percent == 50


def test_another_driver_may_tell_more(gpus: SimulatedGpus, watch: Watch) -> None:
    gpus.set_wrong(0, fault_telemetry=NOT_SUPPORTED)
    watch.sample()
    gpus.heal()
    pynvml.nvmlShutdown()
    watch.settled()
    assert watch.sample().telemetry[watch.first].temperature_c == 40


def test_it_is_asked_now_and_then_only(
    gpus: SimulatedGpus, nvml: NvmlDevices, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    power = pynvml.nvmlDeviceGetPowerUsage
    monkeypatch.setattr(
        pynvml, "nvmlDeviceGetPowerUsage", lambda handle: (asked.append(handle), power(handle))[1]
    )
    for step in range(100):
        assert nvml.sample({}, step * TELL_EVERY_S / 50).telemetry[gpus.uuids[0]].power_w == 20
    assert len(asked) == 2 * len(TWO_GPUS)


def test_drivers_before_535_tell_why_clocks_are_low(
    gpus: SimulatedGpus, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(handle: object) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksEventReasons", unknown)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda handle: HOT)
    assert watch.sample().telemetry[watch.first].throttled_by == ("temperature (hardware)",)


# ---- reports ----


@pytest.mark.parametrize(
    ("xid", "blame", "words"),
    [
        (13, Blame.PROGRAM, "illegal"),
        (31, Blame.PROGRAM, "memory that it does not have"),
        (32, Blame.PROGRAM, "command buffer"),
        (69, Blame.PROGRAM, "illegal command"),
        (94, Blame.PROGRAM, "contained"),
        (62, Blame.GPU, "controller"),
        (64, Blame.GPU, "row"),
        (79, Blame.GPU, "fell off the bus"),
        (95, Blame.GPU, "could not be contained"),
        (109, Blame.GPU, "timed out"),
        (119, Blame.GPU, "system processor"),
        (120, Blame.GPU, "system processor"),
        (140, Blame.GPU, "not recovered"),
        (143, Blame.GPU, "start"),
        (43, Blame.NOBODY, "stopped"),
        (45, Blame.NOBODY, "cleaned up"),
        (48, Blame.NOBODY, "two bits"),
        (63, Blame.NOBODY, "row"),
        (74, Blame.NOBODY, "NVLink"),
        (92, Blame.NOBODY, "corrected"),
        (121, Blame.NOBODY, "chip-to-chip"),
        (154, Blame.NOBODY, "recovery"),
        (4711, Blame.NOBODY, "catalogue"),
    ],
)
def test_a_report_says_what_it_is_and_whose_fault(
    gpus: SimulatedGpus, watch: Watch, xid: int, blame: Blame, words: str
) -> None:
    watch.sample()
    gpus.raise_xid(1, xid)
    (incident,) = watch.sample().incidents
    assert (incident.device, incident.code, incident.blame) == (watch.second, xid, blame)
    assert f"XID {xid}" in incident.text
    assert words in incident.text
    assert watch.sample().incidents == ()


def test_what_was_reported_before_the_start_is_not_news(gpus: SimulatedGpus) -> None:
    gpus.raise_xid(0, 31)
    nvml = NvmlDevices(0)
    nvml.open()
    try:
        assert nvml.sample({}, 1.0).incidents == ()
    finally:
        nvml.close()


def test_reports_are_heard_in_their_order_also_after_an_initialisation(
    gpus: SimulatedGpus, watch: Watch
) -> None:
    watch.sample()
    for xid in (31, 43, 45):
        gpus.raise_xid(0, xid)
    assert [incident.code for incident in watch.sample().incidents] == [31, 43, 45]
    pynvml.nvmlShutdown()
    watch.settled()
    gpus.raise_xid(1, 13)
    assert [incident.code for incident in watch.sample().incidents] == [13]


def test_a_card_that_reports_without_end_does_not_keep_the_monitor(gpus: SimulatedGpus, watch: Watch) -> None:
    watch.sample()
    for _ in range(200):
        gpus.raise_xid(0, 43)
    heard = [len(watch.sample().incidents) for _ in range(5)]
    assert sum(heard) == 200
    assert max(heard) < 200


@pytest.mark.parametrize("code", [*range(1, 31), 999])
def test_a_card_without_events_is_measured_all_the_same(gpus: SimulatedGpus, code: int) -> None:
    gpus.set_wrong(0, fault_events=code)
    nvml = NvmlDevices(0)
    nvml.open()
    try:
        gpus.raise_xid(0, 31)
        gpus.raise_xid(1, 31)
        sample = nvml.sample({}, 1.0)
        assert sorted(sample.readings) == sorted(gpus.uuids)
        assert [incident.device for incident in sample.incidents] == [gpus.uuids[1]]
    finally:
        nvml.close()


def test_a_library_without_events_is_done_without(
    gpus: SimulatedGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlEventSetCreate", unknown)
    nvml = NvmlDevices(0)
    nvml.open()
    try:
        assert sorted(nvml.sample({}, 1.0).readings) == sorted(gpus.uuids)
    finally:
        nvml.close()


# ---- GPUs that must not be used ----


def the_first_is_shut(sample: Sample, watch: Watch) -> str:
    """Why the first GPU is not used; the second one is."""
    assert list(sample.readings) == [watch.second]
    assert list(sample.errors) == [watch.first]
    return sample.errors[watch.first]


@pytest.mark.parametrize(
    ("action", "words", "is_broken"),
    [
        (RESET, "must be reset", True),
        (REBOOT, "must be rebooted", True),
        (DRAIN_AND_RESET, "should end", False),
    ],
)
def test_the_driver_wants_something_done(
    gpus: SimulatedGpus, watch: Watch, action: int, words: str, is_broken: bool
) -> None:
    watch.sample()
    gpus.set_recovery_action(0, action)
    sample = watch.sample()
    assert words in the_first_is_shut(sample, watch)
    assert sample.broken == ({watch.first} if is_broken else frozenset())
    gpus.set_recovery_action(0, 0)
    healed = watch.sample()
    assert (healed.errors, healed.broken) == ({}, frozenset())
    assert sorted(healed.readings) == sorted((watch.first, watch.second))


def test_a_gpu_is_used_while_only_its_peers_matter(gpus: SimulatedGpus, watch: Watch) -> None:
    watch.sample()
    gpus.set_recovery_action(0, DRAIN_PEERS)
    assert watch.sample().errors == {}


def test_what_is_wanted_is_known_at_the_start(gpus: SimulatedGpus) -> None:
    gpus.set_readings(0, recovery_action=REBOOT)
    nvml = NvmlDevices(0)
    nvml.open()
    try:
        assert "must be rebooted" in nvml.sample({}, 1.0).errors[gpus.uuids[0]]
    finally:
        nvml.close()


def test_the_driver_knows_better_than_the_number_of_an_error(gpus: SimulatedGpus, watch: Watch) -> None:
    watch.sample()
    gpus.raise_xid(0, 119)
    sample = watch.sample()
    assert [incident.code for incident in sample.incidents] == [119]
    assert sample.errors == {}, "it wants nothing done"


@pytest.mark.parametrize("xid", [62, 64, 95, 109, 119, 120, 140, 143])
@pytest.mark.parametrize("code", [3, 4, 13, 999])
def test_where_the_driver_does_not_tell_the_number_counts(gpus: SimulatedGpus, xid: int, code: int) -> None:
    gpus.set_wrong(0, fault_recovery=code)
    nvml = NvmlDevices(0)
    nvml.open()
    try:
        watch = Watch(gpus, nvml)
        watch.sample()
        gpus.raise_xid(0, xid)
        sample = watch.sample()
        assert sample.broken == {watch.first}
        assert f"XID {xid}" in the_first_is_shut(sample, watch)
        assert "reset" in sample.errors[watch.first]
        pynvml.nvmlShutdown()  # a new initialisation mends nothing
        watch.settled()
        assert f"XID {xid}" in the_first_is_shut(watch.sample(), watch)
    finally:
        nvml.close()


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 48, 63, 79, 94, 4711])
def test_other_errors_leave_a_gpu_in_use(gpus: SimulatedGpus, xid: int) -> None:
    gpus.set_wrong(0, fault_recovery=NOT_SUPPORTED)
    nvml = NvmlDevices(0)
    nvml.open()
    try:
        nvml.sample({}, 1.0)
        gpus.raise_xid(0, xid)
        sample = nvml.sample({}, 2.0)
        assert len(sample.incidents) == 1
        assert (sample.errors, sample.broken) == ({}, frozenset()), "memory tells whether it is gone"
    finally:
        nvml.close()


@pytest.mark.parametrize(
    ("code", "is_broken"), [(GPU_IS_LOST, True), (RESET_REQUIRED, True), (TIMEOUT, False)]
)
def test_a_gpu_that_says_that_it_is_lost_is_broken(
    gpus: SimulatedGpus, watch: Watch, code: int, is_broken: bool
) -> None:
    gpus.set_fault(0, code)
    sample = watch.sample()
    the_first_is_shut(sample, watch)
    assert sample.broken == ({watch.first} if is_broken else frozenset())
    gpus.heal()
    watch.settled()
    assert watch.sample().broken == frozenset()


@pytest.mark.parametrize("code", [NOT_FOUND, TIMEOUT, UNKNOWN])
def test_a_gpu_that_was_lost_is_broken_until_it_can_be_read_again(
    gpus: SimulatedGpus, watch: Watch, code: int
) -> None:
    """After an initialisation it may not be found any more, and says no more that it is lost."""
    gpus.set_fault(0, GPU_IS_LOST)
    watch.sample()
    gpus.heal()
    gpus.set_wrong(0, fault_handle=code)
    sample = watch.settled()
    assert "fell off the bus" not in the_first_is_shut(sample, watch)
    assert sample.broken == {watch.first}
    gpus.heal()
    for _ in range(4):  # it is looked for ever more rarely
        sample = watch.sample()
    assert (sample.errors, sample.broken) == ({}, frozenset())


@pytest.mark.parametrize("code", [NOT_FOUND, TIMEOUT, UNKNOWN])
def test_a_gpu_that_is_only_not_found_is_not_broken(gpus: SimulatedGpus, watch: Watch, code: int) -> None:
    gpus.set_wrong(0, fault_handle=code)
    pynvml.nvmlShutdown()
    sample = watch.settled()
    the_first_is_shut(sample, watch)
    assert sample.broken == frozenset()


def test_a_gpu_that_came_back_is_not_broken_when_nvml_itself_is(gpus: SimulatedGpus, watch: Watch) -> None:
    """As while the driver is changed under the server: what runs goes on."""
    gpus.set_wrong(0, fault_handle=GPU_IS_LOST)
    pynvml.nvmlShutdown()
    assert watch.settled().broken == {watch.first}
    gpus.heal()
    for _ in range(4):
        sample = watch.sample()
    assert (sample.errors, sample.broken) == ({}, frozenset())
    gpus.set_init_fault(VERSION_MISMATCH)
    pynvml.nvmlShutdown()
    sample = watch.settled()
    assert sorted(sample.errors) == sorted((watch.first, watch.second))
    assert sample.broken == frozenset()
