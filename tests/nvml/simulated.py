"""The simulated GPUs as tests see them: set up, disturb, and measure without asking NVML.

Everything here reads the directory itself, so that a test asserts on the device and not on what the
product (or pynvml, or our own C library) believes about it. Memory is in MiB. A claim of the calling
process itself is invisible to it (see nvml.c), so claims are held by processes of their own.
"""

import fcntl
import os
import struct
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.nvml.build import build, cache_dir

MIMIC = Path(__file__).parents[1] / "mimic" / "mimic.py"
READ_TRIES = 1000
FLOCK = struct.Struct("hhqqi4x")  # struct flock of Linux on 64 bits: type, whence, start, length, pid
DEFAULT_GPUS = (("Simulated RTX 3090", 24576, 400),)
XID_EVENT, RECOVERY_EVENT = 0x8, 0x8000
NEVER_S = 10.0**9
"""As long as no test lasts: memory that is given back so late never returns."""

FAULTS = (
    "fault",
    "fault_memory",
    "fault_processes",
    "fault_graphics",
    "fault_handle",
    "fault_telemetry",
    "fault_events",
    "fault_recovery",
    "lost",
    "delay_ms",
    "hide_processes",
    "hide_usage",
    "pid_offset",
)
"""What can be wrong with a GPU; nvml.c says what each does."""


@dataclass
class Overbooking:
    """What `watch_overbooking` saw: the most that was ever used per GPU, and every moment of too much."""

    max_used_mib: dict[int, int] = field(default_factory=dict)
    moments: list[str] = field(default_factory=list)
    samples: int = 0


