"""Predictions against what real llama.cpp logs of its buffers, on the CPU, for a few layers of real width."""

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.core.buffers import COMPONENTS, buffers_in
from orchestrator.core.entities import MIB
from orchestrator.estimate.footprint import predict
from orchestrator.estimate.gguf_header import read_gguf
from orchestrator.estimate.plan import Plan
from tests.estimate import shapes
from tests.estimate.shapes import Shape

pytestmark = pytest.mark.llama

LOAD = """
import sys, os, xllamacpp
path, context, kind, parallel = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = path, int(context), int(parallel)
params.n_gpu_layers, params.fit_params, params.warmup, params.kv_unified = 0, False, False, True
params.no_extra_bufts, params.cache_ram_mib, params.verbosity, params.port = True, 0, 4, 0
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kind.upper()}")
server = xllamacpp.Server(params)  # kept: its destructor waits
os._exit(0)
"""
SMALL = 4096  # tokens in the vocabulary


@pytest.mark.parametrize(
    ("shape", "context", "kind", "parallel"),
    [
        (shapes.qwen3_8b(2, SMALL), 8192, "q8_0", 1),
        (shapes.qwen3_30b_a3b(2, SMALL), 4096, "f16", 4),
        (shapes.gemma3_12b(7, SMALL), 8192, "f16", 4),
        (shapes.gpt_oss_20b(2, SMALL), 4096, "q4_0", 1),
        (shapes.qwen3_next_80b(4, SMALL), 4096, "f16", 3),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_buffers_are_as_predicted(
    shape: Shape, context: int, kind: str, parallel: int, tmp_path: Path
) -> None:
    path = shape.write(tmp_path)
    words = [sys.executable, "-c", LOAD, str(path), str(context), kind, str(parallel)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    truth = dict.fromkeys(COMPONENTS.values(), 0.0)
    for kinds in buffers_in(done.stdout + done.stderr).values():
        for name, size in kinds.items():
            truth[COMPONENTS[name]] += size / MIB
    plan = Plan(context, parallel=parallel, cache_type_k=kind, cache_type_v=kind, on_gpu=False)
    parts = predict(read_gguf(path), plan).breakdown["host"]
    predicted = {name: round(parts[name] / MIB, 2) for name in truth}
    assert predicted["weights"] == pytest.approx(truth["weights"], abs=0.1)
    assert predicted["kv_cache"] == pytest.approx(truth["kv_cache"], abs=0.1)
    assert truth["compute"] - 1 <= predicted["compute"] <= truth["compute"] + 20
