"""Models and matrices of any shape from seeded random blocks, fast enough to be used in tests.

The default shape is that of a 7B model of the qwen2 architecture: 28 layers, hidden 3584, 28 heads and
4 key/value heads, FFN 18944, vocabulary 152064, 339 tensors. Nothing is quantized: quants are random bytes
and scales are set so that values have the standard deviation `SIGMA`, which keeps a forward pass finite. A
teacher is what the candidate stands for plus noise within each value's step, so that the pair compares as
a model and its quantization do. Values repeat after `TILE_VALUES`, from another start in every tensor.

    python benchmarks/synthetic.py OUT.gguf --layers 2 --scheme Q4_K_M --teacher OUT_FOLDER
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.complete import expected_shapes
from driftscope.artifacts.derive.gguf_metadata import add_hyperparameters, add_vocabulary
from driftscope.artifacts.derive.hf_config import hf_config
from driftscope.artifacts.derive.recipe import SCHEMES, tensor_formats
from driftscope.artifacts.derive.safetensors_file import SafetensorsWriter
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import to_gguf
from driftscope.artifacts.tokenizers.token_types import CONTROL, NORMAL
from driftscope.artifacts.tokenizers.tokenizer import tokenizer_from_vocabulary
from driftscope.artifacts.tokenizers.vocabulary import Vocabulary
from driftscope.errors import InputError
from driftscope.kernels.formats import format_of, row_bytes
from driftscope.kernels.reference import dequantize as reference

SIGMA = 0.02
TILE_VALUES = 1 << 20
"""Values of random blocks that a tensor repeats."""

# Bytes of a block that hold f16 scales: (d, and dmin or m), and how many d the second one is, which puts
# the mean of the values near zero.
_SCALES: dict[str, tuple[int, int | None, float]] = {
    "Q4_0": (0, None, 0.0),
    "Q4_1": (0, 2, -7.5),
    "Q5_0": (0, None, 0.0),
    "Q5_1": (0, 2, -15.5),
    "Q8_0": (0, None, 0.0),
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0.0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0.0),
    "IQ4_NL": (0, None, 0.0),
    "IQ4_XS": (0, None, 0.0),
}
_SAFETENSORS_SHARD = 4_000_000_000


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the qwen2 architecture; the default is a 7B model."""

    layers: int = 28
    hidden: int = 3584
    ffn: int = 18944
    heads: int = 28
    kv_heads: int = 4
    vocab: int = 152064
    context: int = 32768

    @property
    def config(self) -> ModelConfig:
        """The hyperparameters."""
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise InputError(f"synthetic: {self.heads} heads do not divide {self.hidden}, or {self.kv_heads}")
        return ModelConfig(
            architecture="qwen2",
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            intermediate_size=self.ffn,
            vocab_size=self.vocab,
            context_length=self.context,
            rms_norm_eps=1e-6,
            rope_theta=1_000_000.0,
            attention_bias=True,
        )


@dataclass(frozen=True)
class Tile:
    """Random blocks of a format, and values near those that they stand for.

    Attributes:
        blocks: ``uint8[blocks * block_bytes]``.
        teacher: ``float32[values]``, each within half a step of the block's value, rounded to BF16.
    """

    blocks: NDArray[np.uint8]
    teacher: NDArray[np.float32]


