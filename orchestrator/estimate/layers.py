"""What each layer of a model keeps for a token or a conversation, as far as the header tells.

Architectures are named as in the files. Where the header does not say which layers are windowed or
recurrent, llama.cpp has a rule for each architecture, and the tables here have the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.estimate.gguf_header import Header

MOST_LAYERS = 512

RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
"""No attention at all."""

_BY_HEADS = frozenset({
    "jamba", "granitehybrid", "plamo2", "lfm2", "lfm2moe", "kimi-linear", "kimi-k3", "bailingmoe3",
    "glm5-next", "nemotron_h", "nemotron_h_moe",
})  # fmt: skip
"""Hybrids whose recurrent layers have no heads for keys and values."""

_BY_INTERVAL = frozenset({"qwen3next", "qwen35", "qwen35moe", "qwen4exp", "minimax-01"})
"""Hybrids in which every n-th layer has attention."""

_BOTH = frozenset({"falcon-h1"})
"""Hybrids in which every layer has both."""

HYBRID = _BY_HEADS | _BY_INTERVAL | _BOTH

_GATED = frozenset({"qwen3next", "qwen35", "qwen35moe"})
"""Their queries come with a gate as wide."""

CACHELESS = frozenset({
    "bert", "modern-bert", "nomic-bert", "nomic-bert-moe", "neo-bert", "jina-bert-v2", "jina-bert-v3",
    "eurobert", "gemma-embedding", "wavtokenizer-dec", "dream", "llada", "llada-moe", "rnd1", "clef",
})  # fmt: skip
"""Encoders and diffusion models, which remember nothing."""

UNFAMILIAR = frozenset({
    "deepseek4", "deepseek32", "glm-dsa", "glm5-next", "minimax-m3", "hy_v4", "dots3note", "kimi-k3",
    "qwen4exp",
})  # fmt: skip
"""Those that keep more than is counted here: an index of their own beside the cache."""


@dataclass(frozen=True)
class _Windows:
    """Every `period`-th layer sees everything: the last of each period, or the first."""

    period: int
    first: bool = False
    size: int = 0


_WINDOWS: Mapping[str, _Windows] = {
    "gemma2": _Windows(2), "gemma3": _Windows(6), "gemma3n": _Windows(5), "gpt-oss": _Windows(2),
    "cohere2": _Windows(4), "cohere2moe": _Windows(4, first=True), "llama4": _Windows(4, size=8192),
    "exaone4": _Windows(4), "exaone-moe": _Windows(4, size=128), "olmo2": _Windows(4), "plamo3": _Windows(8),
    "afmoe": _Windows(4), "smallthinker": _Windows(4, first=True), "mellum": _Windows(4),
    "laguna": _Windows(4, first=True), "muse-glimmer": _Windows(4),
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """`key` and `value` are elements for each token; `window` is 0 where the whole context is kept.

    `state` is in f32 elements for each conversation; `query` is the width of all queries together.
    """

    key: int = 0
    value: int = 0
    window: int = 0
    state: int = 0
    query: int = 0


def layers_of(header: Header) -> tuple[Layer, ...]:
    """All layers that are run, in order; those that only predict further tokens (MTP) are not."""
    return tuple(_layer(header, number) for number in range(run_layers(header)))


def all_layers(header: Header) -> int:
    return min(header.of("block_count"), MOST_LAYERS)


def run_layers(header: Header) -> int:
    return max(0, all_layers(header) - header.of("nextn_predict_layers"))


def _layer(header: Header, number: int) -> Layer:
    state = _state(header) if is_recurrent(header, number) else 0
    if not _has_attention(header, number):
        return Layer(state=state)
    window = _window(header, number)
    key, value, query = _widths(header, number, windowed=window > 0)
    if not _has_own_cache(header, number):
        key = value = 0
    return Layer(key, value, window, state, query)


def is_recurrent(header: Header, number: int) -> bool:
    name = header.architecture
    if name in RECURRENT or name in _BOTH:
        return True
    if name in _BY_HEADS:
        headless = header.of_layer("attention.head_count_kv", number, 1) == 0
        # in these a layer without heads may also be a feed-forward one
        return headless and not (
            name.startswith("nemotron") and header.of_layer("feed_forward_length", number, 0)
        )
    if name in _BY_INTERVAL:
        named = header.own("attention.recurrent_layers")
        if isinstance(named, tuple):
            return number < len(named) and bool(named[number])
        return (number + 1) % max(1, header.of("full_attention_interval", 4)) != 0
    return False


def _has_attention(header: Header, number: int) -> bool:
    name = header.architecture
    if name in RECURRENT:
        return False
    if name in _BY_INTERVAL:
        return not is_recurrent(header, number)
    heads = header.of("attention.head_count")
    return header.of_layer("attention.head_count_kv", number, heads) > 0


def _widths(header: Header, number: int, *, windowed: bool) -> tuple[int, int, int]:
    """Elements of keys, values and queries. Latent attention keeps one row for keys and values."""
    heads = header.of_layer("attention.head_count", number, header.of("attention.head_count"))
    shared = header.of_layer("attention.head_count_kv", number, heads)
    width = header.of("embedding_length") // max(1, header.of("attention.head_count"))
    key, value = header.of("attention.key_length", width), header.of("attention.value_length", width)
    if windowed:
        key = header.of("attention.key_length_swa", key)
        value = header.of("attention.value_length_swa", value)
    latent = header.of("attention.key_length_mla")
    if latent and header.of("attention.value_length_mla"):
        return shared * key, 0, heads * (key + latent // 2)  # queries exist as they are and absorbed
    return shared * key, shared * value, heads * key * (2 if header.architecture in _GATED else 1)


def _has_own_cache(header: Header, number: int) -> bool:
    """The last layers of some models look into the caches of earlier ones."""
    if header.architecture in CACHELESS:
        return False
    if header.architecture == "gemma3n":
        return number < 20
    if header.architecture == "gemma4":
        return number < all_layers(header) - header.of("attention.shared_kv_layers")
    return True


def _window(header: Header, number: int) -> int:
    """The tokens that a layer sees; 0: all of them."""
    rule = _WINDOWS.get(header.architecture, _Windows(0))
    size = header.of("attention.sliding_window", rule.size)
    if rule.size == 8192 and size:
        size = rule.size  # llama4's are pieces of this length, whatever the file says
    if header.architecture in ("lfm2", "lfm2moe"):
        return size
    pattern = header.own("attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        return size if number < len(pattern) and pattern[number] else 0
    period = header.of("attention.sliding_window_pattern", rule.period)
    if period < 2:
        return 0
    sees_all = number % period == (0 if rule.first else period - 1)
    return 0 if sees_all else size


def _state(header: Header) -> int:
    """f32 elements that a recurrent layer keeps for one conversation."""
    width, heads = header.of("embedding_length"), header.of_layer("attention.head_count", 0, 0)
    head = header.of("wkv.head_size")
    if head:  # RWKV
        return header.of("token_shift_count", 2) * width + width * head
    kernel = header.of("ssm.conv_kernel")
    if header.of("shortconv.l_cache"):  # LFM2
        return width * (header.of("shortconv.l_cache") - 1)
    head = header.of("kda.head_dim")
    if head:  # Kimi's delta attention
        return 3 * (kernel - 1 if kernel else 3) * heads * head + head * head * heads
    if header.architecture == "minimax-01":
        head = header.of("attention.key_length", width // max(1, heads))
        return head * head * heads
    inner, state = header.of("ssm.inner_size"), header.of("ssm.state_size")
    window = max(0, kernel - 1) * (inner + 2 * header.of("ssm.group_count") * state)
    return window + state * inner
