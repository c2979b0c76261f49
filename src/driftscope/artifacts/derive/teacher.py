"""An exact safetensors copy of a model: the teacher that candidates are measured against."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.derive.atomic import atomic_folder
from driftscope.artifacts.derive.hf_config import hf_config
from driftscope.artifacts.derive.rows import slabs
from driftscope.artifacts.derive.safetensors_file import SafetensorsWriter
from driftscope.artifacts.derive.source import source_of_copy
from driftscope.artifacts.folder_vocabulary import PRE_NAME_KEY
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.tokenizer import model_folder, tokenizer_from_vocabulary
from driftscope.artifacts.vocabulary import Vocabulary, vocabulary_from_gguf
from driftscope.errors import InputError

_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_COPIED = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_INDEX = "model.safetensors.index.json"


def write_teacher(
    source: Artifact,
    folder: Path,
    *,
    dtype: str = "F32",
    max_shard_bytes: int = 500_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a model as a folder that transformers loads.

    Quantized tensors are dequantized in f32 and q/k rows are put back into Hugging Face's order, so that
    with `dtype` ``F32`` every value is exactly what the source stands for. Memory stays at a few slabs
    of rows. The folder appears whole or not at all, and its bytes depend on the source alone.

    Args:
        source: the model to copy.
        folder: where to put it; an existing folder is replaced.
        dtype: ``F32``, or ``F16``/``BF16`` where the source holds nothing that these cannot hold.
        max_shard_bytes: a shard is closed before it would exceed this; a larger tensor gets its own.
        progress: called with (bytes written, bytes in all) after each tensor.

    Raises:
        InputError: an unknown dtype or architecture, a tensor that is missing or would be lost, a tokenizer
            that cannot be read, values that the dtype cannot hold, or no space on the disk.
    """
    if dtype not in _BYTES:
        raise InputError(f"teacher: dtype {dtype!r} is not supported; expected one of {', '.join(_BYTES)}")
    if max_shard_bytes < 1:
        raise InputError(f"teacher: max_shard_bytes is {max_shard_bytes}; expected a positive number")
    source = source_of_copy(source)
    vocabulary = _vocabulary(source)
    shards = _shards(source, dtype, max_shard_bytes)
    total = sum(tensor.n_elements for tensor in source.tensors.values()) * _BYTES[dtype]
    done = 0
    with atomic_folder(folder) as partial:
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            sizes = {t.name: (dtype, t.shape, t.n_elements * _BYTES[dtype]) for t in shard}
            with SafetensorsWriter(partial / name, sizes) as writer:
                for tensor in shard:
                    writer.write(_values(tensor, dtype))
                    weight_map[tensor.name] = name
                    done += sizes[tensor.name][2]
                    if progress is not None:
                        progress(done, total)
        _write_json(
            partial / _INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
        _write_json(partial / "config.json", hf_config(source, dtype, vocabulary))
        if source.container != "gguf":
            _copy_companions(model_folder(source), partial)
        elif vocabulary is not None:
            _write_tokenizer(partial, vocabulary, source)


def _vocabulary(source: Artifact) -> Vocabulary | None:
    """The vocabulary of a GGUF source, or None where there is none or it is copied as a file."""
    if source.container != "gguf" or source.metadata.get("tokenizer.ggml.model") in (
        None,
        "none",
        "no_vocab",
    ):
        return None
    return vocabulary_from_gguf(source.metadata, source.config.vocab_size, str(source.path))


def _shards(source: Artifact, dtype: str, max_shard_bytes: int) -> list[list[TensorRef]]:
    """The tensors in canonical order, cut into shards."""
    shards: list[list[TensorRef]] = [[]]
    size = 0
    for tensor in source.tensors.values():
        nbytes = tensor.n_elements * _BYTES[dtype]
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def _values(tensor: TensorRef, dtype: str) -> Iterator[NDArray[Any]]:
    """The tensor's values in the wanted format, slab by slab, in canonical row order."""
    if tensor.dtype == "F64":
        raise InputError(f"{tensor.file}: {tensor.name} is F64; a teacher holds at most F32")
    for slab in slabs(tensor, tensor.row_order()):
        yield slab if dtype == "F32" else _narrow(slab, dtype, tensor)


def _narrow(slab: NDArray[np.float32], dtype: str, tensor: TensorRef) -> NDArray[Any]:
    """Values as f16 or bf16 bit patterns, refused where that would change one."""
    bits = slab.view(np.uint32)
    if dtype == "F16":
        with np.errstate(over="ignore"):
            half = slab.astype(np.float16)
        exact = bool(np.array_equal(half.astype(np.float32), slab, equal_nan=True))
        result: NDArray[Any] = half
    else:
        exact = not bool(np.any(bits & 0xFFFF))
        result = (bits >> 16).astype(np.uint16)
    if not exact:
        raise InputError(f"{tensor.file}: {tensor.name} has values that {dtype} cannot hold; use F32")
    return result


def _write_tokenizer(folder: Path, vocabulary: Vocabulary, source: Artifact) -> None:
    """tokenizer.json and tokenizer_config.json of a GGUF vocabulary."""
    tokenizer = tokenizer_from_vocabulary(vocabulary, str(source.path))
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.config.context_length,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        **dict(sorted(tokenizer.special.items())),
        PRE_NAME_KEY: vocabulary.pre,
    }
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    _write_json(folder / "tokenizer_config.json", config)


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer and generation settings, byte for byte."""
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
