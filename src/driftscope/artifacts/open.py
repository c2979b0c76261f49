"""Opening a model of any container."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from driftscope.artifacts.config import config_from_hf
from driftscope.artifacts.files import is_folder, list_folder, read_json_object, regular_file_size
from driftscope.artifacts.gguf import MAGIC, read_gguf
from driftscope.artifacts.gguf_config import config_from_gguf
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import (
    GGUF_ARCHITECTURES,
    INTERLEAVED_ARCHITECTURES,
    ROPE_FREQS,
    canonical_order,
    from_gguf,
    is_canonical,
    layer_of,
)
from driftscope.artifacts.rope_factors import scaling_of_factors
from driftscope.artifacts.safetensors import (
    FLOAT_BYTES,
    INDEX,
    StoredTensor,
    read_safetensors,
    read_sharded,
)
from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError

CONFIG = "config.json"


def open_artifact(path: Path | str) -> Artifact:
    """Open a model: read and check its headers, and map its names to the canonical ones.

    What a file holds decides, not what it is called. Whether all tensors of the architecture are there
    is another question: `driftscope.artifacts.complete.check_complete`.

    Args:
        path: a GGUF file, a folder with safetensors and ``config.json``, or a safetensors file with
            ``config.json`` beside it.

    Raises:
        InputError: missing, of an unknown kind or architecture, truncated, or inconsistent.
    """
    path = Path(path)
    if is_folder(path):
        return _open_folder(path)
    if regular_file_size(path) >= len(MAGIC):
        try:
            with path.open("rb") as stream:
                start = stream.read(len(MAGIC))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        if start == MAGIC:
            return _open_gguf(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path, read_safetensors(path), (), (path,))
    raise InputError(
        f"{path}: neither a GGUF file (it does not start with {MAGIC!r}) nor a safetensors file "
        "(its name does not end in .safetensors)"
    )


def _open_gguf(path: Path) -> Artifact:
    where = str(path)
    file = read_gguf(path)
    config = config_from_gguf(file.metadata, {tensor.name: tensor for tensor in file.tensors}, where)
    interleaved = GGUF_ARCHITECTURES[config.architecture] in INTERLEAVED_ARCHITECTURES
    tensors: list[TensorRef] = []
    unmapped = []
    for tensor in file.tensors:
        name = _known(from_gguf(tensor.name), config)
        heads = _rope_heads(name, config) if name and interleaved else 0
        if name is None or (heads and len(tensor.shape) != 2):
            unmapped.append(tensor.name)
            continue
        if heads and tensor.shape[0] % (2 * heads):
            raise InputError(
                f"{where}: {tensor.name} has {tensor.shape[0]} rows; expected an even number for each of "
                f"{heads} heads"
            )
        tensors.append(
            TensorRef(
                name=name,
                stored_name=tensor.name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                file=path,
                offset=tensor.offset,
                nbytes=tensor.nbytes,
                rope_heads=heads,
            )
        )
    factors = next((tensor for tensor in tensors if tensor.name == ROPE_FREQS), None)
    if factors is not None:
        if config.rope_scaling is not None:
            raise InputError(
                f"{where}: both {ROPE_FREQS} and a RoPE scaling of kind {config.rope_scaling['rope_type']!r}"
            )
        config = replace(config, rope_scaling=scaling_of_factors(factors, config))
    return _artifact(path, "gguf", config, tensors, unmapped, (path,), file.metadata)


def _open_folder(folder: Path) -> Artifact:
    entries = list_folder(folder)
    if folder / INDEX in entries:
        return _open_safetensors(folder, *read_sharded(folder))
    files = [file for file in entries if file.suffix == ".safetensors"]
    whole = folder / "model.safetensors"
    if whole in files:
        files = [whole]
    if len(files) != 1:
        found = f"{len(files)} safetensors files and no {INDEX}" if files else "no safetensors file"
        raise InputError(f"{folder}: {found}; expected a model folder with an index or with one file")
    return _open_safetensors(folder, read_safetensors(files[0]), (), (files[0],))


def _open_safetensors(
    path: Path, stored: dict[str, StoredTensor], unlisted: Iterable[str], files: tuple[Path, ...]
) -> Artifact:
    config_file = (path if is_folder(path) else path.parent) / CONFIG
    document = read_json_object(config_file)
    config = config_from_hf(document, str(config_file))
    tensors: list[TensorRef] = []
    unmapped = list(unlisted)
    for name, tensor in stored.items():
        known = _known(name if is_canonical(name) else None, config)
        if known is None:
            unmapped.append(name)
            continue
        if tensor.dtype not in FLOAT_BYTES:
            raise InputError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}; expected one of {', '.join(FLOAT_BYTES)}"
            )
        if not tensor.shape or not tensor.nbytes:
            raise InputError(
                f"{tensor.file}: {name} has the shape {list(tensor.shape)}; expected values in it"
            )
        tensors.append(
            TensorRef(
                name=name,
                stored_name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                file=tensor.file,
                offset=tensor.offset,
                nbytes=tensor.nbytes,
            )
        )
    return _artifact(path, "safetensors", config, tensors, unmapped, (*files, config_file), document)


def _artifact(
    path: Path,
    container: str,
    config: ModelConfig,
    tensors: list[TensorRef],
    unmapped: list[str],
    files: tuple[Path, ...],
    metadata: dict[str, object],
) -> Artifact:
    ordered = sorted(tensors, key=lambda tensor: canonical_order(tensor.name))
    return Artifact(
        path=path,
        container=container,
        config=config,
        tensors={tensor.name: tensor for tensor in ordered},
        unmapped=tuple(sorted(set(unmapped))),
        files=tuple(sorted(files)),
        metadata=metadata,
    )


def _known(name: str | None, config: ModelConfig) -> str | None:
    """`name`, unless it belongs to a layer that the model does not have."""
    layer = layer_of(name) if name else None
    return None if layer is not None and layer >= config.num_layers else name


def _rope_heads(name: str, config: ModelConfig) -> int:
    """Heads of a projection whose rows are rotated, else 0."""
    if ".q_proj." in name:
        return config.num_heads
    return config.num_kv_heads if ".k_proj." in name else 0
