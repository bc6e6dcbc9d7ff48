"""From the container's environment to the command line of llama-server. README.md lists the variables.

Wrong values are refused here, with the words and exit codes of `orchestrator.local.llama`, since llama.cpp
would only say that its parameters are invalid.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import hub_cache

ENDED, NOT_LOADED, BAD_VARIABLE, BAD_FILE = 0, 1, 2, 3

LLAMA_SERVER = "/opt/llama-cpp/bin/llama-server"
DEFAULT_REPO = "Qwen/Qwen3-VL-30B-A3B-Instruct-GGUF"
DEFAULT_FILE = "qwen3-vl-30b-a3b-instruct-q4_k_m.gguf"
MOST_CONTEXT = 262_144
MOST_GPUS, MOST_SHARE = 15, 1e9  # llama.cpp takes no more
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")

SET_BY_US = {
    "LLAMA_ARG_MODEL": "MODEL_PATH",
    "LLAMA_ARG_MMPROJ": "MMPROJ_PATH",
    "LLAMA_ARG_ALIAS": "MODEL_NAME",
    "LLAMA_ARG_HOST": "HOST",
    "LLAMA_ARG_PORT": "PORT",
    "LLAMA_ARG_CTX_SIZE": "CONTEXT_SIZE",
    "LLAMA_ARG_N_GPU_LAYERS": "N_GPU_LAYERS",
    "LLAMA_ARG_N_PARALLEL": "PARALLEL",
    "LLAMA_ARG_CACHE_TYPE_K": "CACHE_TYPE_K",
    "LLAMA_ARG_CACHE_TYPE_V": "CACHE_TYPE_V",
    "LLAMA_ARG_CACHE_RAM": "CACHE_RAM_MIB",
    "LLAMA_ARG_TENSOR_SPLIT": "TENSOR_SPLIT",
    "LLAMA_ARG_LOG_VERBOSITY": "LOG_VERBOSITY",
}
"""llama.cpp's own variables that would lose against our arguments, and ours that say the same."""


class Unusable(Exception):
    """The server cannot start as it was told; `code` is the exit code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Options:
    """What the environment asks for."""

    model: Path
    mmproj: Path | None
    host: str
    port: int
    name: str
    context_size: int
    gpu_layers: int
    parallel: int
    cache_type_k: str
    cache_type_v: str
    cache_ram_mib: int
    tensor_split: tuple[float, ...]
    verbosity: int


def read_options(environment: Mapping[str, str]) -> Options:
    """Raises Unusable for a senseless variable, and for a file that is missing or not a GGUF."""
    for theirs, ours in SET_BY_US.items():
        if theirs in environment:
            raise Unusable(BAD_VARIABLE, f"{theirs} is set, which would not count; set {ours} instead")
    context_size = _whole(environment, "CONTEXT_SIZE", 8192, 1, MOST_CONTEXT)
    gpu_layers = _whole(environment, "N_GPU_LAYERS", 99, 0)
    parallel = _whole(environment, "PARALLEL", 4, 1, 256)
    cache_type_k = _cache_type(environment, "CACHE_TYPE_K")
    cache_type_v = _cache_type(environment, "CACHE_TYPE_V")
    cache_ram_mib = _whole(environment, "CACHE_RAM_MIB", 0, 0)
    tensor_split = _shares(environment, "TENSOR_SPLIT")
    port = _whole(environment, "PORT", 8000, 0, 65535)
    verbosity = _whole(environment, "LOG_VERBOSITY", 4, 0, 5)
    model = _model(environment)
    mmproj = _mmproj(environment, model)
    name = _name(environment, model)
    for file in (model, mmproj):
        if file is not None:
            _check_gguf(file)
    return Options(
        model=model,
        mmproj=mmproj,
        host=environment.get("HOST") or "0.0.0.0",
        port=port,
        name=name,
        context_size=context_size,
        gpu_layers=gpu_layers,
        parallel=parallel,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        cache_ram_mib=cache_ram_mib,
        tensor_split=tensor_split,
        verbosity=verbosity,
    )


def command_line(options: Options, environment: Mapping[str, str]) -> list[str]:
    """llama-server's own, with nothing left for it to choose in silence (`--fit`: fewer layers or tokens)."""
    words = [LLAMA_SERVER, "--model", str(options.model), "--alias", options.name]
    if options.mmproj is not None:
        words += ["--mmproj", str(options.mmproj)]
    words += ["--host", options.host, "--port", str(options.port)]
    words += ["--ctx-size", str(options.context_size), "--n-gpu-layers", str(options.gpu_layers)]
    words += ["--fit", "off", "--parallel", str(options.parallel), "--kv-unified", "--cont-batching"]
    if len(options.tensor_split) > 1:
        words += ["--tensor-split", ",".join(f"{share:g}" for share in options.tensor_split)]
    words += ["--flash-attn", "on"]
    words += ["--cache-type-k", options.cache_type_k, "--cache-type-v", options.cache_type_v]
    words += ["--cache-ram", str(options.cache_ram_mib), "--metrics", "--slots"]
    words += ["--log-verbosity", str(options.verbosity)]
    if "LLAMA_ARG_CORS_ORIGINS" not in environment:
        words += ["--cors-origins", "", "--no-cors-credentials"]  # else every web page could read answers
    return words


