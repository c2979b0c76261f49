"""The storage formats of weights, by their ggml names; those that ggml lacks, by their safetensors names."""

from __future__ import annotations

from dataclasses import dataclass

from driftscope.errors import InputError


@dataclass(frozen=True)
class BlockFormat:
    """How a row of values is laid out in bytes, and how ggml multiplies with it.

    Attributes:
        name: ggml's name, e.g. ``Q4_K``, or safetensors' for floats of eight bits, e.g. ``F8_E4M3``.
        ggml_type: ggml's number of the type (``enum ggml_type``); negative where it has none.
        block_size: values in a block; a row is a whole number of blocks.
        block_bytes: bytes of a block.
        activation: activation format that ggml's CPU backend converts the other factor to
            (``vec_dot_type`` in ggml-cpu.c); ``none`` where it stays f32.
        sub_block: values that share one integer scale; 0 for formats that are not blocks of integers.
        offset: what is done to ``(d * scale) * quant``: ``none``, ``subtract`` (super-blocks with a
            minimum: minus ``dmin * min``) or ``add`` (Q4_1, Q5_1: plus the block's ``m``).
        native: whether `driftscope.kernels` computes it; other types are read through the gguf package.
    """

    name: str
    ggml_type: int
    block_size: int
    block_bytes: int
    activation: str
    sub_block: int = 0
    offset: str = "none"
    native: bool = True

    @property
    def is_integer(self) -> bool:
        """Whether a row unpacks into small integers and scales (`driftscope.kernels.unpack`)."""
        return self.sub_block > 0


def _other(name: str, ggml_type: int, block_size: int, block_bytes: int) -> BlockFormat:
    return BlockFormat(name, ggml_type, block_size, block_bytes, "none", native=False)


FORMATS: dict[str, BlockFormat] = {
    item.name: item
    for item in (
        BlockFormat("F32", 0, 1, 4, "none"),
        BlockFormat("F16", 1, 1, 2, "f16"),
        BlockFormat("BF16", 30, 1, 2, "bf16"),
        BlockFormat("F64", 28, 1, 8, "none"),
        BlockFormat("Q4_0", 2, 32, 18, "q8_0", 32),
        BlockFormat("Q4_1", 3, 32, 20, "q8_1", 32, "add"),
        BlockFormat("Q5_0", 6, 32, 22, "q8_0", 32),
        BlockFormat("Q5_1", 7, 32, 24, "q8_1", 32, "add"),
        BlockFormat("Q8_0", 8, 32, 34, "q8_0", 32),
        BlockFormat("Q2_K", 10, 256, 84, "q8_K", 16, "subtract"),
        BlockFormat("Q3_K", 11, 256, 110, "q8_K", 16),
        BlockFormat("Q4_K", 12, 256, 144, "q8_K", 32, "subtract"),
        BlockFormat("Q5_K", 13, 256, 176, "q8_K", 32, "subtract"),
        BlockFormat("Q6_K", 14, 256, 210, "q8_K", 16),
        # ggml has no dot product with Q8_K weights; q8_K is the natural partner.
        BlockFormat("Q8_K", 15, 256, 292, "q8_K", 32),
        BlockFormat("IQ4_NL", 20, 32, 18, "q8_0", 32),
        BlockFormat("IQ4_XS", 23, 256, 136, "q8_K", 32),
        BlockFormat("MXFP4", 39, 32, 17, "q8_0", 32),
        _other("IQ2_XXS", 16, 256, 66),
        _other("IQ2_XS", 17, 256, 74),
        _other("IQ3_XXS", 18, 256, 98),
        _other("IQ1_S", 19, 256, 50),
        _other("IQ3_S", 21, 256, 110),
        _other("IQ2_S", 22, 256, 82),
        _other("IQ1_M", 29, 256, 56),
        _other("TQ1_0", 34, 256, 54),
        _other("TQ2_0", 35, 256, 66),
        _other("NVFP4", 40, 64, 36),
        BlockFormat("F8_E4M3", -1, 1, 1, "none"),
        BlockFormat("F8_E5M2", -2, 1, 1, "none"),
        BlockFormat("F8_E4M3FNUZ", -3, 1, 1, "none"),
        BlockFormat("F8_E5M2FNUZ", -4, 1, 1, "none"),
        BlockFormat("F8_E8M0", -5, 1, 1, "none"),
    )
}

# Formats that files hold and whose values nothing here turns into weights: integers, ggml's intermediate
# format of activations, and types that the gguf package knows by name only.
UNDECODED: tuple[str, ...] = ("I8", "I16", "I32", "I64", "Q8_1", "Q1_0", "Q2_0")


def format_of(name: str) -> BlockFormat:
    """The format called `name`; `InputError` where there is none, or none whose values can be read."""
    try:
        return FORMATS[name]
    except KeyError:
        if name in UNDECODED:
            raise InputError(
                f"values of the format {name} cannot be read as weights: neither driftscope nor the gguf "
                "package decodes it"
            ) from None
        raise InputError(f"tensor format {name!r} is not known; known are {', '.join(FORMATS)}") from None


def decoder_of(name: str) -> str:
    """What dequantizes the format: ``native``, the kernels here, or ``gguf``, the gguf package."""
    return "native" if format_of(name).native else "gguf"


def row_bytes(name: str, n_columns: int) -> int:
    """Bytes of a row of `n_columns` values; `InputError` where they are not a whole number of blocks."""
    layout = format_of(name)
    if n_columns % layout.block_size:
        raise InputError(
            f"a row of {n_columns} values cannot be {name}: expected a multiple of {layout.block_size} values"
        )
    return n_columns // layout.block_size * layout.block_bytes


def row_columns(name: str, n_bytes: int) -> int:
    """Values in a row of `n_bytes` bytes; `InputError` where they are not a whole number of blocks."""
    layout = format_of(name)
    if n_bytes % layout.block_bytes:
        raise InputError(
            f"a row of {n_bytes} bytes cannot be {name}: expected a multiple of {layout.block_bytes} bytes"
        )
    return n_bytes // layout.block_bytes * layout.block_size
