"""Real llama.cpp as one process or container: `python -m orchestrator.local.llama`, told by its environment.

MODEL_PATH     the GGUF file (of a split model, its first shard); required
MMPROJ_PATH    the projector file of a vision model
HOST, PORT     where to listen: 127.0.0.1, 8000
MODEL_NAME     what the server calls the model in its answers; the file's stem
CONTEXT_SIZE   tokens in the one KV cache that all slots share: 8192
N_GPU_LAYERS   layers on the GPU: 999, which means all
PARALLEL       slots, that is requests served at the same time: 4
CACHE_TYPE_K, CACHE_TYPE_V   f16; also f32, bf16, q8_0, q5_1, q5_0, q4_1, q4_0, iq4_nl
CACHE_RAM_MIB  RAM for prompts that lost their slot: 0, none. llama.cpp's own default is 8 GiB for each
               model, which nobody would have reserved; whoever sets it has it counted in the footprint.

Exit codes: 0 asked to end, 1 llama.cpp could not load the model, 2 a variable is wrong, 3 a file is
missing or not a GGUF. The reason is on stderr.

This file needs only the standard library and xllamacpp, so that an image can carry it alone, and starts
in well under a tenth of a second. What llama.cpp chooses silently (`fit`: fewer layers or tokens than
asked, where memory is short) is off: the orchestrator has reserved what was asked for.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ENDED, NOT_LOADED, BAD_VARIABLE, BAD_FILE = 0, 1, 2, 3

ENDING = (signal.SIGTERM, signal.SIGINT)
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
MOST_GPUS, MOST_SHARE = 15, 1e9  # llama.cpp takes no more


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


def read_options(environment: Mapping[str, str]) -> Options:
    """Raises Unusable for a missing or senseless variable, and for a file that is not a GGUF."""
    path = environment.get("MODEL_PATH", "")
    if not path:
        raise Unusable(BAD_VARIABLE, "MODEL_PATH is not set: it names the GGUF file to serve")
    mmproj = environment.get("MMPROJ_PATH", "")
    model = Path(path)
    options = Options(
        model=model,
        mmproj=Path(mmproj) if mmproj else None,
        host=environment.get("HOST") or "127.0.0.1",
        port=_whole(environment, "PORT", 8000, 0, 65535),
        name=environment.get("MODEL_NAME") or model.stem,
        context_size=_whole(environment, "CONTEXT_SIZE", 8192, 1),
        gpu_layers=_whole(environment, "N_GPU_LAYERS", 999, 0),
        parallel=_whole(environment, "PARALLEL", 4, 1, 256),
        cache_type_k=_cache_type(environment, "CACHE_TYPE_K"),
        cache_type_v=_cache_type(environment, "CACHE_TYPE_V"),
        cache_ram_mib=_whole(environment, "CACHE_RAM_MIB", 0, 0),
        tensor_split=_shares(environment, "TENSOR_SPLIT"),
    )
    for file in (options.model, options.mmproj):
        if file is not None:
            _check_file(file)
    return options


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


def _check_file(path: Path) -> None:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise Unusable(BAD_FILE, f"cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise Unusable(BAD_FILE, f"{path} is not a GGUF file: it begins with {magic!r}")


def _parameters(options: Options) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(options.model)
    if options.mmproj is not None:
        params.mmproj.path = str(options.mmproj)
    params.model_alias = {options.name}
    params.hostnames = [options.host]
    params.port = options.port
    params.n_ctx = options.context_size
    params.n_gpu_layers = options.gpu_layers
    params.fit_params = False
    params.n_parallel = options.parallel
    params.kv_unified = True
    params.cache_type_k = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{options.cache_type_k.upper()}")
    params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{options.cache_type_v.upper()}")
    params.cache_ram_mib = options.cache_ram_mib
    if len(options.tensor_split) > 1:
        blank = [0.0] * (len(params.tensor_split) - len(options.tensor_split))
        params.tensor_split = [*options.tensor_split, *blank]
    params.cors_origins = ""  # no web page may read answers from here; llama.cpp would let all of them
    params.cors_credentials = False
    params.endpoint_metrics = True
    params.endpoint_slots = True
    return params


def serve(options: Options) -> NoReturn:
    """Load the model, serve until SIGTERM or SIGINT, and leave with exit code 0.

    The signals stay blocked in every thread and are waited for: a handler lost about one in eight of
    them, since the main thread sits in C code. The process leaves without llama.cpp's destructor, which
    waits for open streams; the kernel frees the memory.
    """
    import xllamacpp

    params = _parameters(options)
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise Unusable(NOT_LOADED, f"llama.cpp cannot serve {options.model}: {error}") from error
    print(f"{options.name}: listening on {server.listening_address}", flush=True)
    received = signal.sigwait(ENDING)
    print(f"{options.name}: {signal.Signals(received).name}, ending", flush=True)
    os._exit(ENDED)


def main() -> NoReturn:
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # before any thread exists, so that all inherit it
    try:
        serve(read_options(os.environ))
    except Unusable as error:
        print(f"cannot start: {error}", file=sys.stderr, flush=True)
        code = error.code
    except ImportError as error:
        print(f"cannot start: {error}; install the extra 'local'", file=sys.stderr, flush=True)
        code = BAD_VARIABLE
    os._exit(code)


if __name__ == "__main__":
    main()
