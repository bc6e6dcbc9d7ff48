"""Compile the simulated NVML. Needs a C compiler as `cc`."""

import ctypes
import fcntl
import hashlib
import os
import subprocess
from pathlib import Path

NAME = "libnvidia-ml.so.1"  # what pynvml asks the loader for
SOURCE = Path(__file__).with_name("nvml.c")
COMMAND = ("cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-fPIC", "-shared", f"-Wl,-soname,{NAME}")


def cache_dir() -> Path:
    """Where tests keep what is slow to make; it may be deleted at any time."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "model-orchestrator-tests"


def build(out_dir: Path) -> Path:
    """Return the library under `out_dir`, compiled unless this very source already was.

    The folder it lies in holds nothing else and is meant for LD_LIBRARY_PATH. Safe to call from
    several processes at once.
    """
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(COMMAND).encode()).hexdigest()[:16]
    library = out_dir / f"nvml-{digest}" / NAME
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with (out_dir / "nvml.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            half_done = out_dir / f"nvml-{digest}.so"
            subprocess.run([*COMMAND, "-o", half_done, SOURCE], check=True)
            half_done.rename(library)
    return library


def preload(library: Path) -> None:
    """Make the `import pynvml` of this very process find `library`.

    The loader reads LD_LIBRARY_PATH at start only, but it answers a request for a name it has already
    loaded. SIMULATED_NVML_DIR is read at every call and may be set and changed at any time.
    """
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    print(build(cache_dir()))
