"""The monitor's thread: its pace, its errors, and drivers that hang."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

import pytest

from orchestrator.control.ports import Roots
from orchestrator.core.entities import HOST, AttemptId, Device, DeviceKind, Reading, Sample
from orchestrator.core.errors import DeviceError
from orchestrator.drivers import monitor as module
from orchestrator.drivers.host import HostDevice
from orchestrator.drivers.monitor import Monitor
from tests.support import eventually

GPU = Device("GPU-1", 0, "card", DeviceKind.GPU, 1000)
RAM = Device(HOST, 0, "ram", DeviceKind.HOST, 1000)


class Scripted:
    """Devices that do what a test says, and remember which thread asked."""

    name = "scripted"

    def __init__(self) -> None:
        self.threads: set[str] = set()
        self.closed = threading.Event()
        self.begun = 0
        self.on_open: Callable[[], None] = lambda: None
        self.on_sample: Callable[[], None] = lambda: None

    def open(self) -> tuple[Device, ...]:
        self.threads.add(threading.current_thread().name)
        self.on_open()
        return (GPU, RAM)

    def sample(self, roots: Mapping[AttemptId, Roots], now_s: float) -> Sample:
        self.threads.add(threading.current_thread().name)
        self.begun += 1
        self.on_sample()
        reading = Reading(free_bytes=1, used_bytes=2, by_attempt=dict.fromkeys(roots, 2))
        return Sample(now_s, readings={GPU.id: reading, RAM.id: reading})

    def close(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.closed.set()


class Watched:
    """A monitor over scripted devices, and what it published."""

    def __init__(self) -> None:
        self.devices = Scripted()
        self.samples: list[Sample] = []
        self.publish: Callable[[Sample], None] = self.samples.append
        roots = {"a1": Roots(1)}
        self.monitor = Monitor(
            self.devices, lambda: roots, lambda sample: self.publish(sample), time.monotonic
        )

    def wait_samples(self, count: int) -> None:
        eventually(lambda: len(self.samples) >= count)


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched()
    with ExitStack() as stack:
        stack.callback(watched.monitor.close, timeout_s=0.2)
        yield watched


def fail() -> None:
    raise DeviceError("The driver is gone.")


def test_opening_finds_the_devices_and_begins_to_sample(watched: Watched) -> None:
    assert watched.monitor.latest is None
    assert watched.monitor.open() == (GPU, RAM)
    watched.wait_samples(1)
    assert watched.samples[0].readings[GPU.id].by_attempt == {"a1": 2}
    eventually(lambda: watched.monitor.latest is watched.samples[-1])


def test_one_thread_does_it_all(watched: Watched) -> None:
    watched.monitor.open()
    watched.wait_samples(2)
    watched.monitor.close()
    assert watched.devices.closed.is_set()
    assert watched.devices.threads == {"monitor"}


def test_it_paces_itself(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CALM_S", 3600.0)
    watched.monitor.open()
    watched.wait_samples(1)
    watched.monitor.hurry(True)
    watched.wait_samples(5)
    watched.monitor.hurry(False)
    count = len(watched.samples)
    watched.monitor.sample_now()
    watched.wait_samples(count + 1)


def test_a_sample_asked_for_begins_after_the_question(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CALM_S", 3600.0)
    in_sample, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        in_sample.set()
        go_on.wait(10)

    watched.devices.on_sample = wait
    watched.monitor.open()
    assert in_sample.wait(10)
    asked_at_s = time.monotonic()
    watched.monitor.sample_now()  # while the first is still being taken
    go_on.set()
    watched.wait_samples(2)
    assert watched.samples[1].taken_at_s >= asked_at_s


def test_times_are_of_the_beginning(watched: Watched) -> None:
    watched.devices.on_sample = lambda: time.sleep(0.02)
    watched.monitor.open()
    watched.wait_samples(1)
    assert watched.samples[0].taken_at_s <= time.monotonic() - 0.02


def test_a_sample_that_raises_is_errors_for_every_device(watched: Watched) -> None:
    watched.devices.on_sample = fail
    watched.monitor.open()
    watched.wait_samples(1)
    assert watched.samples[0].readings == {}
    assert set(watched.samples[0].errors) == {GPU.id, RAM.id}
    assert "The driver is gone." in watched.samples[0].errors[GPU.id]
    watched.devices.on_sample = lambda: None
    watched.monitor.hurry(True)
    eventually(lambda: watched.samples[-1].readings)


def test_a_listener_that_raises_does_not_stop_it(watched: Watched) -> None:
    def refuse(sample: Sample) -> None:
        raise RuntimeError("no listener")

    watched.publish = refuse
    watched.monitor.open()
    eventually(lambda: watched.devices.begun)
    watched.publish = watched.samples.append
    watched.monitor.sample_now()
    watched.wait_samples(1)


def test_devices_that_cannot_be_opened(watched: Watched) -> None:
    watched.devices.on_open = fail
    with pytest.raises(DeviceError, match="The driver is gone"):
        watched.monitor.open()


def test_devices_that_never_open(watched: Watched) -> None:
    go_on = threading.Event()
    watched.devices.on_open = lambda: go_on.wait(10) and None
    with pytest.raises(DeviceError, match="did not answer"):
        watched.monitor.open(timeout_s=0.05)
    go_on.set()
    eventually(watched.devices.closed.is_set)
    assert watched.devices.begun == 0


def test_a_call_that_hangs_holds_nobody_up(watched: Watched) -> None:
    go_on = threading.Event()
    watched.monitor.open()
    watched.wait_samples(1)
    watched.devices.on_sample = lambda: go_on.wait(30) and None
    watched.monitor.sample_now()
    eventually(lambda: watched.devices.begun >= 2)
    latest = watched.monitor.latest
    watched.monitor.hurry(True)
    watched.monitor.sample_now()
    began_s = time.monotonic()
    watched.monitor.close(timeout_s=0.05)
    assert time.monotonic() - began_s < 5
    assert watched.monitor.latest is latest
    go_on.set()
    assert watched.devices.closed.wait(10)


def test_nothing_is_published_after_closing(watched: Watched) -> None:
    go_on = threading.Event()
    watched.devices.on_sample = lambda: go_on.wait(30) and None
    watched.monitor.open()
    eventually(lambda: watched.devices.begun)
    watched.monitor.close(timeout_s=0.05)
    go_on.set()
    assert watched.devices.closed.wait(10)
    assert watched.samples == []


def test_closing_twice_or_before_opening_is_fine(watched: Watched) -> None:
    watched.monitor.close()
    other = Watched()
    other.monitor.open()
    other.monitor.close()
    other.monitor.close()


def test_over_real_ram() -> None:
    samples: list[Sample] = []
    monitor = Monitor(HostDevice(1 << 30, "ram"), dict, samples.append, time.monotonic)
    (device,) = monitor.open()
    try:
        eventually(lambda: samples)
        assert samples[0].readings[device.id].free_bytes > 0
    finally:
        monitor.close()