def random_matrix(fmt: str, rows: int, columns: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """A stored matrix, ``uint8[rows, row_bytes]``."""
    return _filled(tile(fmt, seed).blocks, 0, rows * row_bytes(fmt, columns)).reshape(rows, -1)


def random_pair(
    teacher: str, candidate: str, rows: int, columns: int, *, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A teacher's matrix (F32, F16 or BF16) and the candidate's, ``uint8[rows, row_bytes]`` each."""
    stored = _stored(tile(candidate, seed).teacher, teacher)
    a = _filled(stored, 0, rows * row_bytes(teacher, columns)).reshape(rows, -1)
    return a, random_matrix(candidate, rows, columns, seed=seed)


def write_candidate(path: Path, shape: Shape = Shape(), *, scheme: str = "Q4_K_M", seed: int = 0) -> None:
    """Write a GGUF file that llama.cpp loads.

    Args:
        path: the file.
        shape: sizes of the model.
        scheme: a mixture of formats (`recipe.SCHEMES`), or the name of a format that all matrices get.
        seed: of the random blocks.
    """
    formats = candidate_formats(shape, scheme)
    _write_gguf(path, shape, formats, formats, scheme, seed)


def write_teacher(
    path: Path,
    shape: Shape = Shape(),
    *,
    dtype: str = "BF16",
    scheme: str = "Q4_K_M",
    seed: int = 0,
    max_shard_bytes: int = _SAFETENSORS_SHARD,
) -> None:
    """Write the teacher of `write_candidate`'s file with the same shape, scheme and seed.

    Args:
        path: a file that ends in ``.gguf``, or a folder for sharded safetensors.
        shape: sizes of the model.
        dtype: ``F32``, ``F16`` or ``BF16``; vectors are F32 in a GGUF file.
        scheme: of the candidate.
        seed: of the candidate.
        max_shard_bytes: size of a safetensors file.
    """
    candidate = candidate_formats(shape, scheme)
    if path.suffix == ".gguf":
        stored = {name: "F32" if fmt == "F32" else dtype for name, fmt in candidate.items()}
        _write_gguf(path, shape, candidate, stored, dtype, seed)
    else:
        _write_safetensors(path, shape, candidate, dtype, seed, max_shard_bytes)


def candidate_formats(shape: Shape, scheme: str) -> dict[str, str]:
    """Canonical name to format of every tensor."""
    shapes = expected_shapes(shape.config)
    if scheme in SCHEMES:
        stored = {_gguf_name(name): dims for name, dims in shapes.items()}
        formats = tensor_formats(
            stored, scheme, architecture="qwen2", n_heads=shape.heads, n_kv_heads=shape.kv_heads
        )
        return {name: formats[_gguf_name(name)] for name in shapes}
    format_of(scheme)
    return {name: scheme if len(dims) > 1 else "F32" for name, dims in shapes.items()}


@cache
def tile(fmt: str, seed: int = 0, values: int = TILE_VALUES) -> Tile:
    """Random blocks; all values are finite.

    Raises:
        InputError: a format that is not made of blocks of integers, and not F32, F16 or BF16 either.
    """
    layout = format_of(fmt)
    random = np.random.Generator(np.random.Philox(key=[seed, layout.ggml_type]))
    if fmt in ("F32", "F16", "BF16"):
        plain = _bf16_exact(random.standard_normal(values, dtype=np.float32) * np.float32(SIGMA))
        return Tile(_stored(plain, fmt), plain)
    if fmt not in _SCALES:
        raise InputError(f"synthetic: no random blocks of {fmt}; expected a float or {', '.join(_SCALES)}")
    n_blocks = values // layout.block_size
    blocks = random.integers(0, 256, (n_blocks, layout.block_bytes), dtype=np.uint8)
    _pair_minima(blocks, fmt)
    at, second, ratio = _SCALES[fmt]
    spread = random.uniform(0.5, 1.5, n_blocks)
    _put_f16(blocks, at, np.ones(n_blocks))
    if second is not None:
        _put_f16(blocks, second, np.full(n_blocks, ratio))
    unit = reference.dequantize(blocks, fmt).std(dtype=np.float64)
    d = spread * (SIGMA / float(unit))
    if second is None:
        d *= random.choice([-1.0, 1.0], n_blocks)  # the quants of most formats lean to one side
    _put_f16(blocks, at, d)
    if second is not None:
        _put_f16(blocks, second, d * ratio)
    _, scales, _, d, _ = reference.unpack(blocks, fmt)
    steps = np.repeat(np.abs(d * scales.astype(np.float32)), layout.sub_block, axis=1)
    noise = (random.random(steps.shape, dtype=np.float32) - np.float32(0.5)) * steps
    teacher = _bf16_exact((reference.dequantize(blocks, fmt) + noise).reshape(-1))
    return Tile(blocks.reshape(-1), teacher)


def _pair_minima(blocks: NDArray[np.uint8], fmt: str) -> None:
    """Make the minimum of every sub-block equal to its scale, so that its values surround zero.

    Scales are kept from zero, where a sub-block would hold one value only.
    """
    if fmt == "Q2_K":
        blocks[:, :16] = (blocks[:, :16] & 7 | 8) * 17
    elif fmt == "Q6_K":
        blocks[:, 192:208] = blocks[:, 192:208] & 63 | 64
    elif fmt in ("Q4_K", "Q5_K"):
        packed = blocks[:, 4:16]  # get_scale_min_k4 in ggml-quants.c
        packed[:, :4] |= 0xA0  # scales from 32 to 63
        packed[:, 4:8] = packed[:, :4]
        packed[:, 8:] = (packed[:, 8:] & 15) * 17


def _put_f16(blocks: NDArray[np.uint8], at: int, values: NDArray[np.float64]) -> None:
    blocks[:, at : at + 2] = values.astype("<f2").view(np.uint8).reshape(-1, 2)


def _bf16_exact(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Finite values rounded to BF16, half to even."""
    bits = values.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


def _stored(values: NDArray[np.float32], dtype: str) -> NDArray[np.uint8]:
    """The bytes of values that BF16 can hold, in a float format."""
    if dtype == "F32":
        return values.view(np.uint8)
    if dtype == "F16":
        return values.astype("<f2").view(np.uint8)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    raise InputError(f"synthetic: a teacher cannot be {dtype}; expected F32, F16 or BF16")


def _filled(tiled: NDArray[np.uint8], start: int, nbytes: int) -> NDArray[np.uint8]:
    """`nbytes` of a tile that is repeated from `start` on."""
    out = np.empty(nbytes, np.uint8)
    done = 0
    for part in _parts(tiled, start, nbytes):
        out[done : done + len(part)] = part
        done += len(part)
    return out


def _parts(tiled: NDArray[np.uint8], start: int, nbytes: int) -> Iterator[NDArray[np.uint8]]:
    while nbytes > 0:
        part = tiled[start : start + nbytes]
        yield part
        nbytes -= len(part)
        start = 0


def _tensor_bytes(
    index: int, name: str, shape: tuple[int, ...], candidate: str, stored: str, seed: int
) -> Iterator[NDArray[np.uint8]]:
    """Slabs of tensor number `index`, which the candidate holds as `candidate` and this file as `stored`."""
    n_values = int(np.prod(shape))
    if len(shape) == 1:
        centre = 0.0 if name.endswith(".bias") else 1.0
        yield _stored(_vector(n_values, centre, index, seed), stored)
        return
    source = tile(candidate, seed)
    layout = format_of(candidate)
    first = index * 40503 % (TILE_VALUES // layout.block_size)
    if stored == candidate:
        nbytes = n_values // layout.block_size * layout.block_bytes
        yield from _parts(source.blocks, first * layout.block_bytes, nbytes)
    else:
        size = format_of(stored).block_bytes
        tiled = _teacher_bytes(candidate, seed, stored)
        yield from _parts(tiled, first * layout.block_size * size, n_values * size)


@cache
def _teacher_bytes(candidate: str, seed: int, stored: str) -> NDArray[np.uint8]:
    return _stored(tile(candidate, seed).teacher, stored)


def _vector(n_values: int, centre: float, index: int, seed: int) -> NDArray[np.float32]:
    """A norm's weight or a bias; BF16 can hold it."""
    random = np.random.Generator(np.random.Philox(key=[seed, 1000 + index]))
    spread = random.standard_normal(n_values, dtype=np.float32) * np.float32(0.1)
    return _bf16_exact(np.float32(centre) + spread)


def _write_gguf(
    path: Path, shape: Shape, candidate: Mapping[str, str], stored: Mapping[str, str], scheme: str, seed: int
) -> None:
    shapes = expected_shapes(shape.config)
    writer = gguf.GGUFWriter(None, "qwen2")
    writer.add_type("model")
    if scheme in SCHEMES:
        writer.add_file_type(SCHEMES[scheme].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_hyperparameters(writer, shape.config, str(path))
    add_vocabulary(writer, vocabulary(shape.vocab))
    for name, dims in shapes.items():
        nbytes = row_bytes(stored[name], dims[-1]) * int(np.prod(dims[:-1]))
        kind = gguf.GGMLQuantizationType[stored[name]]
        writer.add_tensor_info(_gguf_name(name), dims, np.dtype(np.float32), nbytes, kind)
    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        _pad(file, writer.data_alignment)
        for index, (name, dims) in enumerate(shapes.items()):
            for part in _tensor_bytes(index, name, dims, candidate[name], stored[name], seed):
                file.write(part.data)
            _pad(file, writer.data_alignment)
    finally:
        writer.close()


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))


def _write_safetensors(
    folder: Path, shape: Shape, candidate: Mapping[str, str], dtype: str, seed: int, max_shard_bytes: int
) -> None:
    size = format_of(dtype).block_bytes
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, tuple[str, tuple[int, ...], int]]] = [{}]
    index = {name: number for number, name in enumerate(candidate)}
    for name, dims in expected_shapes(shape.config).items():
        nbytes = int(np.prod(dims)) * size
        if shards[-1] and sum(entry[2] for entry in shards[-1].values()) + nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = (dtype, dims, nbytes)
    weight_map = {}
    for number, sizes in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(folder / file, sizes) as writer:
            for name, (_, dims, _) in sizes.items():
                writer.write(_tensor_bytes(index[name], name, dims, candidate[name], dtype, seed))
                weight_map[name] = file
    total = sum(entry[2] for sizes in shards for entry in sizes.values())
    words = vocabulary(shape.vocab)
    described = Artifact(folder, "gguf", shape.config, {})
    documents = {
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": weight_map},
        "config.json": hf_config(described, dtype, words),
    }
    for file, document in documents.items():
        (folder / file).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    tokenizer = tokenizer_from_vocabulary(words, str(folder))
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")


