"""RAM as a device, measured on real processes."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orchestrator.control.ports import Roots
from orchestrator.core.entities import HOST, MIB, DeviceKind, Reading
from orchestrator.core.errors import DeviceError
from orchestrator.drivers import host
from orchestrator.drivers.host import HostDevice
from tests.support import eventually

PARENT = """
import subprocess, sys, threading
def child():
    subprocess.run([sys.executable, "-c", sys.argv[1]])
thread = threading.Thread(target=child)  # a child of this thread, not of the first one
thread.start()
thread.join()
"""


@contextmanager
def running(code: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """Run `code`, which prints a line when it is as wanted, then reads until we are done."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout and process.stdin
        try:
            assert process.stdout.readline() == "there\n"
            yield process
        finally:
            process.stdin.close()  # ends those below it, too
            process.wait(10)


def holding(expression: str) -> str:
    return f"import sys, mmap; held = {expression}; print('there', flush=True); sys.stdin.read()"


def read(device: HostDevice, **roots: int) -> Reading:
    sample = device.sample({attempt: Roots(pid) for attempt, pid in roots.items()}, 5.0)
    assert sample.taken_at_s == 5.0
    assert not sample.errors
    return sample.readings[HOST]


@pytest.fixture
def device() -> HostDevice:
    return HostDevice(1024 * MIB, "RAM for tests")


def test_it_is_one_device(device: HostDevice) -> None:
    (found,) = device.open()
    assert (found.id, found.kind, found.name) == (HOST, DeviceKind.HOST, "RAM for tests")
    assert (found.capacity_bytes, found.headroom_bytes) == (1024 * MIB, 0)


def test_without_holders_all_of_it_is_free(device: HostDevice) -> None:
    reading = read(device)
    assert (reading.free_bytes, reading.used_bytes) == (1024 * MIB, 0)
    assert (reading.foreign, reading.unexplained_bytes, reading.attributed) == ((), 0, True)


def test_a_holder_uses_its_anonymous_memory(device: HostDevice) -> None:
    with running(holding("b'x' * (100 << 20)")) as process:
        reading = read(device, a=process.pid)
    assert 100 * MIB <= reading.by_attempt["a"] < 120 * MIB
    assert reading.used_bytes == reading.by_attempt["a"]
    assert reading.free_bytes == 1024 * MIB - reading.used_bytes


def test_shared_memory_counts(device: HostDevice) -> None:
    shared = "mmap.mmap(-1, 50 << 20); held.write(b'x' * (50 << 20))"
    with running(holding(shared)) as process:
        assert read(device, a=process.pid).by_attempt["a"] >= 50 * MIB


def test_a_mapped_file_does_not(device: HostDevice, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"x" * (80 * MIB))
    opened = f"(file := open({str(weights)!r}, 'rb')).fileno()"
    mapped = f"mmap.mmap({opened}, 0, access=mmap.ACCESS_READ)"
    with running(holding(f"{mapped}; read = [held[i] for i in range(0, len(held), 4096)]")) as process:
        assert read(device, a=process.pid).by_attempt["a"] < 20 * MIB


def test_children_count_whatever_thread_made_them(device: HostDevice) -> None:
    with running(PARENT, holding("b'x' * (70 << 20)")) as process:
        assert read(device, a=process.pid).by_attempt["a"] >= 70 * MIB


def test_two_holders_are_told_apart(device: HostDevice) -> None:
    with running(holding("b'x' * (30 << 20)")) as one, running(holding("b'x' * (60 << 20)")) as other:
        reading = read(device, one=one.pid, other=other.pid)
    assert 30 * MIB <= reading.by_attempt["one"] < 60 * MIB <= reading.by_attempt["other"]
    assert reading.used_bytes == sum(reading.by_attempt.values())


def test_what_is_gone_uses_nothing(device: HostDevice) -> None:
    with running(holding("b'x' * (30 << 20)")) as process:
        process.kill()
        eventually(lambda: read(device, a=process.pid).used_bytes == 0)  # a zombie, until it is waited for
    assert read(device, a=process.pid).by_attempt == {"a": 0}


def test_free_is_never_negative_and_follows_the_capacity() -> None:
    device = HostDevice(10 * MIB, "little")
    with running(holding("b'x' * (30 << 20)")) as process:
        assert read(device, a=process.pid).free_bytes == 0
        device.capacity_bytes = 1024 * MIB
        assert read(device, a=process.pid).free_bytes > 900 * MIB


def test_free_is_bounded_by_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_bytes", lambda: 77 * MIB)
    assert read(HostDevice(1024 * MIB, "much")).free_bytes == 77 * MIB


def test_memory_that_cannot_be_read_is_an_error(device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise PermissionError("hidden")

    monkeypatch.setattr(host, "available_bytes", fail)
    sample = device.sample({}, 1.0)
    assert sample.readings == {}
    assert "hidden" in sample.errors[HOST]
    with pytest.raises(DeviceError, match="hidden"):
        device.open()


def test_a_sample_is_cheap(device: HostDevice) -> None:
    with running(holding("0")) as one, running(holding("0")) as other:
        read(device, one=one.pid, other=other.pid)
        began_s = time.process_time()
        for _ in range(100):
            read(device, one=one.pid, other=other.pid)
        assert (time.process_time() - began_s) / 100 < 0.001
