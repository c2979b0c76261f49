"""Opening a model of any container."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from driftscope.artifacts.apr.container import MAGIC as APR_MAGIC
from driftscope.artifacts.config import config_from_hf
from driftscope.artifacts.files import (
    check_members,
    is_folder,
    list_folder,
    matches,
    member,
    read_json_object,
    regular_file_size,
)
from driftscope.artifacts.gguf import MAGIC
from driftscope.artifacts.gguf_config import config_from_gguf
from driftscope.artifacts.gguf_split import read_gguf_model
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import GGUF_ARCHITECTURES, gguf_parts, hf_parts
from driftscope.artifacts.parts import assembled, is_known, parts_of
from driftscope.artifacts.rope_factors import with_stored_factors
from driftscope.artifacts.safetensors import (
    FLOAT_DTYPES,
    INDEX,
    StoredTensor,
    read_files,
    read_safetensors,
    read_sharded,
)
from driftscope.artifacts.scaled import scales_beside, with_scale
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.transforms import rope_heads, value_offset
from driftscope.errors import InputError

CONFIG = "config.json"


def open_artifact(
    path: Path | str, *, verified: bool = False, progress: Callable[[int, int], None] | None = None
) -> Artifact:
    """Open a model: read and check its headers, and map its names to the canonical ones.

    What a file holds decides, not what it is called. Whether all tensors of the architecture are there
    is another question: `driftscope.artifacts.complete.check_complete`.

    Args:
        path: a GGUF file or any part of a split one, an .apr file, a folder with one of these or with
            safetensors and ``config.json``, a safetensors file with ``config.json`` beside it, or a pattern
            of the shell that matches the files of one model.
        verified: the checksum that an .apr file ends with has been verified since the file was written;
            otherwise all of the file is read.
        progress: called with (bytes read, bytes in all) while a checksum is verified.

    Raises:
        InputError: missing, of an unknown kind or architecture, truncated, or inconsistent.
    """
    path = Path(path)
    files = matches(path)
    if len(files) > 1:
        return _open_several(path, files)
    path = files[0] if files else path
    if is_folder(path):
        alone = _only_apr_file(path)
        if alone is None:
            return _open_folder(path)
        path = alone
    if regular_file_size(path) >= len(MAGIC):
        try:
            with path.open("rb") as stream:
                start = stream.read(len(MAGIC))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        if start == MAGIC:
            return _open_gguf(path)
        if start == APR_MAGIC:
            from driftscope.artifacts.apr.model import open_apr

            return open_apr(path, verified=verified, progress=progress)
    if path.suffix == ".safetensors":
        return _open_safetensors(path, read_safetensors(path), (), (path,))
    raise InputError(
        f"{path}: neither a GGUF file nor an .apr file (it starts with neither {MAGIC!r} nor {APR_MAGIC!r}) "
        "nor a safetensors file (its name does not end in .safetensors)"
    )


def _open_gguf(path: Path) -> Artifact:
    where = str(path)
    file = read_gguf_model(path)
    config = config_from_gguf(file.metadata, {tensor.name: tensor for tensor in file.tensors}, where)
    architecture = GGUF_ARCHITECTURES[config.architecture]
    tensors: list[TensorRef] = []
    unmapped = []
    for tensor in file.tensors:
        whole = TensorRef(
            name=tensor.name,
            stored_name=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            file=tensor.file,
            offset=tensor.offset,
            nbytes=tensor.nbytes,
        )
        parts = parts_of(whole, gguf_parts(tensor.name, architecture), config)
        heads = {part.name: rope_heads(part.name, architecture, config) for part in parts}
        if not parts or any(heads[part.name] and len(part.shape) != 2 for part in parts):
            unmapped.append(tensor.name)
            continue
        for part in parts:
            n_heads = heads[part.name]
            if n_heads and part.shape[0] % (2 * n_heads):
                raise InputError(
                    f"{where}: {tensor.name} has {part.shape[0]} rows; expected an even number for each of "
                    f"{n_heads} heads"
                )
            offset = value_offset(part.name, architecture)
            tensors.append(replace(part, rope_heads=n_heads, value_offset=offset))
    config = with_stored_factors(config, {tensor.name: tensor for tensor in tensors}, file.metadata, where)
    return assembled(file.path, "gguf", config, tensors, unmapped, file.files, file.metadata)


def _only_apr_file(folder: Path) -> Path | None:
    """The .apr file of a folder that holds one and no other model."""
    models = [file for file in list_folder(folder) if file.suffix in (".apr", ".gguf", ".safetensors")]
    if len(models) != 1 or models[0].suffix != ".apr":
        return None
    return member(folder, models[0].name)


def _open_folder(folder: Path) -> Artifact:
    entries = list_folder(folder)
    if folder / INDEX in entries:
        return _open_safetensors(folder, *read_sharded(folder))
    files = [file for file in entries if file.suffix == ".safetensors"]
    whole = folder / "model.safetensors"
    if whole in files:
        files = [whole]
    gguf = [file for file in entries if file.suffix == ".gguf"]
    if gguf and not files:
        return _open_ggufs(folder, [member(folder, file.name) for file in gguf])
    if len(files) != 1:
        found = f"{len(files)} safetensors files and no {INDEX}" if files else "no safetensors file"
        raise InputError(f"{folder}: {found}; expected a model folder with an index or with one file")
    return _open_safetensors(folder, read_safetensors(member(folder, files[0].name)), (), (files[0],))


def _open_several(pattern: Path, files: list[Path]) -> Artifact:
    """The one model that all files of a pattern are parts of."""
    folder = files[0].parent
    if any(file.parent != folder for file in files):
        raise InputError(f"{pattern}: matches files of several folders; expected one model")
    if all(file.suffix == ".gguf" for file in files):
        return _open_ggufs(pattern, files)
    if not all(file.suffix == ".safetensors" for file in files):
        raise InputError(
            f"{pattern}: matches {len(files)} files, among them {files[0].name} and {files[-1].name}; "
            "expected safetensors files, or the parts of one GGUF model"
        )
    return _open_safetensors(folder, read_files(files), (), tuple(files))


def _open_ggufs(where: Path, files: list[Path]) -> Artifact:
    """The one model that all these GGUF files are parts of."""
    artifact = _open_gguf(files[0])
    others = sorted(set(files) - set(artifact.files))
    if others:
        raise InputError(
            f"{where}: {others[0].name} is no part of the model of {files[0].name}; expected one GGUF model"
        )
    return artifact


def _open_safetensors(
    path: Path, stored: dict[str, StoredTensor], unlisted: Iterable[str], files: tuple[Path, ...]
) -> Artifact:
    folder = path if is_folder(path) else path.parent
    check_members(folder)
    config_file = folder / CONFIG
    document = read_json_object(config_file)
    config = config_from_hf(document, str(config_file))
    tensors: list[TensorRef] = []
    unmapped = list(unlisted)
    scales = scales_beside(stored)
    applied = {scale.name for scale in scales.values()}
    for name, tensor in stored.items():
        parts = tuple(part for part in hf_parts(name) if is_known(part, config))
        if not parts:
            if name not in applied:
                unmapped.append(name)
            continue
        if tensor.dtype not in FLOAT_DTYPES:
            raise InputError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}; expected one of "
                f"{', '.join(FLOAT_DTYPES)}"
            )
        if not tensor.shape or not tensor.nbytes:
            raise InputError(
                f"{tensor.file}: {name} has the shape {list(tensor.shape)}; expected values in it"
            )
        whole = TensorRef(
            name=name,
            stored_name=name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            file=tensor.file,
            offset=tensor.offset,
            nbytes=tensor.nbytes,
        )
        tensors.extend(parts_of(with_scale(whole, scales.get(name), document), parts, config))
    return assembled(path, "safetensors", config, tensors, unmapped, (*files, config_file), document)
