"""Writing a model as one GGUF file: what every such file holds, whatever its tensors' formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.derive.atomic import atomic_file
from driftscope.artifacts.derive.gguf_metadata import (
    add_hyperparameters,
    add_vocabulary,
    check_expressible,
    gguf_architecture,
    rope_divisors,
)
from driftscope.artifacts.derive.source import source_of_copy
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import gguf_layout
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.tokenizers.folder_tokenizer import has_tokenizer
from driftscope.artifacts.tokenizers.folder_vocabulary import vocabulary_from_folder
from driftscope.artifacts.tokenizers.tokenizer import model_folder
from driftscope.artifacts.tokenizers.vocabulary import Vocabulary, vocabulary_from_gguf
from driftscope.artifacts.transforms import rope_heads
from driftscope.errors import InputError
from driftscope.kernels.formats import row_bytes

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class GgufPlan:
    """What a GGUF copy of a model will hold.

    Attributes:
        source: the model, with exactly the tensors of the copy.
        architecture: GGUF's name.
        layout: GGUF name to the tensors that it holds, in the order of its rows.
    """

    source: Artifact
    architecture: str
    layout: Mapping[str, list[TensorRef]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """GGUF name to shape."""
        return {
            stored: (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
            for stored, parts in self.layout.items()
        }


def plan_gguf(source: Artifact) -> GgufPlan:
    """Find out what a GGUF copy of a model holds.

    Raises:
        InputError: an unknown architecture, a tensor that is missing or would be lost, or a hyperparameter
            that GGUF cannot hold.
    """
    source = source_of_copy(source)
    architecture = gguf_architecture(source)
    check_expressible(source.config, str(source.path))
    try:
        layout = gguf_layout(source.tensors, architecture)
    except KeyError as error:
        raise InputError(f"{source.path}: tensor {error} has no name in GGUF's {architecture}") from error
    held = {stored: [source.tensors[name] for name in names] for stored, names in layout.items()}
    return GgufPlan(source, architecture, held)


def write_gguf_file(
    plan: GgufPlan,
    file: Path,
    formats: Mapping[str, str],
    file_type: int,
    encode: Callable[[TensorRef, str], Iterable[Bytes]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the file, whole or not at all; memory stays at a few slabs of rows.

    Args:
        plan: what it holds.
        file: where to put it; an existing file is replaced.
        formats: GGUF name to format name.
        file_type: GGUF's ``general.file_type``.
        encode: a tensor's rows in the order of `gguf_order`, as the bytes of a format, slab by slab.
        progress: called with (values written, values in all) after each tensor.

    Raises:
        InputError: a tokenizer that GGUF cannot hold, or no space on the disk.
    """
    config = plan.source.config
    vocabulary = _vocabulary(plan.source)
    divisors = rope_divisors(config)
    total = sum(tensor.n_elements for tensor in plan.source.tensors.values())
    done = 0
    with atomic_file(file) as partial:
        writer = gguf.GGUFWriter(None, plan.architecture)
        writer.add_type("model")
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_hyperparameters(writer, config, str(plan.source.path))
        add_vocabulary(writer, vocabulary)
        for name, factors in divisors.items():
            _declare(writer, name, factors.shape, "F32")
        for name, shape in plan.shapes.items():
            _declare(writer, name, shape, formats[name])
        writer.write_header_to_file(partial)
        try:
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            stream = _TensorStream(writer)
            for factors in divisors.values():
                stream.write([factors.view(np.uint8)])
            for name, parts in plan.layout.items():
                stream.write(slab for part in parts for slab in encode(part, formats[name]))
                done += sum(part.n_elements for part in parts)
                if progress is not None:
                    progress(done, total)
        finally:
            writer.close()


def gguf_order(tensor: TensorRef, config: ModelConfig, architecture: str) -> NDArray[np.int64] | None:
    """Row of the source's file for each row of the copy's, or None where they are the same.

    Where GGUF interleaves the rows of a head, the copy's row ``2 j + s`` is canonical row
    ``s * head_dim / 2 + j`` (`driftscope.artifacts.transforms`).
    """
    canonical = tensor.row_order()
    n_heads = rope_heads(tensor.name, architecture, config)
    if not n_heads:
        return canonical
    half = tensor.n_rows // n_heads // 2
    order = np.arange(tensor.n_rows, dtype=np.int64).reshape(n_heads, 2, half).swapaxes(1, 2).reshape(-1)
    return order if canonical is None else canonical[order]


class _TensorStream:
    """Tensor data of an open `gguf.GGUFWriter`, in slabs and with the padding between tensors.

    The writer itself takes whole tensors only; an LM head of a 70B model is a gigabyte.
    """

    def __init__(self, writer: gguf.GGUFWriter) -> None:
        assert writer.fout is not None
        self._file = writer.fout[0]
        self._alignment = writer.data_alignment
        self._pad()

    def write(self, slabs: Iterable[Bytes]) -> None:
        """Append one tensor."""
        for slab in slabs:
            self._file.write(slab.data)
        self._pad()

    def _pad(self) -> None:
        self._file.write(b"\0" * (-self._file.tell() % self._alignment))


def _declare(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], fmt: str) -> None:
    nbytes = row_bytes(fmt, shape[-1])
    for dim in shape[:-1]:
        nbytes *= dim
    # The numpy dtype matters to the writer only where it is uint8, which would make the shape one of bytes.
    writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, gguf.GGMLQuantizationType[fmt])


def _vocabulary(source: Artifact) -> Vocabulary | None:
    """The vocabulary of the source, or None where it carries none at all."""
    size = source.config.vocab_size
    if source.container != "safetensors":
        if source.metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
            return None
        return vocabulary_from_gguf(source.metadata, size, str(source.path))
    folder = model_folder(source)
    return vocabulary_from_folder(folder, size) if has_tokenizer(folder) else None