def default_model(environment: Mapping[str, str]) -> Path:
    home = Path(environment.get("HF_HOME") or "/data/.huggingface")
    folder = hub_cache.REPOSITORY + DEFAULT_REPO.replace("/", "--")
    return home / "hub" / folder / "snapshots" / hub_cache.LATEST / DEFAULT_FILE


def _model(environment: Mapping[str, str]) -> Path:
    text = environment.get("MODEL_PATH", "")
    return _found("MODEL_PATH", Path(text) if text else default_model(environment))


def _mmproj(environment: Mapping[str, str], model: Path) -> Path | None:
    """Unset means the one in the model's snapshot; empty is what a catalogue says of a model without."""
    text = environment.get("MMPROJ_PATH")
    if text is None:
        return hub_cache.projector_beside(model)
    return _found("MMPROJ_PATH", Path(text)) if text not in ("", "none") else None


def _found(key: str, path: Path) -> Path:
    try:
        return hub_cache.find(path)
    except hub_cache.Missing as error:
        raise Unusable(BAD_FILE, f"{key}: {error}") from error
    except OSError as error:
        raise Unusable(BAD_FILE, _unreadable(path, error)) from error


def _name(environment: Mapping[str, str], model: Path) -> str:
    name = environment.get("MODEL_NAME") or model.stem
    if "," in name and environment.get("MODEL_NAME"):
        raise Unusable(BAD_VARIABLE, f"MODEL_NAME is '{name}', expected a name without a comma")
    return name.replace(",", "-")


def _whole(environment: Mapping[str, str], key: str, default: int, least: int, most: int = 2**31 - 1) -> int:
    text = environment.get(key, "").strip()
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise Unusable(BAD_VARIABLE, f"{key} is '{text}', expected a whole number from {least} to {most}")
    return value


def _shares(environment: Mapping[str, str], key: str) -> tuple[float, ...]:
    """Each GPU's share of the layers; empty leaves it to llama.cpp, which looks at what is free."""
    text = environment.get(key, "").strip()
    try:
        shares = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        shares = (-1.0,)
    if len(shares) > MOST_GPUS or not all(0 <= share < MOST_SHARE for share in shares):
        wanted = f"at most {MOST_GPUS} shares of 0 or more, such as 1,1"
        raise Unusable(BAD_VARIABLE, f"{key} is '{text}', expected {wanted}")
    return shares


def _cache_type(environment: Mapping[str, str], key: str) -> str:
    kind = (environment.get(key) or "f16").lower()
    if kind not in CACHE_TYPES:
        raise Unusable(BAD_VARIABLE, f"{key} is '{kind}', expected one of {', '.join(CACHE_TYPES)}")
    return kind


def _check_gguf(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise Unusable(BAD_FILE, _unreadable(path, error)) from error
    if magic != b"GGUF":
        raise Unusable(BAD_FILE, f"{path} is not a GGUF file: it begins with {magic!r}")


def _unreadable(path: Path, error: OSError) -> str:
    said = f"cannot read {path}: {error.strerror}"
    if isinstance(error, PermissionError):
        said += f" for {os.geteuid()}:{os.getegid()}; set PUID and PGID to its owner's, or let others read it"
    return said
