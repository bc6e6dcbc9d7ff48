"""What is read from a service's log of its buffers: pure."""

import pytest

from orchestrator.control.buffer_lines import MOST_BYTES
from orchestrator.core.buffers import MOST_DEVICES, buffers_in, parts_on_fullest_gpu
from orchestrator.core.entities import MIB

TWO_GPUS = """
0.00.210.011 I load_tensors: offloading output layer to GPU
0.00.210.013 I load_tensors: offloaded 37/37 layers to GPU
0.00.210.016 I load_tensors:   CPU_Mapped model buffer size =   333.84 MiB
0.00.210.017 I load_tensors:        CUDA0 model buffer size =  2118.09 MiB
0.00.210.017 I load_tensors:        CUDA1 model buffer size =  2337.25 MiB
0.00.921.114 I llama_context:  CUDA_Host  output buffer size =     2.32 MiB
0.00.925.402 I llama_kv_cache:      CUDA0 KV buffer size =   608.00 MiB
0.00.927.511 I llama_kv_cache:      CUDA1 KV buffer size =   544.00 MiB
0.00.952.330 I sched_reserve:      CUDA0 compute buffer size =   140.01 MiB
0.00.952.331 I sched_reserve:      CUDA1 compute buffer size =   304.75 MiB
0.00.952.332 I sched_reserve:  CUDA_Host compute buffer size =    36.02 MiB
"""


def mib(size: float) -> int:
    return round(size * MIB)


def test_every_device_has_its_own() -> None:
    assert buffers_in(TWO_GPUS) == {
        "CPU_Mapped": {"model": mib(333.84)},
        "CUDA0": {"model": mib(2118.09), "KV": mib(608), "compute": mib(140.01)},
        "CUDA1": {"model": mib(2337.25), "KV": mib(544), "compute": mib(304.75)},
        "CUDA_Host": {"output": mib(2.32), "compute": mib(36.02)},
    }


def test_the_parts_are_of_the_fullest_gpu_and_add_up_to_what_was_measured() -> None:
    parts = parts_on_fullest_gpu(buffers_in(TWO_GPUS), mib(3900))
    assert parts == {
        "weights": mib(2337.25),
        "kv_cache": mib(544),
        "compute": mib(304.75),
        "other": mib(3900) - mib(2337.25) - mib(544) - mib(304.75),
    }


def test_those_of_one_kind_add_up() -> None:
    """A sliding window has a second cache, a draft model everything twice, a recurrent layer has states."""
    said = """
llama_kv_cache_iswa:      CUDA0 KV buffer size =   100.00 MiB
llama_kv_cache_iswa:      CUDA0 KV buffer size =    20.50 MiB
llama_memory_recurrent:   CUDA0 RS buffer size =     3.00 MiB
"""
    assert buffers_in(said) == {"CUDA0": {"KV": mib(120.5), "RS": mib(3)}}
    assert parts_on_fullest_gpu(buffers_in(said), mib(200)) == {"kv_cache": mib(123.5), "other": mib(76.5)}


@pytest.mark.parametrize(
    "line",
    [
        "CUDA0 model buffer size is large",
        "CUDA0 model buffer size = nan MiB",
        "CUDA0 model buffer size = 1.2.3 GiB",
        "CUDA0 other buffer size = 12.00 MiB",
        "CUDA0 model buffer size = 12345678 MiB",
        "x" * 41 + " model buffer size = 12.00 MiB",
        "model buffer size = 12.00 MiB",
        "",
    ],
)
def test_other_lines_say_nothing(line: str) -> None:
    assert buffers_in(line) == {}


@pytest.mark.parametrize("device", ["CPU", "CPU_Mapped", "CPU_REPACK", "CUDA_Host", "RPC[10.0.0.1:50052]"])
def test_what_is_not_on_a_gpu_is_no_part_of_what_one_holds(device: str) -> None:
    known = buffers_in(f"load_tensors: {device} model buffer size = 12.00 MiB")
    assert known == {device: {"model": mib(12)}}
    assert parts_on_fullest_gpu(known, mib(100)) == {}


@pytest.mark.parametrize("device", ["CUDA0", "ROCm1", "Vulkan0", "SYCL0", "MTL0"])
def test_a_numbered_device_is_a_gpu(device: str) -> None:
    known = buffers_in(f"{device} KV buffer size = 12.00 MiB")
    assert parts_on_fullest_gpu(known, mib(12)) == {"kv_cache": mib(12), "other": 0}


def test_more_than_was_measured_is_not_believed() -> None:
    assert parts_on_fullest_gpu({"CUDA0": {"model": mib(101)}}, mib(100)) == {}


def test_a_hostile_log_fills_nothing() -> None:
    """A pattern that tried again at each letter of the long line would take minutes."""
    long_word = "a" * (1 << 20)
    many = "\n".join(f"GPU{number} model buffer size = 1.00 MiB" for number in range(3 * MOST_DEVICES))
    found = buffers_in(f"{long_word} model buffer size = 1.00 MiB\n{long_word}\n{many}")
    assert list(found) == [f"GPU{number}" for number in range(MOST_DEVICES)]
    assert buffers_in(f"{many}\nGPU0 model buffer size = 1.00 MiB")["GPU0"] == {"model": 2 * MIB}


@pytest.mark.parametrize("digits", range(1, 12))
def test_what_a_hostile_log_adds_up_to_is_an_integer_of_json(digits: int) -> None:
    """One line of a log may hold many lines of text, and the sums are answered by `GET /learned`."""
    line = f"a KV buffer size={'9' * digits} MiB\r"
    known = buffers_in(line * (MOST_BYTES // len(line)))
    assert all(kinds["KV"] < 1 << 63 for kinds in known.values())
    assert bool(known) is (digits <= 7)
