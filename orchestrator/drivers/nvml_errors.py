"""NVML's errors: what each means for the handles, for what is asked, and for the user."""

from __future__ import annotations

import pynvml

# The second is no subclass of the first: a library too old for this pynvml.
NVML_ERRORS = (pynvml.NVMLError, pynvml.NVMLLibraryMismatchError)

# After these, handles are worthless until NVML is initialised again. A GPU that is lost or must be reset
# comes back, if ever, with another handle. What we ask is the same each time, so that an invalid argument
# is a handle that died.
NEEDS_INIT = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_INVALID_ARGUMENT,
        pynvml.NVML_ERROR_NOT_FOUND,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_RESET_REQUIRED,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
        pynvml.NVML_ERROR_GPU_NOT_FOUND,
        pynvml.NVML_ERROR_UNKNOWN,
    }
)
# What ran on a GPU that says this is lost.
IS_BROKEN = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED})
# What a GPU says that cannot do a thing, or not for us, and never will: it is not asked again.
CANNOT = frozenset({pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_NO_PERMISSION})
_ADVICE = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "the NVIDIA driver's library (libnvidia-ml.so.1) is not here; "
    "install the driver, or hand the GPUs to this container",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded",
    pynvml.NVML_ERROR_NO_PERMISSION: "this user may not use the GPU",
    pynvml.NVML_ERROR_GPU_IS_LOST: "the GPU fell off the bus; usually only a reboot brings it back",
    pynvml.NVML_ERROR_RESET_REQUIRED: "the GPU must be reset",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "the driver was changed under this program; restart the "
    "server, or the machine",
    pynvml.NVML_ERROR_UNKNOWN: "the driver gives no reason; a container that lost its right to the devices "
    "sees this, and must be created again",
    pynvml.NVML_ERROR_NOT_FOUND: "the GPU is not there any more",
    pynvml.NVML_ERROR_GPU_NOT_FOUND: "the GPU is not there any more",
    pynvml.NVML_ERROR_NOT_SUPPORTED: "this GPU does not tell its memory",
}


def code_of(error: Exception) -> int | None:
    return getattr(error, "value", None)


def reason_of(error: Exception) -> str:
    if not isinstance(error, pynvml.NVMLError):
        return "the NVIDIA driver is too old for this program; it lacks a function that it needs"
    said = str(error).strip()
    advice = _ADVICE.get(code_of(error))
    return f"{advice} (NVML: {said})" if advice else f"NVML says: {said}"
