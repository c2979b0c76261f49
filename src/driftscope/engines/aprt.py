"""Stage files of ``apr trace --save-tensor``, converted into a trace.

A file is ``APRT``, the layer as little-endian ``uint32`` (0xFFFFFFFF for the whole model), the number of
values as little-endian ``uint32``, and that many little-endian ``float32``. Stages of a layer, and the
embedding as one of layer 0, lie in ``layer-<N>/<stage>.bin``; ``final_norm`` and ``lm_head`` beside those
folders. A file says neither its token ids nor its shape, so that all tokens of few channels and the last
token of many look alike: the model's hyperparameters, or the caller, must tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.files import is_folder, list_folder, regular_file_size
from driftscope.engines.trace import RAGGED, Trace, TraceManifest, TraceWriter
from driftscope.errors import InputError
from driftscope.forward.architecture import Op, embedding_op, head_ops, layer_ops, tap_name
from driftscope.forward.batch import TokenBatch
from driftscope.forward.policy import WHOLE_MODEL

if TYPE_CHECKING:
    from driftscope.artifacts.model import ModelConfig
    from driftscope.forward.arithmetic import Arithmetic

F32 = NDArray[np.float32]

_MAGIC, _HEADER_BYTES, _NO_LAYER = b"APRT", 12, 0xFFFFFFFF
_LAYER = re.compile(r"layer-(0|[1-9][0-9]{0,4})")
_ABOVE = ("embedding", "final_norm", "lm_head")
_LAST_ONLY = "it was saved of the last token only"

STAGES: Mapping[str, str] = {
    **{
        tap: tap for tap in ("embedding", "attn_norm", "qkv_matmul", "qkv_bias", "q_post_rope", "k_post_rope")
    },
    **{tap: tap for tap in ("attn_scores", "attn_softmax", "attention", "attn_out", "post_attn_residual")},
    **{tap: tap for tap in ("ffn_norm", "ffn_gate", "ffn_up", "ffn_silu", "ffn_swiglu", "ffn_out")},
    **{tap: tap for tap in ("post_ffn_residual", "final_norm", "lm_head")},
    "ffn_swigl": "ffn_swiglu",
}
"""Stage, as its file is called, to tap."""


@dataclass(frozen=True)
class _StageFile:
    layer: int
    tap: str
    path: Path
    count: int

    def values(self) -> F32:
        try:
            found = np.fromfile(self.path, dtype="<f4", count=self.count, offset=_HEADER_BYTES)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        if found.size != self.count:
            raise InputError(f"{self.path}: has become shorter while it was read")
        return found.astype(np.float32, copy=False)


def convert_aprt(
    folder: Path,
    ids: Sequence[int],
    out: Path,
    *,
    config: ModelConfig | None = None,
    all_tokens: bool = False,
    prompt: str = "prompt",
    arithmetic: Arithmetic | None = None,
) -> Trace:
    """Convert the stage files of one run into a trace.

    Scores and softmax are taken to lie as ``[heads, queries, keys]``, everything else a row a token. A stage
    that was saved of the last token only, as apr does with the logits, is left out, and the manifest says so:
    a trace is of all tokens, because figures over one token and over all of them are not comparable.

    Args:
        folder: holds ``layer-<N>/<stage>.bin`` and ``<stage>.bin``.
        ids: the token ids of the run.
        out: where the trace is written.
        config: hyperparameters of the model (`driftscope.artifacts.open.open_artifact`), which tell the two
            layouts apart.
        all_tokens: the caller vouches that every stage but the logits holds all tokens; for use without
            `config`.
        prompt: the prompt's id.
        arithmetic: what it was computed in, where that is known.

    Raises:
        InputError: no stage files, a malformed one, one whose layer is not that of its path, a number of
            values that does not fit `ids`, only last tokens, or layouts that cannot be told apart.
    """
    batch = TokenBatch.of([ids])
    length = batch.n_tokens
    if config is not None and int(batch.ids.max()) >= config.vocab_size:
        raise InputError(
            f"{folder}: token id {int(batch.ids.max())} is outside of the vocabulary of "
            f"{config.vocab_size} tokens"
        )
    files = list(_stage_files(folder))
    if not files:
        raise InputError(
            f"{folder}: no stage files; expected layer-<N>/<stage>.bin of apr trace --save-tensor"
        )
    if config is None and length > 1 and not all_tokens:
        raise InputError(
            f"{folder}: {files[0].count} values of {files[0].path.stem} may be those of {length} tokens or "
            "of the last one; give the model's hyperparameters, or say that all tokens were saved"
        )
    ops = _ops(config)
    whole = [file for file in files if _holds_all(file, length, ops, config)]
    if not whole:
        raise InputError(
            f"{folder}: every stage holds the last of {length} tokens only, and a trace is of all tokens: "
            "figures over one token and over all of them are not comparable"
        )
    writer = TraceWriter(out)
    for layer in sorted({file.layer for file in whole}):
        arrays = {
            f"{tap_name(layer, file.tap)}[{prompt}]": _shaped(file, length)
            for file in whole
            if file.layer == layer
        }
        writer.write("whole" if layer == WHOLE_MODEL else f"layer-{layer:03d}", arrays)
    absent: dict[str, list[int]] = {}
    for file in files:
        if file not in whole:
            absent.setdefault(file.tap, []).append(file.layer)
    seen = {file.tap for file in whole}
    return writer.finish(
        TraceManifest(
            prompts=((prompt, tuple(batch.ids.tolist())),),
            engine={"name": "apr", "options": {"command": "apr trace --save-tensor"}},
            model={} if config is None else {"architecture": config.architecture},
            arithmetic=arithmetic,
            capture_points={tap: op.capture_point for tap, op in ops.items() if tap in seen},
            absent={
                tap: _LAST_ONLY + (f" (layers {', '.join(map(str, layers))})" if tap in seen else "")
                for tap, layers in absent.items()
            },
        )
    )


def _stage_files(folder: Path) -> Iterator[_StageFile]:
    """The stage files of a folder, their headers checked; a tap of one layer at most once."""
    seen: dict[tuple[int, str], Path] = {}
    for path in list_folder(folder):
        inner, number = [path], None
        if path.name.startswith("layer-"):
            match = _LAYER.fullmatch(path.name)
            if match is None or not is_folder(path):
                raise InputError(f"{path}: expected a folder layer-<N>")
            inner, number = list_folder(path), int(match[1])
        for file in inner:
            if file.suffix != ".bin":
                continue
            found = _stage_file(file, number)
            if (found.layer, found.tap) in seen:
                raise InputError(f"{file}: the same stage is in {seen[found.layer, found.tap]}")
            seen[found.layer, found.tap] = file
            yield found


def _stage_file(path: Path, number: int | None) -> _StageFile:
    """Check one file, which lies in the folder of layer `number` or in none."""
    tap = STAGES.get(path.stem)
    if tap is None:
        raise InputError(f"{path}: the stage is unknown; expected one of {', '.join(STAGES)}")
    size = regular_file_size(path)
    try:
        with path.open("rb") as stream:
            header = stream.read(_HEADER_BYTES)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(header) < _HEADER_BYTES or header[:4] != _MAGIC:
        raise InputError(f"{path}: not a stage file; expected {_MAGIC.decode()} and a header of 12 bytes")
    layer, count = (int.from_bytes(header[at : at + 4], "little") for at in (4, 8))
    if not count or size != _HEADER_BYTES + 4 * count:
        raise InputError(
            f"{path}: {count} values take {_HEADER_BYTES + 4 * count} bytes, but the file has {size}; "
            "expected one value or more and no other bytes"
        )
    if layer != (_NO_LAYER if number is None else number):
        said = "the whole model" if layer == _NO_LAYER else f"layer {layer}"
        raise InputError(f"{path}: the header says {said}, which is not where the file lies")
    above = number is None or (tap == "embedding" and number == 0)
    if above != (tap in _ABOVE):
        raise InputError(f"{path}: {path.stem} is not looked for there; expected layer-<N>/<stage>.bin")
    return _StageFile(WHOLE_MODEL if above else layer, tap, path, count)


def _ops(config: ModelConfig | None) -> dict[str, Op]:
    if config is None:
        return {}
    return {op.tap: op for op in (embedding_op(config), *layer_ops(config), *head_ops(config))}


def _holds_all(file: _StageFile, length: int, ops: Mapping[str, Op], config: ModelConfig | None) -> bool:
    """Whether a file holds all tokens, and not the last one only."""
    step = length * length if file.tap in RAGGED else length
    if config is None:
        # Logits are of the last token wherever apr or its reference scripts write them.
        if file.tap == "lm_head" and length > 1:
            return False
        if file.count % step:
            raise InputError(
                f"{file.path}: {file.count} values are not those of {length} tokens; "
                f"expected a multiple of {step}"
            )
        return True
    if file.layer >= config.num_layers:
        raise InputError(f"{file.path}: layer {file.layer} of a model of {config.num_layers} layers")
    channels = config.num_heads if file.tap in RAGGED else ops[file.tap].channels
    last = channels * step // length
    if file.count not in (channels * step, last):
        raise InputError(
            f"{file.path}: {file.count} values; expected {channels * step} for {length} tokens or {last} for "
            "the last one"
        )
    return file.count == channels * step


def _shaped(file: _StageFile, length: int) -> F32:
    shape = (-1, length, length) if file.tap in RAGGED else (length, -1)
    return file.values().reshape(shape)
