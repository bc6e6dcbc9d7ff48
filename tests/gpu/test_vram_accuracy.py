"""The first prediction against NVML, on a real card, by hand:
`pytest -m gpu tests/gpu/test_vram_accuracy.py -s`.

Needs `ORCHESTRATOR_TEST_LLAMA_SERVER`, a CUDA llama-server, and nothing else running on the card.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pynvml
import pytest

from bench.vram_accuracy import CASES, SERVER, SPLIT_CASES, Card, Case, Setting, run

pytestmark = pytest.mark.gpu

HIGH_PERCENT, LOW_PERCENT = 3, -1


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    server = os.environ.get(SERVER)
    if not server or shutil.which("nvidia-smi") is None:
        pytest.skip(f"SKIPPED: there is no NVIDIA GPU here, or {SERVER} names no llama-server")
    return Setting(server, Path(tmp_path_factory.mktemp("shapes")), Card(0), 3000, ())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_first_prediction_is_true(case: Case, setting: Setting) -> None:
    row = run(case, setting)
    assert "failed" not in row, row
    print(f"{row['name']}: {row['nvml_mib_peak']:.0f} MiB, {row['error_percent']:+.2f} %")
    assert LOW_PERCENT <= row["error_percent"] <= HIGH_PERCENT, row


@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_a_first_prediction_over_two_gpus_is_true(case: Case, setting: Setting) -> None:
    pynvml.nvmlInit()
    if pynvml.nvmlDeviceGetCount() < case.gpus:
        pytest.skip(f"SKIPPED: there are no {case.gpus} GPUs here")
    test_a_first_prediction_is_true(case, setting)