@cache
def vocabulary(size: int) -> Vocabulary:
    """The bytes, one merge, an end of text, and tokens that no text gives."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    fixed = ["<|endoftext|>", *alphabet, "th"]
    if size < len(fixed):
        raise InputError(f"synthetic: a vocabulary of {size} tokens; expected at least {len(fixed)}")
    tokens = (*fixed, *(f"token{index}" for index in range(size - len(fixed))))
    return Vocabulary(
        pre="qwen2",
        tokens=tokens,
        types=(CONTROL,) + (NORMAL,) * (size - 1),
        merges=(("t", "h"),),
        special={"bos_token": 0, "eos_token": 0, "pad_token": 0},
    )


def _gguf_name(name: str) -> str:
    stored = to_gguf(name, "qwen2")
    assert stored is not None
    return stored


def main() -> None:
    """Write a candidate, a teacher or both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="candidate, a GGUF file")
    parser.add_argument("--scheme", default="Q4_K_M", help="a mixture such as Q4_K_M, or one format")
    parser.add_argument("--teacher", type=Path, help="also write its teacher: *.gguf, or a folder")
    parser.add_argument("--teacher-dtype", default="BF16", choices=["F32", "F16", "BF16"])
    parser.add_argument("--seed", type=int, default=0)
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    arguments = parser.parse_args()
    shape = Shape(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Shape)})
    write_candidate(arguments.out, shape, scheme=arguments.scheme, seed=arguments.seed)
    if arguments.teacher:
        write_teacher(
            arguments.teacher,
            shape,
            dtype=arguments.teacher_dtype,
            scheme=arguments.scheme,
            seed=arguments.seed,
        )


if __name__ == "__main__":
    main()
