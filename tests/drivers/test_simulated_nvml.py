"""The simulated GPUs behave as NVML's do, seen through the real pynvml in a process of its own."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import docker
import pytest
from docker.models.containers import Container

from tests.images.build import build_mimic
from tests.mimic.process import mimic
from tests.nvml.simulated import SimulatedGpus
from tests.support import eventually

MIB = 1024 * 1024
TWO_GPUS = [("Simulated RTX 3090", 24576, 400), ("Simulated RTX 3060", 12288, 300)]

# Evaluates one expression per line and prints the value's or the exception's repr.
ASKED = """
import sys, pynvml as n
kept = []
def gpu(i): return n.nvmlDeviceGetHandleByIndex(i)
def numbers(i, version=n.nvmlMemory_v2):
    m = n.nvmlDeviceGetMemoryInfo(gpu(i), version)
    return {k: getattr(m, k) // 2**20 for k in ("total", "reserved", "free", "used") if hasattr(m, k)}
def processes(i):
    return {p.pid: p.usedGpuMemory // 2**20 for p in n.nvmlDeviceGetComputeRunningProcesses(gpu(i))}
def listed(i, room):
    count, to = n.c_uint(room), (n.c_nvmlProcessInfo_v3_t * room)()
    fn = n._nvmlGetFunctionPointer("nvmlDeviceGetComputeRunningProcesses_v3")
    return fn(gpu(i), n.byref(count), to), count.value
for line in sys.stdin:
    try:
        print(repr(eval(line)), flush=True)
    except Exception as error:
        print(repr(type(error).__name__), flush=True)
"""

# Makes claims without the mimic's help; `gpu` is the first GPU's UUID.
BY_HAND = """
import fcntl, os, sys, zlib
root, gpu = sys.argv[1:]
def write(fd, *lines):
    text = "".join(f"{line}\\n" for line in lines).encode()
    os.pwrite(fd, text + b"sum %08x\\n" % zlib.adler32(text), 0)
def claim(name, *lines):
    fd = os.open(f"{root}/claims/{name}", os.O_CREAT | os.O_RDWR)
    fcntl.lockf(fd, fcntl.LOCK_EX)
    write(fd, *lines)
    return fd
"""


class Nvml:
    """The real pynvml at the other end of a pipe."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def ask(self, expression: str) -> object:
        """The value of an expression over pynvml (as `n`), or the name of the exception it raised."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{expression}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        return eval(answer)  # a literal that our own child printed

    def memory(self, index: int) -> dict[str, int]:
        """MiB, version 2 of the query."""
        return self.ask(f"numbers({index})")  # type: ignore[return-value]

    def processes(self, index: int) -> dict[int, int]:
        """MiB by PID."""
        return self.ask(f"processes({index})")  # type: ignore[return-value]


@contextmanager
def open_nvml(gpus: SimulatedGpus) -> Iterator[Nvml]:
    command = [sys.executable, "-c", ASKED]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=os.environ | gpus.env, text=True, **pipes) as process:
        yield Nvml(process)


@contextmanager
def hold_by_hand(gpus: SimulatedGpus, code: str) -> Iterator[int]:
    """Run `code` after BY_HAND in a process, from its first line of output on; gives its PID."""
    command = [sys.executable, "-c", BY_HAND + textwrap.dedent(code), str(gpus.root), gpus.uuids[0]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


@pytest.fixture
def gpus(tmp_path: Path) -> SimulatedGpus:
    return SimulatedGpus.create(tmp_path / "gpus", TWO_GPUS)


@pytest.fixture
def nvml(gpus: SimulatedGpus) -> Iterator[Nvml]:
    with open_nvml(gpus) as nvml:
        assert nvml.ask("n.nvmlInit()") is None
        yield nvml


def test_devices_are_described(gpus: SimulatedGpus, nvml: Nvml) -> None:
    assert nvml.ask("n.nvmlDeviceGetCount()") == 2
    assert [nvml.ask(f"n.nvmlDeviceGetUUID(gpu({i}))") for i in gpus.indices] == gpus.uuids
    assert nvml.ask("n.nvmlDeviceGetName(gpu(1))") == "Simulated RTX 3060"
    assert nvml.ask(f"n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByUUID({gpus.uuids[1]!r}))") == 1
    assert nvml.ask("n.nvmlDeviceGetMinorNumber(gpu(1))") == 1
    assert nvml.ask("n.nvmlDeviceGetPciInfo(gpu(1)).busId") == "00000000:02:00.0"
    assert nvml.ask("n.nvmlDeviceGetCudaComputeCapability(gpu(0))") == (8, 6)


def test_unknown_devices_have_their_errors(nvml: Nvml) -> None:
    assert nvml.ask("gpu(2)") == "NVMLError_InvalidArgument"
    assert nvml.ask("n.nvmlDeviceGetHandleByUUID('GPU-nobody')") == "NVMLError_NotFound"


def test_versions_and_error_texts(nvml: Nvml) -> None:
    assert nvml.ask("n.nvmlSystemGetNVMLVersion()").startswith("13.")  # type: ignore[attr-defined]
    assert nvml.ask("n.nvmlSystemGetDriverVersion()")
    assert nvml.ask("n.nvmlSystemGetCudaDriverVersion_v2()") == 13000
    assert nvml.ask("n.nvmlSystemGetCudaDriverVersion()") == 13000
    assert nvml.ask("str(n.NVMLError(15))") == "GPU is lost"


def test_readings_can_be_set(gpus: SimulatedGpus, nvml: Nvml) -> None:
    gpus.set_readings(0, temperature_c=71, power_mw=250_000, utilization=90)
    assert nvml.ask("n.nvmlDeviceGetTemperature(gpu(0), 0)") == 71
    assert nvml.ask("n.nvmlDeviceGetTemperatureV(gpu(0), 0)") == 71
    assert nvml.ask("n.nvmlDeviceGetPowerUsage(gpu(0))") == 250_000
    assert nvml.ask("n.nvmlDeviceGetUtilizationRates(gpu(0)).gpu") == 90


def test_an_idle_gpu_is_free_but_for_the_reserve(nvml: Nvml) -> None:
    assert nvml.memory(0) == {"total": 24576, "reserved": 400, "free": 24176, "used": 0}
    assert nvml.ask("numbers(0, None)") == {"total": 24576, "free": 24176, "used": 400}
    assert nvml.processes(0) == {}
    assert nvml.ask("n.nvmlDeviceGetGraphicsRunningProcesses(gpu(0))") == []


def test_memory_and_processes_of_claims(gpus: SimulatedGpus, nvml: Nvml) -> None:
    with gpus.hold_foreign(0, 900) as desktop, gpus.hold_foreign(0, 4096) as other:
        assert nvml.memory(0) == {"total": 24576, "reserved": 400, "free": 19180, "used": 4996}
        assert nvml.ask("numbers(0, None)") == {"total": 24576, "free": 19180, "used": 5396}
        assert nvml.processes(0) == gpus.processes(0) == {desktop: 900, other: 4096}
        assert nvml.memory(1)["used"] == gpus.used_mib(1) == 0


def test_a_claim_over_two_gpus_is_listed_on_both(gpus: SimulatedGpus, nvml: Nvml) -> None:
    with mimic(gpus.env, mib=601, cuda_visible_devices=f"{gpus.uuids[1]},0") as running:
        running.wait_ready()
        assert nvml.processes(1) == gpus.processes(1) == {running.pid: 301}
        assert nvml.processes(0) == gpus.processes(0) == {running.pid: 300}


def test_a_process_with_two_claims_is_listed_once(gpus: SimulatedGpus, nvml: Nvml) -> None:
    with hold_by_hand(gpus, "claim('a', '0 100'); claim('b', f'{gpu} 20', '1 5'); print(); input()") as pid:
        assert nvml.processes(0) == gpus.processes(0) == {pid: 120}
        assert nvml.processes(1) == gpus.processes(1) == {pid: 5}


def test_a_claim_without_its_lock_counts_nothing(gpus: SimulatedGpus, nvml: Nvml) -> None:
    with hold_by_hand(gpus, "os.close(claim('a', '0 100')); print(); input()"):
        assert nvml.memory(0)["used"] == gpus.used_mib(0) == 0


def test_memory_returns_when_its_process_is_killed(gpus: SimulatedGpus, nvml: Nvml) -> None:
    with mimic(gpus.env, mib=6332, cuda_visible_devices=gpus.uuids[0]) as running:
        running.wait_ready()
        assert nvml.processes(0) == {running.pid: 6332}
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait_exit() == -signal.SIGKILL
        assert nvml.memory(0)["used"] == gpus.used_mib(0) == 0
        assert nvml.processes(0) == gpus.processes(0) == {}


def test_late_memory_belongs_to_nobody(gpus: SimulatedGpus, nvml: Nvml) -> None:
    gpus.set_extra_used(0, 700)
    assert nvml.memory(0)["used"] == gpus.used_mib(0) == 700
    assert nvml.processes(0) == {}
    gpus.set_extra_used(0, 0)
    assert nvml.memory(0)["used"] == 0


@pytest.mark.parametrize(
    ("code", "error"),
    [(15, "NVMLError_GpuIsLost"), (10, "NVMLError_Timeout"), (999, "NVMLError_Unknown")],
)
def test_a_fault_is_raised_as_its_own_exception(
    gpus: SimulatedGpus, nvml: Nvml, code: int, error: str
) -> None:
    gpus.set_fault(0, code)
    assert nvml.memory(0) == error
    assert nvml.processes(0) == error
    assert nvml.memory(1)["used"] == 0
    gpus.set_fault(0, 0)
    assert nvml.memory(0)["used"] == 0


def test_one_query_can_fail_alone(gpus: SimulatedGpus, nvml: Nvml) -> None:
    gpus.set_wrong(0, fault_processes=4)
    assert nvml.processes(0) == "NVMLError_NoPermission"
    assert nvml.memory(0)["used"] == 0
    gpus.set_wrong(0, fault_processes=0, fault_memory=3)
    assert nvml.processes(0) == {}
    assert nvml.memory(0) == "NVMLError_NotSupported"
    with pytest.raises(ValueError, match="no_such_fault"):
        gpus.set_wrong(0, no_such_fault=1)


def test_a_handle_dies_with_its_initialisation(gpus: SimulatedGpus, nvml: Nvml) -> None:
    assert nvml.ask("kept.append(gpu(0))") is None
    assert nvml.ask("n.nvmlDeviceGetUUID(kept[0])") == gpus.uuids[0]
    assert nvml.ask("(n.nvmlShutdown(), n.nvmlInit())") == (None, None)
    assert nvml.ask("n.nvmlDeviceGetUUID(kept[0])") == "NVMLError_InvalidArgument"
    assert nvml.memory(0)["used"] == 0
    assert gpus.inits == 2


def test_a_handle_means_its_gpu_wherever_that_is(gpus: SimulatedGpus, nvml: Nvml) -> None:
    uuids = gpus.uuids
    gpus.swap(0, 1)
    assert nvml.memory(0)["total"] == 24576, "the order is that of the initialisation"
    gone = gpus.unplug(1)
    assert gone["uuid"] == uuids[0]
    assert nvml.memory(0) == "NVMLError_GpuIsLost"
    assert nvml.memory(1)["total"] == 12288
    gpus.plug(gone)
    assert nvml.memory(0) == "NVMLError_GpuIsLost", "until it is initialised again"
    assert nvml.ask("(n.nvmlShutdown(), n.nvmlInit())") == (None, None)
    assert [nvml.memory(index)["total"] for index in (0, 1)] == [12288, 24576]


def test_a_slow_query_takes_its_time_and_ends_when_it_is_well_again(gpus: SimulatedGpus, nvml: Nvml) -> None:
    gpus.set_wrong(0, delay_ms=50)
    begun_s = time.monotonic()
    assert nvml.memory(0)["used"] == 0
    assert time.monotonic() - begun_s > 0.045
    gpus.set_wrong(0, delay_ms=600_000)
    well = threading.Timer(0.1, gpus.heal)
    well.start()
    assert nvml.memory(0)["used"] == 0
    well.join()


def test_memory_stays_in_use_after_the_exit_for_as_long_as_is_asked(gpus: SimulatedGpus, nvml: Nvml) -> None:
    with mimic(gpus.env, mib=3000, cuda_visible_devices="0", late_s=1) as running:
        running.wait_ready()
        running.process.terminate()
        assert running.wait_exit() == 0
        ended_s = time.monotonic()
        assert (gpus.used_mib(0), gpus.late_mib(0), nvml.processes(0)) == (3000, 3000, {})
    assert nvml.memory(0)["used"] == 3000
    eventually(lambda: gpus.used_mib(0) == 0)
    assert time.monotonic() - ended_s > 0.5
    assert nvml.memory(0)["used"] == 0


def test_initialising_can_fail(gpus: SimulatedGpus) -> None:
    gpus.set_init_fault(9)
    with open_nvml(gpus) as nvml:
        assert nvml.ask("n.nvmlInit()") == "NVMLError_DriverNotLoaded"
        assert nvml.ask("n.nvmlDeviceGetCount()") == "NVMLError_Uninitialized"
        gpus.set_init_fault(0)
        assert nvml.ask("n.nvmlInit()") is None
        assert nvml.ask("n.nvmlShutdown()") is None
        assert nvml.ask("n.nvmlDeviceGetCount()") == "NVMLError_Uninitialized"


def test_a_small_process_buffer_is_refused_with_the_number_needed(gpus: SimulatedGpus, nvml: Nvml) -> None:
    with gpus.hold_foreign(0, 1), gpus.hold_foreign(0, 1), gpus.hold_foreign(0, 1):
        assert nvml.ask("listed(0, room=2)") == (7, 3)
        assert nvml.ask("listed(0, room=3)") == (0, 3)
    assert nvml.ask("listed(0, room=2)") == (0, 0)


def test_a_growing_claim_shows_its_steps_and_nothing_else(gpus: SimulatedGpus, nvml: Nvml) -> None:
    with mimic(gpus.env, mib=8000, load_s=0.5, cuda_visible_devices="0,1") as running:
        seen = [0]
        while seen[-1] < 4000:
            seen.append(nvml.memory(0)["used"])
        assert seen == sorted(seen)
        assert len(set(seen)) > 5
        assert all(used_mib % 200 == 0 for used_mib in seen)
        running.wait_ready()


def test_a_claim_that_is_being_rewritten_reads_as_old_or_new(gpus: SimulatedGpus, nvml: Nvml) -> None:
    rewriting = """
    fd = claim('a', '0 1111111111')
    print()
    while True: write(fd, '0 1111111111'); write(fd, '0 2222222222')
    """
    with hold_by_hand(gpus, rewriting):
        assert {nvml.memory(0)["used"] for _ in range(500)} == {1111111111, 2222222222}
        assert {gpus.used_mib(0) for _ in range(500)} == {1111111111, 2222222222}


def test_overbooking_is_seen(gpus: SimulatedGpus) -> None:
    with gpus.watch_overbooking() as seen, gpus.hold_foreign(0, 20_000):
        eventually(lambda: seen.max_used_mib.get(0) == 20_000)
        assert seen.moments == []
        gpus.set_extra_used(0, 4_177)
        eventually(lambda: seen.moments)
    assert "24177 of 24176 MiB" in seen.moments[0]


def test_many_that_come_and_go_never_look_like_overbooking(gpus: SimulatedGpus) -> None:
    with gpus.watch_overbooking(every_s=0) as seen, ExitStack() as stack:
        for _ in range(3):
            with gpus.hold_foreign(1, 11_000):
                pass
            eventually(lambda: gpus.used_mib(1) == 0)
        stack.enter_context(gpus.hold_foreign(1, 11_988))
    assert seen.moments == []
    assert seen.samples > 10


def test_a_claim_beyond_the_gpu_fails_like_cuda(gpus: SimulatedGpus) -> None:
    with gpus.hold_foreign(0, 20_000), mimic(gpus.env, mib=4_177, cuda_visible_devices="0") as running:
        assert running.wait_exit() == 1
    assert running.errors[0] == "CUDA error: out of memory"
    assert "wants 4177 MiB, others use 20000 of 24176" in gpus.overbooked()[0]


def test_of_two_that_race_for_the_last_room_one_gets_it(gpus: SimulatedGpus) -> None:
    room = {"mib": 7_000, "load_s": 0.2, "cuda_visible_devices": gpus.uuids[1]}
    with gpus.watch_overbooking() as seen, mimic(gpus.env, **room) as one, mimic(gpus.env, **room) as two:
        eventually(lambda: gpus.used_mib(1) == 7_000)
        eventually(lambda: [one.process.poll(), two.process.poll()] in ([None, 1], [1, None]))
    assert seen.moments == []
    assert seen.max_used_mib[1] <= 11_988


def test_a_process_can_load_the_library_late(gpus: SimulatedGpus) -> None:
    code = """if True:
        import os, pathlib, sys, pynvml
        from tests.nvml.build import preload
        preload(pathlib.Path(sys.argv[1]))
        os.environ["SIMULATED_NVML_DIR"] = sys.argv[2]
        pynvml.nvmlInit()
        print(pynvml.nvmlDeviceGetCount())
    """
    command = [sys.executable, "-c", code, str(gpus.library), str(gpus.root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"


@pytest.fixture
def client() -> Iterator[docker.DockerClient]:
    client = docker.from_env()
    yield client
    client.close()


@contextmanager
def mimic_container(client: docker.DockerClient, gpus: SimulatedGpus, mib: int) -> Iterator[Container]:
    """A mimic in a container that wants memory of the second GPU; removed on exit."""
    box = client.containers.run(
        build_mimic(),
        detach=True,
        environment={
            "MIMIC_MIB": str(mib),
            "NVIDIA_VISIBLE_DEVICES": gpus.uuids[1],
            "SIMULATED_NVML_DIR": "/gpus",
        },
        volumes={str(gpus.root): {"bind": "/gpus", "mode": "rw"}},
    )
    try:
        yield box
    finally:
        box.remove(force=True)


@pytest.mark.docker
def test_a_container_is_seen_with_its_pid_on_the_host(
    gpus: SimulatedGpus, nvml: Nvml, client: docker.DockerClient
) -> None:
    with mimic_container(client, gpus, mib=3000) as box:
        eventually(lambda: gpus.used_mib(1) == 3000)
        box.reload()
        assert nvml.processes(1) == gpus.processes(1) == {box.attrs["State"]["Pid"]: 3000}
        box.kill()
        eventually(lambda: gpus.used_mib(1) == 0)
        assert nvml.processes(1) == {}


@pytest.mark.docker
def test_containers_and_processes_share_the_gpu(gpus: SimulatedGpus, client: docker.DockerClient) -> None:
    with (
        gpus.hold_foreign(1, 5000),
        mimic_container(client, gpus, mib=6000) as first,
        mimic_container(client, gpus, mib=6000) as second,
    ):
        codes = eventually(lambda: [code for box in (first, second) if (code := exit_code(box)) is not None])
        assert codes == [1]
        assert gpus.used_mib(1) == 11_000
        assert "wants 6000 MiB, others use 11000 of 11988" in gpus.overbooked()[0]


def exit_code(box: Container) -> int | None:
    box.reload()
    return box.attrs["State"]["ExitCode"] if box.status == "exited" else None
