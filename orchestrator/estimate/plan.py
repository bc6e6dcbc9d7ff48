"""How a model will be run: everything that decides its memory beside its file."""

from __future__ import annotations

from dataclasses import dataclass

ALL_LAYERS = 999


def padded(cells: int) -> int:
    """llama.cpp gives a context in steps of 256 tokens."""
    return -(-cells // 256) * 256


@dataclass(frozen=True)
class Plan:
    """llama.cpp's parameters, as the llama-cpp service passes them: flash attention on, `--fit off`.

    `context_size` is that of all slots together; `unified` says that they share it, else each has its
    part. `n_gpu_layers` beyond the layers there are means all. `split` has each GPU's share of the layers.
    `gpu` is the name of the card, as NVML says it.
    """

    context_size: int
    n_gpu_layers: int = ALL_LAYERS
    parallel: int = 4
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    unified: bool = True
    n_cpu_moe: int = 0
    split: tuple[float, ...] = (1.0,)
    on_gpu: bool = True
    gpu: str | None = None
    prompt_cache_bytes: int = 0
    micro_batch: int = 512

    @property
    def streams(self) -> int:
        """Caches that lie beside each other."""
        return 1 if self.unified else self.parallel

    @property
    def cells(self) -> int:
        """Tokens in each of them."""
        whole = padded(self.context_size)
        return whole if self.unified else padded(whole // self.parallel)

    @property
    def tokens(self) -> int:
        """Tokens that are computed at once."""
        return min(self.cells * self.streams, self.micro_batch)
