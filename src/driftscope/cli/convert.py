"""The command that writes a model in another container."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from driftscope.cli.options import open_any
from driftscope.cli.show import progress_bar


def convert(
    source: Annotated[Path, typer.Argument(help="a GGUF or .apr file, a safetensors folder, or a manifest")],
    destination: Annotated[Path, typer.Argument(help="what to write: a file, or a folder for safetensors")],
    to: Annotated[
        str | None, typer.Option(help="gguf, safetensors or apr; by default what the destination ends in")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="AprQ4 or AprQ8, for the layers' matrices of an .apr file")
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="write formats that the container lacks as F32")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="F32, F16 or BF16 for all of a safetensors folder, where it is exact")
    ] = None,
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="leave the tokenizer out of an .apr file")
    ] = False,
) -> None:
    """Write a model as safetensors, GGUF or .apr, each tensor as it is; refuse what would lose values."""
    from driftscope.artifacts.derive.convert import convert as write

    artifact = open_any(source)
    with progress_bar("writing") as advance:
        container = write(
            artifact,
            destination,
            to=to,
            quantize=quantize,
            dequantize=dequantize,
            dtype=dtype,
            tokenizer=not no_tokenizer,
            progress=advance,
        )
    typer.echo(f"{destination}: {container}, {len(artifact.tensors)} tensors")
