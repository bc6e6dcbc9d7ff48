"""The parser reads what llama.cpp's own writer wrote, and gives every bad file an error of its own."""

import random
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.estimate.footprint import predict
from orchestrator.estimate.ggml_types import BLOCKS
from orchestrator.estimate.gguf_header import GgufError, Header, read_gguf
from orchestrator.estimate.plan import Plan
from tests.estimate.ggufs import Tensor, gguf_bytes, llama
from tests.estimate.shapes import qwen3_8b


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_metadata_and_sizes_of_a_small_file(tmp_path: Path) -> None:
    header = read_gguf(llama(tmp_path / "m.gguf"))

    assert header.architecture == "llama"
    assert header.tensor_bytes == 64 * 16 * 4 + 64 * 32 // 32 * 18
    assert header.file_bytes == (tmp_path / "m.gguf").stat().st_size
    assert header.of("block_count") == 2
    assert header.of("no_such_key", 7) == 7
    assert header.tensors == {"a": 4096, "b": 1152}
    assert header.lengths == {"tokenizer.ggml.tokens": 3}
    assert header.matrix_kinds == {0, 2}
    assert "tokenizer.ggml.tokens" not in header.metadata


def test_agrees_with_the_writer_of_llama_cpp(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(tmp_path / "w.gguf"), "qwen3")
    writer.add_block_count(3)
    writer.add_head_count_kv([4, 0, 4])
    writer.add_rope_freq_base(10_000.0)
    writer.add_token_list([f"token-{number}" for number in range(5000)])
    writer.add_token_scores([0.5] * 5000)
    writer.add_tensor("x.weight", np.ones((3, 64), np.float32))
    writer.add_tensor("y.weight", np.ones((5, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_gguf(tmp_path / "w.gguf")
    assert header.architecture == "qwen3"
    assert header.metadata["qwen3.attention.head_count_kv"] == (4, 0, 4)
    assert header.number("qwen3.rope.freq_base") == 10_000.0
    assert header.tensor_bytes == 3 * 64 * 4 + 5 * 34
    assert "tokenizer.ggml.scores" not in header.metadata


def test_block_sizes_are_those_of_ggml() -> None:
    import gguf

    for kind, size in gguf.GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":  # the package says 40, ggml's struct has two halves and 32 bytes
            assert BLOCKS[kind.value] == size, kind.name


def test_a_type_from_the_future_reaches_to_its_successor(tmp_path: Path) -> None:
    tensors = [Tensor("a", (64,), 999, 320), Tensor("b", (8,), 0, 32), Tensor("c", (64,), 999, 64)]
    path = write(tmp_path / "m.gguf", gguf_bytes({"general.architecture": "new"}, tensors))

    assert read_gguf(path).tensor_bytes == 320 + 32 + 64


def test_version_2_is_read_and_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", gguf_bytes({"general.architecture": "one"}, version=2))
    assert read_gguf(path).architecture == "one"
    write(path, gguf_bytes({"general.architecture": "another"}))
    assert read_gguf(path).architecture == "another"


SOUND = gguf_bytes({"general.architecture": "x", "n": 1}, [Tensor("a", (64, 16), 0, 4096)])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a GGUF"),
        (b"GG", "not a GGUF"),
        (b"PK\3\4" + b"\0" * 100, "not a GGUF"),
        (SOUND[:20], "cut short"),
        (SOUND[:-4000], "cut short"),
        (SOUND[:-1], "cut short"),
        (b"GGUF" + struct.pack(">I", 3) + SOUND[8:], "big-endian"),
        (b"GGUF" + struct.pack("<I", 1) + SOUND[8:], "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**15, 0), "cut short"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**19, 0), "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**63) + b"\0" * 64, "claims"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 99) + b"\0" * 9, "type 99"),
        (
            b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1) + b"\0" * 9,
            "type 9",
        ),
        (gguf_bytes({"general.alignment": 0}), "alignment"),
        (gguf_bytes({}, [Tensor("a", (1, 1, 1, 1, 1), 0, 4)]), "5 dimensions"),
        (gguf_bytes({}, [Tensor("a", (2**40, 2**40), 0, 4)]), "cut short"),
        (gguf_bytes({}, [Tensor("a", (33,), 2, 18)]), "'a' has rows of 33, no multiple of 32"),
        (gguf_bytes({}, [Tensor("a", (64,), 0, 32), Tensor("b", (8,), 0, 32)]), "'a' reaches into 'b'"),
        (gguf_bytes({}, [Tensor("a", (8,), 0, 32), Tensor("a", (8,), 0, 32)]), "two tensors 'a'"),
        (gguf_bytes({}, [Tensor("a" * 300, (8,), 0, 32)]), "300 entries"),
        (gguf_bytes({"split.count": 3}), "one of 3 parts"),
        (gguf_bytes({f"k{i}": [1] * 4000 for i in range(300)}), "larger than 4 MiB"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, data: bytes, says: str) -> None:
    path = write(tmp_path / "bad.gguf", data)
    with pytest.raises(GgufError, match=says) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def test_what_is_no_file_is_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="There is no file"):
        read_gguf(tmp_path / "absent.gguf")
    with pytest.raises(GgufError, match="not a file"):
        read_gguf(tmp_path)


