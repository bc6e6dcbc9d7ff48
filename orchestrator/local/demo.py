"""Makes the demo models: half a megabyte of random weights that real llama.cpp loads and chats with.

Dimension 0 of every embedding is one large constant, so column 0 of the output matrix is a bias for each
token. It makes the answers salads of readable words instead of stray bytes; the rest of the weights,
random by the seed, choose among them. For a tool call ask with `tool_choice: required` and a `logit_bias`
of 20 for `<tool_call>` and 40 for `<|end|>`; let text parameters be an `enum`, since free text never ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.core.errors import OrchestratorError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from orchestrator.catalogue.read import Catalogue

    Matrix = NDArray[np.float32]

LAYERS, WIDTH, FEED, HEADS, CONTEXT = 2, 64, 128, 4, 8192
CONSTANT = 4.0
GAIN = 6.5  # about what the last norm makes of the constant

WORDS = (
    "river", "blue", "seven", "quiet", "lamp", "copper", "walks", "under", "moon", "paper", "bird",
    "sings", "slow", "garden", "north", "window",
)  # fmt: skip
MARKERS = ("<tool_call>", "</tool_call>")
END = "<|end|>"
CONTROL = (END, "<|system|>", "<|user|>", "<|assistant|>")

# Tool calls stand without line breaks: the parser that llama.cpp derives from the template needs it so.
TEMPLATE = """\
{%- if tools %}<|system|>
Tools:
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}<|user|>
<tool_response>
{{ message.content }}
</tool_response><|end|>
{% elif message.role == "assistant" %}<|assistant|>
{{ message.content or "" }}
{%- for c in message.tool_calls or [] %}
<tool_call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|end|>
{% else %}<|{{ message.role }}|>
{{ message.content }}<|end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""


class DemoError(OrchestratorError):
    """A demo model could not be made."""


def ensure_demos(catalogue: Catalogue) -> tuple[Path, ...]:
    """Make the catalogue's demo files that are not there yet, and return those made.

    Files of demos that the catalogue already reports as impossible are left out. Raises DemoError.
    """
    hopeless = {
        model.launch.environment.get("MODEL_PATH") for model in catalogue.models.values() if model.problem
    }
    missing = [
        (path, seed)
        for path, seed in catalogue.demos.items()
        if not path.exists() and str(path) not in hopeless
    ]
    for path, seed in missing:
        make_demo(path, seed)
    return tuple(path for path, _ in missing)


def make_demo(path: Path, seed: int) -> None:
    """Write the model of this seed: the same seed gives the same bytes. Raises DemoError.

    The file appears whole or not at all, also when two processes make it at the same time.
    """
    try:
        import gguf
    except ImportError as error:
        raise DemoError(
            "The demo models cannot be made: the package gguf is missing. Install the extra 'local'."
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as folder:
            draft = Path(folder) / path.name
            _write(gguf, draft, seed)
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            draft.replace(path)
    except OSError as error:
        raise DemoError(f"The demo model {path} cannot be written: {error.strerror or error}.") from error


def _write(gguf: Any, path: Path, seed: int) -> None:
    tokens = _tokens()
    writer = gguf.GGUFWriter(str(path), "llama")
    _describe(writer, gguf, tokens, seed)
    for name, data in _tensors(tokens, seed):
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, in byte order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _tokens() -> list[str]:
    """All bytes, the product of the one merge, words with their space, markers, control tokens."""
    bytes_ = _byte_characters()
    space = bytes_[ord(" ")]
    return [*bytes_, "th", *(space + word for word in WORDS), *MARKERS, *CONTROL]


def _describe(writer: Any, gguf: Any, tokens: list[str], seed: int) -> None:
    kind = gguf.TokenType
    plain = len(tokens) - len(MARKERS) - len(CONTROL)
    end = tokens.index(END)
    writer.add_name(f"random-{seed}")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [kind.NORMAL] * plain + [kind.USER_DEFINED] * len(MARKERS) + [kind.CONTROL] * len(CONTROL)
    )
    writer.add_token_merges(["t h"])  # an empty list would be dropped, and the file then refused
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _tensors(tokens: list[str], seed: int) -> Iterator[tuple[str, Matrix]]:
    import numpy as np

    random = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, scale: float) -> Matrix:
        return (scale * random.standard_normal((rows, columns))).astype(np.float32)

    norm = np.ones(WIDTH, np.float32)
    embeddings = matrix(len(tokens), WIDTH, 0.3)
    embeddings[:, 0] = CONSTANT
    output = matrix(len(tokens), WIDTH, 0.3)
    output[:, 0] = np.array(_biases(tokens), np.float32) / GAIN
    yield "token_embd.weight", embeddings
    yield "output.weight", output
    yield "output_norm.weight", norm
    for layer in range(LAYERS):
        yield f"blk.{layer}.attn_norm.weight", norm
        yield f"blk.{layer}.ffn_norm.weight", norm
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            yield f"blk.{layer}.{part}.weight", matrix(WIDTH, WIDTH, 0.05)
        yield f"blk.{layer}.ffn_gate.weight", matrix(FEED, WIDTH, 0.05)
        yield f"blk.{layer}.ffn_up.weight", matrix(FEED, WIDTH, 0.05)
        yield f"blk.{layer}.ffn_down.weight", matrix(WIDTH, FEED, 0.05)


def _biases(tokens: list[str]) -> list[float]:
    """How much each token is wanted: words first, then an end; letters only where a grammar asks."""
    wanted = dict.fromkeys(tokens, -16.0)
    wanted.update(dict.fromkeys("abcdefghijklmnopqrstuvwxyz", -10.0))
    wanted.update(dict.fromkeys('"}]', -6.0))  # so that strings and objects end soon
    space = _byte_characters()[ord(" ")]
    wanted.update(dict.fromkeys((space + word for word in WORDS), 6.0))
    wanted.update({"<tool_call>": -2.0, END: 5.0})  # the first is raised with logit_bias
    return [wanted[token] for token in tokens]
