"""Writing a model as a folder that transformers loads: shards, index, configuration and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.derive.atomic import atomic_folder
from driftscope.artifacts.derive.hf_config import hf_config
from driftscope.artifacts.derive.safetensors_file import SafetensorsWriter
from driftscope.artifacts.derive.source import source_of_copy
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import hf_layout
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.tokenizers.folder_vocabulary import PRE_NAME_KEY
from driftscope.artifacts.tokenizers.stop_tokens import stop_tokens
from driftscope.artifacts.tokenizers.tokenizer import model_folder, tokenizer_from_vocabulary
from driftscope.artifacts.tokenizers.vocabulary import Vocabulary, vocabulary_from_gguf
from driftscope.errors import InputError

MAX_SHARD_BYTES = 500_000_000
VALUE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}

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


@dataclass(frozen=True)
class HfPlan:
    """What a Hugging Face copy of a model will hold.

    Attributes:
        source: the model, with exactly the tensors of the copy.
        layout: name in the copy to the tensors that it holds, in the order of its rows.
    """

    source: Artifact
    layout: Mapping[str, list[TensorRef]]

    def shape(self, stored: str) -> tuple[int, ...]:
        """Shape of a tensor of the copy."""
        parts = self.layout[stored]
        return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def n_elements(self, stored: str) -> int:
        """Values of a tensor of the copy."""
        return sum(part.n_elements for part in self.layout[stored])


def plan_hf(source: Artifact) -> HfPlan:
    """Find out what a Hugging Face copy of a model holds.

    Raises:
        InputError: a tensor is missing, or would be lost.
    """
    source = source_of_copy(source)
    layout = hf_layout(source.tensors, source.config.architecture)
    return HfPlan(
        source, {stored: [source.tensors[name] for name in names] for stored, names in layout.items()}
    )


def write_hf_folder(
    plan: HfPlan,
    folder: Path,
    dtypes: Mapping[str, str],
    encode: Callable[[TensorRef, str], Iterable[NDArray[Any]]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the folder, whole or not at all; memory stays at a few slabs of rows.

    Args:
        plan: what it holds.
        folder: where to put it; an existing folder is replaced.
        dtypes: name in the copy to a key of `VALUE_BYTES`.
        encode: a tensor's rows in canonical order, as values of a dtype, slab by slab.
        max_shard_bytes: a shard is closed before it would exceed this; a larger tensor gets its own.
        progress: called with (bytes written, bytes in all) after each tensor.

    Raises:
        InputError: an unknown architecture, a tokenizer that cannot be read, or no space on the disk.
    """
    if max_shard_bytes < 1:
        raise InputError(f"{folder}: max_shard_bytes is {max_shard_bytes}; expected a positive number")
    source = plan.source
    vocabulary = _vocabulary(source)
    sizes = {stored: plan.n_elements(stored) * VALUE_BYTES[dtypes[stored]] for stored in plan.layout}
    shards = _shards(sizes, max_shard_bytes)
    total = sum(sizes.values())
    done = 0
    with atomic_folder(folder) as partial:
        weight_map = {}
        for number, shard in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            header = {stored: (dtypes[stored], plan.shape(stored), sizes[stored]) for stored in shard}
            with SafetensorsWriter(partial / name, header) as writer:
                for stored in shard:
                    for part in plan.layout[stored]:
                        writer.write(encode(part, dtypes[stored]))
                    weight_map[stored] = name
                    done += sizes[stored]
                    if progress is not None:
                        progress(done, total)
        _write_json(
            partial / _INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
        _write_json(partial / "config.json", hf_config(source, main_float(dtypes, sizes), vocabulary))
        if source.container == "safetensors":
            _copy_companions(model_folder(source), partial)
        elif vocabulary is not None:
            _write_tokenizer(partial, vocabulary, source)


def main_float(dtypes: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    """The dtype among F32, F16 and BF16 that holds the most bytes: what ``config.json`` names."""
    found = {"F32": 0, "F16": 0, "BF16": 0}
    for stored, dtype in dtypes.items():
        if dtype in found:
            found[dtype] += sizes[stored]
    return max(found, key=lambda dtype: found[dtype])


def narrowed(slab: NDArray[np.float32], dtype: str, tensor: TensorRef) -> NDArray[Any]:
    """Values as they are for F32, else as f16 or bf16 bit patterns, refused where that would change one."""
    if dtype == "F32":
        return slab
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


def _vocabulary(source: Artifact) -> Vocabulary | None:
    """The vocabulary in a file's metadata, or None where there is none or it is copied as a file."""
    absent = (None, "none", "no_vocab")
    if source.container == "safetensors" or source.metadata.get("tokenizer.ggml.model") in absent:
        return None
    return vocabulary_from_gguf(source.metadata, source.config.vocab_size, str(source.path))


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """The tensors in canonical order, cut into shards."""
    shards: list[list[str]] = [[]]
    size = 0
    for stored, nbytes in sizes.items():
        if shards[-1] and size + nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(stored)
        size += nbytes
    return shards


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
    ends = stop_tokens(source, tokenizer)
    if not ends <= {vocabulary.special.get("eos_token")}:
        _write_json(folder / "generation_config.json", {"eos_token_id": sorted(ends)})


def _copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer and generation settings, byte for byte."""
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
