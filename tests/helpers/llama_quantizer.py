"""llama.cpp's own quantizer, which the derived candidates must equal."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import llama_cpp


def quantize_with_llama_cpp(source: Path, target: Path, file_type: int) -> dict[str, gguf.ReaderTensor]:
    """Quantize a GGUF file, and return the tensors of the result by name."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = file_type
    parameters.nthread = 1
    status = llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), ctypes.byref(parameters)
    )
    assert status == 0
    return {tensor.name: tensor for tensor in gguf.GGUFReader(target).tensors}
