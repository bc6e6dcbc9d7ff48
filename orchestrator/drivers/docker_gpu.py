"""How a container gets at its GPUs; four ways, since hosts differ in what they have installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

from orchestrator.core.entities import Device

AUTO = "auto"
LIBRARY_DIR = "/usr/local/nvidia/lib64"

# The driver's part of CUDA: it must be the host's, as it must match the kernel module.
_DRIVER_LIBRARIES = re.compile(
    r"lib(cuda|cudadebugger|nvidia-(ml|ptxjitcompiler|nvvm\d*|gpucomp|allocator|opencl|cfg|pkcs11.*))\.so\.[\d.]+"
)
_LDCONFIG_LINE = re.compile(r"\s*(\S+) \(.*(?:x86-64|AArch64).*\) => (\S+)")
_CDI_ENGINE = 25
_CDI_DIRS = ("/etc/cdi", "/var/run/cdi")


class GpuMode(StrEnum):
    NVIDIA = "nvidia"  # the NVIDIA container runtime
    CDI = "cdi"  # device specifications that the engine itself reads
    DEVICES = "devices"  # plain device files and the host's driver libraries
    NONE = "none"  # the container is told its GPUs, and nothing more


@dataclass(frozen=True, slots=True)
class GpuPart:
    """What GPU access adds to a container: parts of the engine's HostConfig, and environment.

    `binds` are (host path, container path), read-only.
    """

    device_requests: tuple[Mapping[str, Any], ...] = ()
    devices: tuple[str, ...] = ()
    binds: tuple[tuple[str, str], ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def choose_mode(wanted: str, info: Mapping[str, Any], dev: Path = Path("/dev")) -> GpuMode:
    """The mode of that name, or for `auto` the best that `docker info` and this machine offer.

    Raises ValueError for a name that is no mode.
    """
    if wanted != AUTO:
        return GpuMode(wanted)
    if "nvidia" in (info.get("Runtimes") or {}):
        return GpuMode.NVIDIA
    if _engine_version(info) >= _CDI_ENGINE and _has_cdi(info):
        return GpuMode.CDI
    if (dev / "nvidiactl").exists():
        return GpuMode.DEVICES
    return GpuMode.NONE


def gpu_part(mode: GpuMode, gpus: Iterable[Device], dev: Path = Path("/dev")) -> GpuPart:
    """Access to exactly these GPUs. May run ldconfig in mode `devices`."""
    chosen = tuple(gpus)
    if not chosen:
        # CUDA images ask for all GPUs by themselves; "void" is the runtime's word for no such thing.
        return GpuPart(environment={"NVIDIA_VISIBLE_DEVICES": "void"})
    ids = [gpu.id for gpu in chosen]
    environment = {"NVIDIA_VISIBLE_DEVICES": ",".join(ids)}
    if mode is GpuMode.NVIDIA:
        request = {"DeviceIDs": ids, "Capabilities": [["gpu"]]}
        return GpuPart(device_requests=(request,), environment=environment)
    if mode is GpuMode.CDI:
        request = {"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={name}" for name in ids]}
        return GpuPart(device_requests=(request,), environment=environment)
    if mode is GpuMode.DEVICES:
        files = _device_files(chosen, dev)
        return GpuPart(devices=files, binds=_library_binds(), environment=environment)
    return GpuPart(environment=environment)


def with_libraries(environment: Mapping[str, str], image_environment: Iterable[str]) -> dict[str, str]:
    """Make the bound driver libraries found, without hiding those that the image or the launch names."""
    image = dict(item.partition("=")[::2] for item in image_environment)
    path = environment.get("LD_LIBRARY_PATH", image.get("LD_LIBRARY_PATH", ""))
    if LIBRARY_DIR in path.split(":"):
        return dict(environment)
    return dict(environment) | {"LD_LIBRARY_PATH": f"{LIBRARY_DIR}:{path}" if path else LIBRARY_DIR}


def driver_libraries(ldconfig_output: str) -> dict[str, str]:
    """Where `ldconfig -p` has seen the driver's 64-bit libraries: name -> path."""
    found: dict[str, str] = {}
    for line in ldconfig_output.splitlines():
        match = _LDCONFIG_LINE.fullmatch(line)
        if match and _DRIVER_LIBRARIES.fullmatch(match[1]):
            found.setdefault(match[1], match[2])
    return found


def _device_files(gpus: tuple[Device, ...], dev: Path) -> tuple[str, ...]:
    # The driver numbers its device files as NVML numbers the GPUs, unless one failed to come up.
    names = [f"nvidia{gpu.index}" for gpu in gpus]
    shared = ["nvidiactl", "nvidia-uvm"]
    names += shared + [name for name in ("nvidia-uvm-tools",) if (dev / name).exists()]
    return tuple(str(dev / name) for name in names)


@cache
def _library_binds() -> tuple[tuple[str, str], ...]:
    program = shutil.which("ldconfig") or "/sbin/ldconfig"
    listed = subprocess.run([program, "-p"], capture_output=True, text=True, check=False).stdout
    found = driver_libraries(listed)
    # The resolved path, as a bind of a link would bind what it points to under a passing name.
    return tuple((str(Path(path).resolve()), f"{LIBRARY_DIR}/{name}") for name, path in found.items())


def _engine_version(info: Mapping[str, Any]) -> int:
    leading = re.match(r"\d+", str(info.get("ServerVersion", "")))
    return int(leading[0]) if leading else 0


def _has_cdi(info: Mapping[str, Any]) -> bool:
    known = info.get("DiscoveredDevices") or []
    if any(str(device.get("ID", "")).startswith("nvidia.com/gpu=") for device in known):
        return True
    folders = [Path(folder) for folder in info.get("CDISpecDirs") or _CDI_DIRS]
    return any(list(folder.glob("*nvidia*.yaml")) + list(folder.glob("*nvidia*.json")) for folder in folders)