class SimulatedGpus:
    """A directory that the simulated NVML library presents as a machine's GPUs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.library = build(cache_dir())

    @classmethod
    def create(cls, root: Path, gpus: Sequence[tuple[str, int, int]] = DEFAULT_GPUS) -> "SimulatedGpus":
        """Set up `gpus`, each (name, total MiB, MiB reserved by the driver), in an empty or new folder.

        Everyone may write there, because containers run as other users.
        """
        for folder in (root, root / "claims", root / "late"):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o777)
        for name in ("alloc.lock", "overbooked.log", "inits", "events"):
            (root / name).touch()
            (root / name).chmod(0o666)
        simulated = cls(root)
        for index, (name, total_mib, reserved_mib) in enumerate(gpus):
            unique = f"GPU-{uuid.uuid5(uuid.NAMESPACE_OID, f'simulated {index}')}"
            values = {"uuid": unique, "name": name, "total_mib": total_mib, "reserved_mib": reserved_mib}
            simulated._write_gpu(index, {key: str(value) for key, value in values.items()})
        return simulated

    @property
    def env(self) -> dict[str, str]:
        """What a process needs in its environment for its pynvml to find these GPUs."""
        folders = [str(self.library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            "SIMULATED_NVML_DIR": str(self.root),
            "LD_LIBRARY_PATH": ":".join(folder for folder in folders if folder),
        }

    @property
    def uuids(self) -> list[str]:
        return [self._read_gpu(index)["uuid"] for index in self.indices]

    @property
    def indices(self) -> range:
        return range(len(list(self.root.glob("gpu[0-9]*"))))

    def capacity_mib(self, index: int) -> int:
        """What processes can have of a GPU: its total without the driver's reserve."""
        gpu = self._read_gpu(index)
        return int(gpu["total_mib"]) - int(gpu["reserved_mib"])

    def used_mib(self, index: int) -> int:
        """Memory in use now: what living processes claim, what ended ones have not given back, and what is
        set as used by nobody."""
        gpu = self._read_gpu(index)
        claims = self._claims({gpu["uuid"], str(index)})
        return sum(mib for _, mib in claims) + self.late_mib(index) + int(gpu.get("extra_used_mib", 0))

    def late_mib(self, index: int) -> int:
        """What processes that have ended still hold: see MIMIC_LATE_S."""
        names = {self._read_gpu(index)["uuid"], str(index)}
        late = [read_late(path) for path in (self.root / "late").glob("[!.]*")]
        return sum(held.get(name, 0) for held in late for name in names)

    def processes(self, index: int) -> dict[int, int]:
        """MiB by PID in our namespace. What is held in a namespace we cannot see is left out."""
        held: dict[int, int] = {}
        for pid, mib in self._claims({self._read_gpu(index)["uuid"], str(index)}):
            if pid > 0 and mib:
                held[pid] = held.get(pid, 0) + mib
        return held

    def overbooked(self) -> list[str]:
        """A line per claim that did not fit and was therefore refused, as CUDA would, with the numbers."""
        return (self.root / "overbooked.log").read_text().splitlines()

    def set_fault(self, index: int, code: int) -> None:
        """Every live reading of this GPU returns the NVML error `code` from now on; 0 ends that."""
        self._change_gpu(index, fault=code)

    def set_wrong(self, index: int, **faults: int) -> None:
        """Set any of FAULTS; 0 ends one."""
        unknown = faults.keys() - set(FAULTS)
        if unknown:
            raise ValueError(f"a GPU can have no {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
        self._change_gpu(index, **faults)

    def heal(self) -> None:
        """Everything that was wrong is well again, and all late memory is back."""
        self.set_init_fault(0)
        for index in self.indices:
            self._change_gpu(index, extra_used_mib=0, recovery_action=0, **dict.fromkeys(FAULTS, 0))
        self.give_back_late()

    def give_back_late(self) -> None:
        """What ended processes still hold is free from now on."""
        for path in (self.root / "late").iterdir():
            path.unlink(missing_ok=True)

    def swap(self, one: int, other: int) -> None:
        """Two GPUs change their places, as after a reset; the driver sees that when it is initialised."""
        with self._still():
            first, second = self._read_gpu(one), self._read_gpu(other)
            self._write_gpu(one, second)
            self._write_gpu(other, first)

    def unplug(self, index: int) -> dict[str, str]:
        """Take the GPU out; those behind it move up. Returns what `plug` needs."""
        with self._still():
            gone, last = self._read_gpu(index), self.indices[-1]
            for place in range(index, last):
                self._write_gpu(place, self._read_gpu(place + 1))
            (self.root / f"gpu{last}").unlink()
        return gone

    def plug(self, gpu: dict[str, str]) -> int:
        """Put a GPU back, behind the others. Returns its index."""
        index = len(self.indices)
        self._write_gpu(index, gpu)
        return index

    @property
    def inits(self) -> int:
        """How often NVML was initialised, by all processes together."""
        return (self.root / "inits").stat().st_size

    def set_extra_used(self, index: int, mib: int) -> None:
        """So much is in use and belongs to no process, like memory that is late in returning."""
        self._change_gpu(index, extra_used_mib=mib)

    def set_readings(self, index: int, **values: int) -> None:
        """Set `temperature_c`, `power_mw`, `power_limit_mw`, `utilization` (percent), `ecc_corrected`,
        `ecc_uncorrected`, or, as NVML numbers them, `clocks_event_reasons` and `recovery_action`."""
        self._change_gpu(index, **values)

    def raise_xid(self, index: int, xid: int) -> None:
        """The driver reports this error of the GPU to whoever listens now."""
        self._raise(index, XID_EVENT, xid)

    def set_recovery_action(self, index: int, action: int) -> None:
        """The driver wants this done to the GPU (0: nothing), and tells whoever listens."""
        self._change_gpu(index, recovery_action=action)
        self._raise(index, RECOVERY_EVENT, action)

    def _raise(self, index: int, event_type: int, data: int) -> None:
        with (self.root / "events").open("a") as events:
            events.write(f"{self._read_gpu(index)['uuid']} {event_type} {data}\n")

    def set_init_fault(self, code: int) -> None:
        """nvmlInit fails with this NVML error from now on; 0 ends that."""
        (self.root / "fail_init").write_text(f"{code}\n")

    @contextmanager
    def hold_foreign(self, index: int, mib: int) -> Iterator[int]:
        """Let a process that nobody registered hold memory; gives its PID.

        Raises RuntimeError if the memory does not fit.
        """
        wants = {"CUDA_VISIBLE_DEVICES": str(index), "MIMIC_MIB": str(mib), "MIMIC_HOLD_ONLY": "1"}
        command = [sys.executable, "-S", "-E", str(MIMIC)]
        env = os.environ | self.env | wants
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as holder:
            try:
                assert holder.stdout is not None
                if holder.stdout.readline() != "ready\n":
                    raise RuntimeError(f"a foreign process could not take {mib} MiB of GPU {index}")
                yield holder.pid
            finally:
                holder.kill()

    @contextmanager
    def watch_overbooking(self, every_s: float = 0.002) -> Iterator[Overbooking]:
        """Sample all GPUs meanwhile and note the moments at which more was used than there is.

        Claims are read one after the other. A sum that is too high is therefore taken again while no
        claim can grow: then it cannot be put together from a claim that just ended and a new one.
        """
        seen, done = Overbooking(), threading.Event()
        thread = threading.Thread(target=self._watch, args=(seen, done, every_s), name="overbooking")
        thread.start()
        try:
            yield seen
        finally:
            done.set()
            thread.join()

    def _watch(self, seen: Overbooking, done: threading.Event, every_s: float) -> None:
        while not done.wait(every_s):
            seen.samples += 1
            for index in self.indices:
                with suppress(FileNotFoundError):  # it is being taken out
                    self._look_at(index, seen)

    def _look_at(self, index: int, seen: Overbooking) -> None:
        capacity_mib, used_mib = self.capacity_mib(index), self.used_mib(index)
        if used_mib > capacity_mib:
            used_mib = self._used_while_still(index)
        if used_mib > capacity_mib:
            seen.moments.append(f"{time.time():.3f} GPU {index}: {used_mib} of {capacity_mib} MiB")
        seen.max_used_mib[index] = max(used_mib, seen.max_used_mib.get(index, 0))

    def _used_while_still(self, index: int) -> int:
        with self._still():
            return self.used_mib(index)

    @contextmanager
    def _still(self) -> Iterator[None]:
        """No claim grows meanwhile (it may still shrink or end)."""
        with (self.root / "alloc.lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _claims(self, names: set[str]) -> list[tuple[int, int]]:
        """(PID, MiB) of every held claim on the GPU with these names; PID 0 is not visible from here."""
        paths = sorted((self.root / "claims").iterdir())
        return [(pid, mib) for path in paths for pid, name, mib in read_claim(path) if name in names]

    def _read_gpu(self, index: int) -> dict[str, str]:
        lines = (self.root / f"gpu{index}").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def _change_gpu(self, index: int, **values: int) -> None:
        with self._still():
            gpu = self._read_gpu(index) | {key: str(value) for key, value in values.items()}
            self._write_gpu(index, gpu)

    def _write_gpu(self, index: int, values: dict[str, str]) -> None:
        path = self.root / f".gpu{index}"
        path.write_text("".join(f"{key}={value}\n" for key, value in values.items()))
        path.chmod(0o644)
        path.rename(self.root / f"gpu{index}")  # readers see the old file or the new one


def read_claim(path: Path) -> list[tuple[int, str, int]]:
    """(PID, GPU name, MiB) per line of a claim that another process holds; nothing if nobody holds it.

    A sum that does not match means that the owner is just writing, so the file is read again.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        for _ in range(READ_TRIES):
            pid = _lock_holder(fd)
            text = os.pread(fd, 4096, 0)
            if not pid or not text:
                return []
            lines, _, total = text.rpartition(b"sum ")
            if total == b"%08x\n" % zlib.adler32(lines):
                fields = [line.split() for line in lines.decode().splitlines()]
                return [(max(pid, 0), name, int(mib)) for name, mib in fields]
        raise ValueError(f"{path} is not a claim: {text!r}")
    finally:
        os.close(fd)


def read_late(path: Path) -> dict[str, int]:
    """MiB by GPU name that a process which has ended still holds; nothing once its time is over."""
    try:
        until, *lines = path.read_text().splitlines()
    except FileNotFoundError:
        return {}
    if float(until.removeprefix("until ")) <= int(time.time()):
        return {}
    return {name: int(mib) for name, mib in (line.split() for line in lines)}


def _lock_holder(fd: int) -> int:
    """The PID that holds the lock, -1 if that is not visible from our namespace, 0 if nobody does."""
    asked = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    if kind == fcntl.F_UNLCK:
        return 0
    return pid if pid > 0 else -1
