"""The buffers in which one batch of tokens is computed.

llama.cpp lays out all intermediate results of the largest batch (512 tokens) once, and reuses a place as
soon as nobody needs what is in it. So the buffer is as large as the most that lives at the same moment, which
is in the feed-forward part of a layer, or in its attention. Letters below stand for one result of all tokens
in f32: E as wide as the embeddings, Q as the queries, F as the feed-forward layer. The counts were read off
llama.cpp's own layout for some thirty shapes, and off an H100's log; docs/vram.md has the comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.estimate.gguf_header import Header
from orchestrator.estimate.kv_cache import cache_bytes, cells_of
from orchestrator.estimate.layers import Layer
from orchestrator.estimate.offload import HOST, Offload
from orchestrator.estimate.plan import Plan
from orchestrator.estimate.weights import largest_on_host

MOST_WIDTH = 1 << 20  # a header's numbers are not trusted
_F16, _F32 = 2, 4
_SMALL = 64 << 10  # positions, row numbers
_PIPELINED = 4


@dataclass(frozen=True)
class Batch:
    """Bytes of one intermediate result of all tokens, by its width."""

    embedding: int
    query: int
    feed: int
    chosen_feed: int
    chosen_embedding: int
    inner: int
    logits: int

    @property
    def has_experts(self) -> bool:
        return self.chosen_embedding > 0


def batch_of(header: Header, layers: Sequence[Layer], plan: Plan) -> Batch:
    def bytes_of(width: int) -> int:
        return _F32 * plan.tokens * min(width, MOST_WIDTH)

    used = min(header.of("expert_used_count"), 1024)
    embedding = header.of("embedding_length")
    return Batch(
        embedding=bytes_of(embedding),
        query=bytes_of(max((layer.query for layer in layers), default=0)),
        feed=bytes_of(_dense_feed(header, used)),
        chosen_feed=bytes_of(used * header.of("expert_feed_forward_length")),
        chosen_embedding=bytes_of(used * embedding),
        inner=bytes_of(header.of("ssm.inner_size")),
        logits=_F32 * plan.parallel * min(vocabulary(header), 1 << 22),
    )


def _dense_feed(header: Header, experts_used: int) -> int:
    """The feed-forward width that every token takes; with experts only that of leading or shared layers."""
    if not experts_used:
        return header.of("feed_forward_length")
    leading = header.of("feed_forward_length") if header.of("leading_dense_block_count") else 0
    shared = header.of("expert_shared_feed_forward_length")
    return max(leading, shared or header.of("expert_shared_count") * header.of("expert_feed_forward_length"))


def vocabulary(header: Header) -> int:
    return header.lengths.get("tokenizer.ggml.tokens", 0) or header.of("vocab_size")


def gpu_compute(header: Header, layers: Sequence[Layer], plan: Plan, offload: Offload, gpu: str) -> int:
    """The buffer on one GPU. The first also computes large batches of the layers that are in RAM."""
    batch = batch_of(header, layers, plan)
    computed = {gpu, HOST} if gpu == offload.gpus[0] else {gpu}
    here = [layer for number, layer in enumerate(layers) if offload.of(number) in computed]
    lent = (
        [layer for number, layer in enumerate(layers) if offload.of(number) == HOST]
        if HOST in computed
        else []
    )
    lent_weight = largest_on_host(header, plan, offload) if HOST in computed else 0
    copies = f16_copies(here, plan)
    scan = recurrent(batch) if any(layer.state for layer in here) else 0
    working = max(
        attention(batch) + copies + max((cache_bytes(layer, plan) for layer in lent), default=0),
        feed_forward(batch, lent_weight),
        behind_experts(batch, copies, scan),
        scan,
        batch.logits + 2 * batch.embedding,
    )
    inputs = masks(here, plan) + _SMALL
    if is_pipelined(offload):
        return working + _PIPELINED * (inputs + 3 * batch.embedding)
    return working + inputs


def is_pipelined(offload: Offload) -> bool:
    """Several GPUs that work on different batches at once have their inputs several times."""
    return len(offload.gpus) > 1 and offload.is_full


def host_compute(header: Header, layers: Sequence[Layer], plan: Plan, offload: Offload) -> int:
    """The buffer in RAM. With a GPU it is that of the inputs: large batches of every layer go to the GPU."""
    batch = batch_of(header, layers, plan)
    inputs = masks(layers, plan) + _SMALL
    if is_pipelined(offload):
        return 10 * batch.embedding + _PIPELINED * inputs + batch.logits
    if offload.gpus:
        return 4 * batch.embedding + inputs + batch.logits
    scan = recurrent(batch) if any(layer.state for layer in layers) else 0
    return batch.embedding + max(attention(batch), feed_forward(batch, 0), scan) + inputs + batch.logits


def attention(batch: Batch) -> int:
    return 4 * batch.embedding + 2 * batch.query if batch.query else 0


def feed_forward(batch: Batch, lent: int) -> int:
    """4E + 3F: the residual, its norm and two more; gate, up and their product.

    Experts have F for each one that a token chose, and E for each as well if that does not fit where gate
    and up were. `lent` is a weight that is brought from RAM for the batch.
    """
    if batch.has_experts:
        return max(_experts(batch) + lent, 4 * batch.embedding + 3 * batch.feed)
    working = 4 * batch.embedding + 3 * batch.feed
    if not lent:
        return working
    return max(working + min(lent, batch.feed), 5 * batch.embedding + 2 * batch.feed + lent)


def _experts(batch: Batch) -> int:
    working = 4 * batch.embedding + 3 * batch.chosen_feed
    return working + (batch.chosen_embedding if batch.chosen_embedding > 2 * batch.chosen_feed else 0)


def behind_experts(batch: Batch, copies: int, scan: int) -> int:
    """4E + 3F, and what the next layer needs in one piece: CUDA's layout only.

    The result of a layer's experts lies in the middle of the buffer, so a large piece finds no place before
    it: the result of attention with its f16 copies, or a scan. Measured on an H100: exact with copies, and
    5 MiB too little of 131 with a scan.
    """
    piece = max(batch.query + copies if copies else 0, scan)
    if not batch.has_experts or not piece:
        return 0
    return 4 * batch.embedding + 3 * batch.chosen_feed + piece


def recurrent(batch: Batch) -> int:
    """A scan over the batch; an allowance, since each family computes it differently."""
    return 4 * batch.embedding + 8 * batch.inner


def masks(layers: Iterable[Layer], plan: Plan) -> int:
    """Who sees whom, in f16: one for all layers with the same number of cells."""
    kinds = {(bool(layer.window), cells_of(layer, plan)) for layer in layers if layer.query}
    return sum(_F16 * cells * plan.tokens for _, cells in kinds)


def f16_copies(layers: Iterable[Layer], plan: Plan) -> int:
    """CUDA's flash attention wants f16: of any other cache, one layer at a time is copied into the buffer."""
    keys, values = plan.cache_type_k != "f16", plan.cache_type_v != "f16"
    return max(
        (
            _F16 * plan.streams * cells_of(layer, plan) * (layer.key * keys + layer.value * values)
            for layer in layers
        ),
        default=0,
    )
