"""A quantized GGUF copy of a model: the candidate under test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from driftscope.artifacts.derive.quantize import quantize
from driftscope.artifacts.derive.recipe import scheme as look_up
from driftscope.artifacts.derive.recipe import tensor_formats
from driftscope.artifacts.derive.rows import shifted, slabs
from driftscope.artifacts.derive.source import source_of_copy
from driftscope.artifacts.folder_tokenizer import has_tokenizer
from driftscope.artifacts.folder_vocabulary import vocabulary_from_folder
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import gguf_layout
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.tokenizer import model_folder
from driftscope.artifacts.transforms import rope_heads, value_offset
from driftscope.artifacts.vocabulary import Vocabulary, vocabulary_from_gguf
from driftscope.errors import InputError
from driftscope.kernels.formats import row_bytes

_MAX_F16 = 65504.0


def write_candidate(
    teacher: Artifact,
    file: Path,
    *,
    scheme: str = "Q4_K_M",
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model as a quantized GGUF file that llama.cpp loads.

    Each tensor gets the format that llama.cpp's own quantizer gives it (`recipe.tensor_formats`), and what
    GGUF stores in the place of its rows and values (`driftscope.artifacts.transforms.GGUF`). Memory stays
    at a few slabs of rows. The file appears whole or not at all; its bytes depend on the teacher and the
    scheme alone, not on `threads`.

    Args:
        teacher: the model to quantize.
        file: where to put it; an existing file is replaced.
        scheme: a key of `recipe.SCHEMES`.
        threads: threads that quantize.
        progress: called with (values written, values in all) after each tensor.

    Raises:
        InputError: an unknown scheme or architecture, a tensor that is missing or would be lost, a
            hyperparameter or a tokenizer that GGUF cannot hold, a value that is not finite or that the format
            cannot hold, or no space on the disk.
    """
    chosen = look_up(scheme)
    teacher = source_of_copy(teacher)
    architecture = gguf_architecture(teacher)
    check_expressible(teacher.config, str(teacher.path))
    layout = _layout(teacher, architecture)
    divisors = rope_divisors(teacher.config)
    shapes = {
        stored: (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        for stored, parts in layout.items()
    }
    formats = tensor_formats(
        shapes,
        scheme,
        architecture=architecture,
        n_heads=teacher.config.num_heads,
        n_kv_heads=teacher.config.num_kv_heads,
    )
    vocabulary = _vocabulary(teacher)
    total = sum(tensor.n_elements for tensor in teacher.tensors.values())
    done = 0
    with atomic_file(file) as partial:
        writer = gguf.GGUFWriter(None, architecture)
        writer.add_type("model")
        writer.add_file_type(chosen.file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_hyperparameters(writer, teacher.config, str(teacher.path))
        add_vocabulary(writer, vocabulary)
        for name, factors in divisors.items():
            _declare(writer, name, factors.shape, "F32")
        for name, shape in shapes.items():
            _declare(writer, name, shape, formats[name])
        writer.write_header_to_file(partial)
        try:
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            stream = _TensorStream(writer)
            for factors in divisors.values():
                stream.write(iter([factors.view(np.uint8)]))
            for name, parts in layout.items():
                stream.write(
                    slab
                    for part in parts
                    for slab in _quantized(part, teacher.config, architecture, formats[name], threads)
                )
                done += sum(part.n_elements for part in parts)
                if progress is not None:
                    progress(done, total)
        finally:
            writer.close()


class _TensorStream:
    """Tensor data of an open `gguf.GGUFWriter`, in slabs and with the padding between tensors.

    The writer itself takes whole tensors only; an LM head of a 70B model is a gigabyte.
    """

    def __init__(self, writer: gguf.GGUFWriter) -> None:
        assert writer.fout is not None
        self._file = writer.fout[0]
        self._alignment = writer.data_alignment
        self._pad()

    def write(self, slabs: Iterator[NDArray[np.uint8]]) -> None:
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


def _layout(teacher: Artifact, architecture: str) -> dict[str, list[TensorRef]]:
    """GGUF name to the tensors that it holds, in the order of its rows.

    Raises:
        InputError: a tensor that GGUF has no name for; it would be lost.
    """
    try:
        layout = gguf_layout(teacher.tensors, architecture)
    except KeyError as error:
        raise InputError(f"{teacher.path}: tensor {error} has no name in GGUF's {architecture}") from error
    return {stored: [teacher.tensors[name] for name in names] for stored, names in layout.items()}


def _vocabulary(teacher: Artifact) -> Vocabulary | None:
    """The vocabulary of the teacher, or None where it carries none at all."""
    size = teacher.config.vocab_size
    if teacher.container == "gguf":
        if teacher.metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
            return None
        return vocabulary_from_gguf(teacher.metadata, size, str(teacher.path))
    folder = model_folder(teacher)
    return vocabulary_from_folder(folder, size) if has_tokenizer(folder) else None


def _stored_order(tensor: TensorRef, config: ModelConfig, architecture: str) -> NDArray[np.int64] | None:
    """Row of the teacher's file for each row of the candidate's, or None where they are the same.

    Where GGUF interleaves the rows of a head, candidate row ``2 j + s`` is canonical row
    ``s * head_dim / 2 + j`` (`driftscope.artifacts.transforms`).
    """
    canonical = tensor.row_order()
    n_heads = rope_heads(tensor.name, architecture, config)
    if not n_heads:
        return canonical
    half = tensor.n_rows // n_heads // 2
    order = np.arange(tensor.n_rows, dtype=np.int64).reshape(n_heads, 2, half).swapaxes(1, 2).reshape(-1)
    return order if canonical is None else canonical[order]


def _quantized(
    tensor: TensorRef, config: ModelConfig, architecture: str, fmt: str, threads: int
) -> Iterator[NDArray[np.uint8]]:
    order = _stored_order(tensor, config, architecture)
    for slab in shifted(slabs(tensor, order), tensor, value_offset(tensor.name, architecture)):
        if not np.isfinite(slab).all():
            raise InputError(f"{tensor.file}: {tensor.name} holds NaN or infinity, which cannot be quantized")
        if fmt == "F16" and np.abs(slab).max(initial=0.0) > _MAX_F16:
            raise InputError(
                f"{tensor.file}: {tensor.name} holds values beyond {_MAX_F16}, which F16 cannot hold"
            )
        yield quantize(slab, fmt, threads=threads)
