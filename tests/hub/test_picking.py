"""Which files make the model: the rules of llama.cpp's `-hf`, on listings like those of real repositories."""

import pytest

from orchestrator.core.entities import HubFile
from orchestrator.core.errors import QuantNotFound
from orchestrator.hub.picking import (
    Picked,
    Reference,
    name_of,
    parse_reference,
    pick,
    pick_by_pattern,
    quant_of,
)

VISION = (
    "README.md",
    "Model-30B-BF16.gguf",
    "Model-30B-Q8_0.gguf",
    "Model-30B-q4_k_m.gguf",
    "imatrix-Q4_K_M.gguf",
    "mmproj-BF16.gguf",
    "mmproj-F16.gguf",
    "mmproj-F32.gguf",
)
SPLIT = tuple(f"Q8_0/Big-Q8_0-0000{part}-of-00003.gguf" for part in (2, 1, 3))


def files(*paths: str) -> tuple[HubFile, ...]:
    return tuple(HubFile(path, 1, path) for path in paths)


def paths(picked: Picked) -> list[str]:
    return [file.path for file in picked.files]


@pytest.mark.parametrize(
    ("names", "quant", "expected"),
    [
        (VISION, None, ["Model-30B-q4_k_m.gguf", "mmproj-BF16.gguf"]),
        (VISION, "Q4_K_M", ["Model-30B-q4_k_m.gguf", "mmproj-BF16.gguf"]),
        (VISION, "q8_0", ["Model-30B-Q8_0.gguf", "mmproj-BF16.gguf"]),
        (VISION, "bf16", ["Model-30B-BF16.gguf", "mmproj-BF16.gguf"]),
        (("m-Q8_0.gguf", "m-Q2_K.gguf"), None, ["m-Q8_0.gguf"]),
        (("m-Q2_K.gguf", "m-Q3_K.gguf"), None, ["m-Q2_K.gguf"]),
        (("only.gguf",), None, ["only.gguf"]),
        (("m-UD-Q4_K_XL.gguf", "m-Q4_K_M.gguf"), "UD-Q4_K_XL", ["m-UD-Q4_K_XL.gguf"]),
        (SPLIT, None, sorted(SPLIT)),
        (("m-Q4_K_M.gguf", *SPLIT), "Q8_0", sorted(SPLIT)),
        (("a/m-Q4_K_M.gguf", "mmproj-f32.gguf", "a/mmproj-f16.gguf", "b/mmproj-q4.gguf"), None,
         ["a/m-Q4_K_M.gguf", "a/mmproj-f16.gguf"]),
        (("m-Q4_K_M.gguf", "mmproj-F32.gguf", "mmproj-Q8_0.gguf"), None,
         ["m-Q4_K_M.gguf", "mmproj-Q8_0.gguf"]),
    ],
)  # fmt: skip
def test_what_is_picked(names: tuple[str, ...], quant: str | None, expected: list[str]) -> None:
    assert paths(pick("o/m", files(*names), quant)) == expected


@pytest.mark.parametrize(
    ("names", "quant", "says"),
    [
        (VISION, "Q5_K_M", "o/m has no 'Q5_K_M'. It has: BF16, Q8_0, Q4_K_M."),
        (VISION, "Q4", "o/m has no 'Q4'."),
        (("README.md", "model.safetensors", "mmproj-F16.gguf"), None, "o/m has no GGUF model"),
        (SPLIT[:2], None, "o/m has only 2 of the 3 parts of Q8_0/Big-Q8_0-00001-of-00003.gguf"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(names: tuple[str, ...], quant: str | None, says: str) -> None:
    with pytest.raises(QuantNotFound) as caught:
        pick("o/m", files(*names), quant)
    assert says in str(caught.value)


def test_a_source_of_the_catalogue_is_taken_by_its_patterns() -> None:
    picked = pick_by_pattern("o/m", files(*VISION), "model*Q4_K_M.gguf", "mmproj-f16*")
    assert paths(picked) == ["Model-30B-q4_k_m.gguf", "mmproj-F16.gguf"]
    several = pick_by_pattern("o/m", files(*VISION), "model*Q4_K_M.gguf", "mmproj*.gguf")
    assert several == pick("o/m", files(*VISION), "Q4_K_M"), "of several the same as without a pattern"
    assert paths(pick_by_pattern("o/m", files(*SPLIT), "*q8_0*", None)) == sorted(SPLIT)
    for pattern, says in (("*.gguf", "matches 4 files"), ("*q6*", "It has: Model-30B-BF16.gguf, ")):
        with pytest.raises(QuantNotFound, match=says):
            pick_by_pattern("o/m", files(*VISION), pattern, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen3-VL-30B-A3B-Instruct-GGUF:Q4_K_M", ("Qwen/Qwen3-VL-30B-A3B-Instruct-GGUF", "Q4_K_M")),
        ("o/m", ("o/m", None)),
        ("demo", None),
        ("o/m:", None),
        ("o/m/x", None),
        ("../etc:x", None),
        ("o/m:../../x", None),
        ("https://huggingface.co/o/m", None),
    ],
)
def test_references(text: str, expected: tuple[str, str | None] | None) -> None:
    assert parse_reference(text) == (Reference(*expected) if expected else None)


@pytest.mark.parametrize(
    ("asked", "path", "name"),
    [
        (None, "x/m-q4_k_m.gguf", "o/m:Q4_K_M"),
        ("q8_0", "Q8_0/m-Q8_0-00001-of-00002.gguf", "o/m:Q8_0"),
        ("Q4_K_XL", "m-UD-Q4_K_XL.gguf", "o/m:UD-Q4_K_XL"),
        (None, "Llama-3.2-1B.gguf", "o/m"),
        ("1b", "Llama-3.2-1B.gguf", "o/m:1B"),
        (None, "gpt-oss-mxfp4.gguf", "o/m:MXFP4"),
    ],
)
def test_a_model_has_one_name_however_it_was_asked_for(asked: str | None, path: str, name: str) -> None:
    assert name_of(Reference("o/m", asked), Picked(files(path))) == name


def test_words_that_look_like_quantizations() -> None:
    assert [quant_of(name) for name in ("m-IQ4_XS.gguf", "m.f16.gguf", "m-q3-Q5_K.gguf", "mq4.gguf")] == [
        "IQ4_XS", "F16", "Q5_K", None,
    ]  # fmt: skip
