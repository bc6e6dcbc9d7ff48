"""Headers without files: what `read_gguf` would say of a model of some shape."""

from orchestrator.estimate.ggml_types import BLOCKS
from orchestrator.estimate.gguf_header import Header, Value
from tests.estimate.shapes import Shape, size_of


def header(
    architecture: str, tensors: dict[str, int] | None = None, vocabulary: int = 1000, **values: Value
) -> Header:
    """`attention__key_length=64` is the key `attention.key_length` of the model's own."""
    metadata = {f"{architecture}.{key.replace('__', '.')}": value for key, value in values.items()}
    lengths = {"tokenizer.ggml.tokens": vocabulary}
    return Header(architecture, metadata, tensors or {}, lengths)


def header_of(shape: Shape) -> Header:
    """As it would be read from the shape's file, which is not written."""
    metadata = {f"{shape.architecture}.{key}": value for key, value in shape.metadata.items()}
    tensors = {name: size_of(dimensions, kind) for name, dimensions, kind in shape.tensors}
    kinds = frozenset(kind for _, dimensions, kind in shape.tensors if len(dimensions) > 1)
    assert kinds <= BLOCKS.keys()
    lengths = {"tokenizer.ggml.tokens": shape.vocabulary}
    return Header(shape.architecture, metadata, tensors, lengths, kinds)  # type: ignore[arg-type]
