"""Makes the demo models see: a vision projector of LLaVA's kind with random weights, that llama.cpp loads."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from orchestrator.local.demo import WIDTH as TEXT_WIDTH

IMAGE, PATCH = 64, 16
TOKENS = (IMAGE // PATCH) ** 2
"""What one image takes of the context."""
WIDTH, FEED, LAYERS, HEADS = 32, 64, 2, 2


def make_projector(path: Path, seed: int = 1) -> None:
    writer = gguf.GGUFWriter(str(path), "clip")
    writer.add_name("random-projector")
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", True)
    for key, value in {
        "image_size": IMAGE,
        "patch_size": PATCH,
        "embedding_length": WIDTH,
        "feed_forward_length": FEED,
        "block_count": LAYERS,
        "projection_dim": TEXT_WIDTH,
        "attention.head_count": HEADS,
    }.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5, 0.5, 0.5])
    for name, data in tensors(np.random.default_rng(seed)):
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(random: np.random.Generator) -> Iterator[tuple[str, NDArray[np.float32]]]:
    def weights(*shape: int) -> NDArray[np.float32]:
        return (0.1 * random.standard_normal(shape)).astype(np.float32)

    def linear(name: str, out: int, into: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
        yield f"{name}.weight", weights(out, into)
        yield f"{name}.bias", weights(out)

    yield "v.class_embd", weights(WIDTH)
    yield "v.patch_embd.weight", weights(WIDTH, 3, PATCH, PATCH)
    yield "v.position_embd.weight", weights(TOKENS + 1, WIDTH)
    for norm in ("v.pre_ln", *(f"v.blk.{n}.{part}" for n in range(LAYERS) for part in ("ln1", "ln2"))):
        yield f"{norm}.weight", np.ones(WIDTH, np.float32)
        yield f"{norm}.bias", np.zeros(WIDTH, np.float32)
    for layer in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            yield from linear(f"v.blk.{layer}.{part}", WIDTH, WIDTH)
        yield from linear(f"v.blk.{layer}.ffn_up", FEED, WIDTH)
        yield from linear(f"v.blk.{layer}.ffn_down", WIDTH, FEED)
    yield from linear("mm.0", TEXT_WIDTH, WIDTH)
    yield from linear("mm.2", TEXT_WIDTH, TEXT_WIDTH)
