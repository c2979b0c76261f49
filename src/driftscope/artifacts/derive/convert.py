"""A model in another container: safetensors, GGUF or .apr, without loss or with the reader's leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from driftscope.artifacts.derive.apr_file import write_apr
from driftscope.artifacts.derive.kept import write_gguf_copy, write_hf_copy
from driftscope.artifacts.model import Artifact
from driftscope.errors import InputError

CONTAINERS = ("safetensors", "gguf", "apr")


def container_of(destination: Path, stated: str | None) -> str:
    """The container to write: the stated one, or what the destination's name ends in; a folder else.

    Raises:
        InputError: an unknown container, or a single file for safetensors, which needs a folder.
    """
    if stated is not None and stated not in CONTAINERS:
        raise InputError(f"--to {stated}: expected one of {', '.join(CONTAINERS)}")
    if stated is None:
        stated = {".gguf": "gguf", ".apr": "apr"}.get(destination.suffix, "safetensors")
    if stated == "safetensors" and destination.suffix in (".safetensors", ".gguf", ".apr"):
        raise InputError(f"{destination}: a safetensors model is a folder; expected a name without a suffix")
    return stated


def convert(
    source: Artifact,
    destination: Path,
    *,
    to: str | None = None,
    quantize: str | None = None,
    dequantize: bool = False,
    dtype: str | None = None,
    tokenizer: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Write a model in another container, its tensors as they are wherever that can hold them.

    Args:
        source: the model.
        destination: a file, which is replaced where it exists, or for safetensors a new folder.
        to: one of `CONTAINERS`; by default what the destination's name says.
        quantize: format for the matrices of the layers in an .apr file.
        dequantize: tensors in formats that the container lacks are written as F32 with the same values.
        dtype: of all tensors in a safetensors folder, where it holds their values.
        tokenizer: keep the tokenizer in an .apr file.
        progress: called with (work done, work in all) after each tensor.

    Returns:
        The container.

    Raises:
        InputError: the source would be overwritten, an option that the container does not have, or a loss
            that no option permits.
    """
    container = container_of(destination, to)
    if container != "apr" and (quantize is not None or not tokenizer):
        raise InputError(f"--quantize and --no-tokenizer are for .apr files; {container} has neither")
    if container != "safetensors" and dtype is not None:
        raise InputError(f"--dtype is for safetensors; {container} has no such option")
    _check_apart(source, destination, container)
    if container == "apr":
        write_apr(
            source,
            destination,
            quantize=quantize,
            dequantize_rest=dequantize,
            tokenizer=tokenizer,
            progress=progress,
        )
    elif container == "gguf":
        write_gguf_copy(source, destination, dequantize=dequantize, progress=progress)
    else:
        write_hf_copy(source, destination, dequantize=dequantize, dtype=dtype, progress=progress)
    return container


def _check_apart(source: Artifact, destination: Path, container: str) -> None:
    """What is read does not lie where is written, and nothing else than one file is replaced."""
    target = destination.resolve()
    for path in (source.path, *source.files):
        read = path.resolve()
        if read == target or target in read.parents:
            raise InputError(f"{destination}: is where {source.path} is read from; expected another place")
    if destination.is_dir() and container != "safetensors":
        raise InputError(f"{destination}: a folder; expected a file for {container}")
    is_new = not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))
    if container == "safetensors" and not is_new:
        raise InputError(f"{destination}: exists; expected a new or an empty folder")