def test_shards_are_summed_and_all_must_be_there(tmp_path: Path) -> None:
    first = llama(tmp_path / "m-00001-of-00003.gguf")
    for part in (2, 3):
        write(
            tmp_path / f"m-0000{part}-of-00003.gguf",
            gguf_bytes({"split.no": part}, [Tensor(f"t{part}", (64,), 0, 256)]),
        )
    whole = read_gguf(first)
    assert (whole.tensor_bytes, whole.shards, whole.architecture) == (4096 + 1152 + 2 * 256, 3, "llama")

    with pytest.raises(GgufError, match="first part"):
        read_gguf(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(GgufError, match=r"no file .*00003-of-00003"):
        read_gguf(first)


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    first = llama(tmp_path / "m-00001-of-00002.gguf")
    write(tmp_path / "m-00002-of-00002.gguf", gguf_bytes({}, [Tensor("a", (64,), 0, 256)]))
    with pytest.raises(GgufError, match=r"00002-of-00002.gguf has the tensor 'a'"):
        read_gguf(first)


def test_long_texts_and_arrays_are_stepped_over(tmp_path: Path) -> None:
    long = {"template": "x" * 3_000_000, "scores": [0] * 500_000, "after": 7}
    header = read_gguf(write(tmp_path / "m.gguf", gguf_bytes({"general.architecture": "x", **long})))
    assert dict(header.metadata) == {"general.architecture": "x", "after": 7}
    assert header.lengths == {"scores": 500_000}


def test_texts_that_cross_the_windows_of_the_reader(tmp_path: Path) -> None:
    """The file is read a MiB at a time; texts of all lengths must be met again behind each border."""
    dice = random.Random(5)
    tokens = ["t" * dice.choice((0, 1, 7, 300, 70_000)) for _ in range(400)]
    metadata = {"general.architecture": "x", "tokens": tokens, "after": 7}
    header = read_gguf(write(tmp_path / "m.gguf", gguf_bytes(metadata)))
    assert (header.metadata["after"], header.lengths["tokens"]) == (7, 400)


def test_a_real_vocabulary_takes_little_time_and_memory(tmp_path: Path) -> None:
    path = qwen3_8b(layers=2).write(tmp_path)
    tracemalloc.start()
    try:
        header, (_, most) = read_gguf(path), tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert header.lengths["tokenizer.ggml.tokens"] == 151_936
    assert most < 4 << 20
    read_gguf.__globals__["_parse"].cache_clear()
    began = time.perf_counter()
    read_gguf(path)
    assert time.perf_counter() - began < 0.5  # 0.03 s on an idle machine


def attempt(path: Path) -> Header | None:
    """Read it within a second and 16 MiB, with no error but GgufError, which names the file."""
    began = time.perf_counter()
    tracemalloc.start()
    try:
        return read_gguf(path)
    except GgufError as error:
        assert str(path) in str(error)
        return None
    finally:
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 16 << 20
        assert time.perf_counter() - began < 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tail=st.binary(max_size=400),
    head=st.sampled_from([b"", b"GGUF", b"GGUF\3\0\0\0", SOUND[:24], SOUND[:60]]),
)
def test_random_bytes_are_only_ever_refused(tmp_path: Path, tail: bytes, head: bytes) -> None:
    attempt(write(tmp_path / "r.gguf", head + tail))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_real_file_with_damage_is_read_or_refused(tmp_path: Path, seed: int, tiny: bytes) -> None:
    chance = random.Random(seed)
    data = bytearray(tiny)
    for _ in range(chance.randint(1, 8)):
        place = chance.randrange(6500)
        data[place] = chance.choice((0, 1, 255, chance.randrange(256)))
    if chance.random() < 0.3:
        del data[chance.randrange(len(data)) :]
    header = attempt(write(tmp_path / "d.gguf", bytes(data)))
    if header is not None:
        assert 0 <= header.tensor_bytes <= header.file_bytes * 100, "sizes come from the file's own bytes"
        assert predict(header, Plan(4096)).total > 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from orchestrator.local.demo import make_demo

    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    make_demo(path, 7)
    return path.read_bytes()
