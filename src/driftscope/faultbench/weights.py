"""Faults of a converter or of storage: other tensors than the model has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.names import ROPE_FREQS
from driftscope.faultbench.edited import (
    rows_of,
    values_of,
    with_config,
    with_rows,
    with_tensor,
    with_values,
    without_tensors,
)
from driftscope.faultbench.injection import Injection, Site, from_the_start, outside, within
from driftscope.forward.architecture import SITE_TENSORS, norm_tensor
from driftscope.kernels.formats import format_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

_SCALE_AT = {"Q4_0": 0, "Q4_1": 0, "Q5_0": 0, "Q5_1": 0, "Q8_0": 0, "Q4_K": 0, "Q5_K": 0, "Q6_K": 208}
"""Byte of a block at which its float16 scale begins."""

_QUANTS_AT = {"Q4_0": 2, "Q5_0": 6, "Q8_0": 2, "Q4_K": 16, "Q5_K": 48, "Q6_K": 0}
"""Byte of a block at which its quants begin."""

_LOST_SCALE = 1.0 / 128.0
_HALF_NAN = (0x00, 0x7E)
_SEED = 20


def tensor(layer: int, site: str) -> str:
    """Canonical name of the weight of a matmul site of a layer."""
    return f"model.layers.{layer}.{SITE_TENSORS[site]}.weight"


def interleaved(n_rows: int, heads: int) -> NDArray[np.int64]:
    """Row of the model for each row in GGUF's order: 2j + s of a head is its row s * head_dim / 2 + j."""
    return np.arange(n_rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def wrong_head_count(site: Site) -> int:
    """Twice the key heads: a count that divides the rows, as the query heads' need not."""
    return 2 * site.config.num_kv_heads


def permuted(site: Site, counts: Mapping[str, int]) -> Artifact:
    """Projections with their rows in GGUF's order, taken for so many heads."""
    changed = {}
    for which, heads in counts.items():
        name = tensor(site.layer, which)
        rows = rows_of(site.artifact, name)
        changed[name] = rows[interleaved(rows.shape[0], heads)]
    return with_rows(site.artifact, changed)


def norm_moved(tap: str, by: float) -> Callable[[Site], Artifact]:
    """The weight of the norm that gives a tap plus a constant."""

    def edit(site: Site) -> Artifact:
        full = norm_tensor(site.config, site.layer, tap)
        return with_values(site.artifact, {full: values_of(site.artifact, full) + np.float32(by)})

    return edit


def without_biases(site: Site) -> Artifact:
    """All biases of q, k and v set to zero."""
    names = [name for name in site.artifact.tensors if name.endswith(".bias")]
    return with_values(site.artifact, {name: 0 * values_of(site.artifact, name) for name in names})


def embedding_as_head(site: Site) -> Artifact:
    """The LM head replaced by the embedding."""
    return with_values(site.artifact, {HEAD: values_of(site.artifact, EMBEDDING)})


def untied_head(site: Site) -> Artifact:
    """A tied head replaced by one of its own that was never trained (standard deviation 0.02)."""
    random = np.random.Generator(np.random.Philox(_SEED))
    shape = (site.config.vocab_size, site.config.hidden_size)
    noise = np.float32(0.02) * random.standard_normal(shape, dtype=np.float32)
    return with_tensor(with_config(site.artifact, tie_word_embeddings=False), HEAD, noise)


def exchanged(*pairs: tuple[tuple[int, str], tuple[int, str]]) -> Callable[[Site], Artifact]:
    """Tensors that change places; layers are counted from the site's."""

    def edit(site: Site) -> Artifact:
        changed: dict[str, NDArray[np.uint8]] = {}
        for (la, a), (lb, b) in pairs:
            left, right = tensor(site.layer + la, a), tensor(site.layer + lb, b)
            changed |= _swapped(site.artifact, left, right)
        return with_rows(site.artifact, changed) if _same_formats(site, pairs) else _requantized(site, pairs)

    return edit


def _swapped(artifact: Artifact, left: str, right: str) -> dict[str, NDArray[np.uint8]]:
    return {left: rows_of(artifact, right), right: rows_of(artifact, left)}


_Pairs = Sequence[tuple[tuple[int, str], tuple[int, str]]]


def _same_formats(site: Site, pairs: _Pairs) -> bool:
    refs = site.artifact.tensors
    return all(
        refs[tensor(site.layer + la, a)].dtype == refs[tensor(site.layer + lb, b)].dtype
        for (la, a), (lb, b) in pairs
    )


def _requantized(site: Site, pairs: _Pairs) -> Artifact:
    """The exchange of the teacher's tensors, each quantized to the format of the place that it comes to."""
    changed: dict[str, NDArray[np.float32]] = {}
    for (la, a), (lb, b) in pairs:
        left, right = tensor(site.layer + la, a), tensor(site.layer + lb, b)
        changed |= {left: values_of(site.teacher, right), right: values_of(site.teacher, left)}
    return with_values(site.artifact, changed)


def layers_exchanged(site: Site) -> Artifact:
    """All tensors of the site's layer and of the next change places."""
    here, there = f"model.layers.{site.layer}.", f"model.layers.{site.layer + 1}."
    tensors = {}
    for name, ref in site.artifact.tensors.items():
        other = name.replace(here, there) if name.startswith(here) else name.replace(there, here)
        tensors[name] = site.artifact.tensors[other] if name.startswith((here, there)) else ref
    return Artifact(**{**vars(site.artifact), "tensors": tensors})


def transposed(which: str) -> Callable[[Site], Artifact]:
    """A square projection transposed before it was stored."""

    def edit(site: Site) -> Artifact:
        name = tensor(site.layer, which)
        return with_values(site.artifact, {name: values_of(site.teacher, name).T})

    return edit


def scale_lost(site: Site) -> Artifact:
    """The one scale of a tensor left out: its values stay as they were stored, 128 times too large."""
    name = tensor(site.layer, "down")
    if format_of(site.artifact.tensors[name].dtype).is_integer:
        blocks, at = _blocks(site.artifact, name)
        scale = blocks[:, at : at + 2].copy().view(np.float16)
        blocks[:, at : at + 2] = (scale / np.float16(_LOST_SCALE)).view(np.uint8)
        if site.artifact.tensors[name].dtype in ("Q4_K", "Q5_K"):
            least = blocks[:, 2:4].copy().view(np.float16)
            blocks[:, 2:4] = (least / np.float16(_LOST_SCALE)).view(np.uint8)
        return with_rows(site.artifact, {name: blocks.reshape(site.artifact.tensors[name].shape[0], -1)})
    return with_values(site.artifact, {name: values_of(site.artifact, name) / np.float32(_LOST_SCALE)})


def block_scales_lost(site: Site) -> Artifact:
    """The scale of every block taken for one."""
    name = tensor(site.layer, "down")
    blocks, at = _blocks(site.artifact, name)
    blocks[:, at : at + 2] = np.array([1.0], dtype=np.float16).view(np.uint8)
    return with_rows(site.artifact, {name: blocks.reshape(site.artifact.tensors[name].shape[0], -1)})


def zero_point_moved(site: Site) -> Artifact:
    """Every quant of a tensor one too small."""
    name = tensor(site.layer, "up")
    blocks, _ = _blocks(site.artifact, name)
    # Quants of Q8_0 are at least -127, so that none wraps.
    blocks[:, 2:] = (blocks[:, 2:].view(np.int8) - np.int8(1)).view(np.uint8)
    return with_rows(site.artifact, {name: blocks.reshape(site.artifact.tensors[name].shape[0], -1)})


def one_value(value: float) -> Callable[[Site], Artifact]:
    """One value of a row of ``up_proj`` set; in block formats the scale of its block becomes NaN."""

    def edit(site: Site) -> Artifact:
        name = tensor(site.layer, "up")
        if not format_of(site.artifact.tensors[name].dtype).is_integer:
            values = values_of(site.artifact, name)
            values[_row(values.shape[0]), 3] = value
            return with_values(site.artifact, {name: values})
        rows, at = rows_of(site.artifact, name), _SCALE_AT[site.artifact.tensors[name].dtype]
        rows[_row(rows.shape[0]), at : at + 2] = _HALF_NAN
        return with_rows(site.artifact, {name: rows})

    return edit


def bit_flipped(which: str, bit: int) -> Callable[[Site], Artifact]:
    """One bit of one block flipped: of its scale (``scale``) or of its first byte of quants (``quants``)."""

    def edit(site: Site) -> Artifact:
        name = tensor(site.layer, "up")
        rows, dtype = rows_of(site.artifact, name), site.artifact.tensors[name].dtype
        at = _SCALE_AT[dtype] + bit // 8 if which == "scale" else _QUANTS_AT[dtype]
        rows[_row(rows.shape[0]), at] ^= 1 << (bit % 8)
        return with_rows(site.artifact, {name: rows})

    return edit


def without_factors(site: Site) -> Artifact:
    """RoPE without the divisors of its frequencies."""
    return with_config(without_tensors(site.artifact, {ROPE_FREQS}), rope_scaling=None)


def _row(n_rows: int) -> int:
    return n_rows // 3


def _blocks(artifact: Artifact, name: str) -> tuple[NDArray[np.uint8], int]:
    """A tensor's blocks, ``uint8[n, block_bytes]``, and where in them the scale begins."""
    layout = format_of(artifact.tensors[name].dtype)
    return rows_of(artifact, name).reshape(-1, layout.block_bytes), _SCALE_AT[layout.name]


def no_bias(site: Site) -> str | None:
    """Why a fault of the biases cannot be injected."""
    return None if site.config.attention_bias else "the model has no biases"


def not_square(which: str) -> Callable[[Site], str | None]:
    """Why a projection cannot be transposed in place."""

    def reason(site: Site) -> str | None:
        shape = site.artifact.tensors[tensor(site.layer, which)].shape
        return None if shape[0] == shape[1] else f"{which}_proj is {shape[0]}x{shape[1]}, not square"

    return reason


def tied(site: Site) -> str | None:
    """Why the head cannot be replaced by the embedding."""
    return "the head is the embedding already" if site.config.tie_word_embeddings else None


def untied(site: Site) -> str | None:
    """Why a tied head cannot be untied."""
    return None if site.config.tie_word_embeddings else "the head is not tied"


def stored_as(which: str, formats: Sequence[str]) -> Callable[[Site], str | None]:
    """Why a fault of certain block formats cannot be injected."""

    def reason(site: Site) -> str | None:
        dtype = site.artifact.tensors[tensor(site.layer, which)].dtype
        return (
            None if dtype in formats else f"{which}_proj is {dtype}; the fault is one of {', '.join(formats)}"
        )

    return reason


def no_group(site: Site) -> str | None:
    """Why a wrong head count cannot be told from the right one."""
    return None if site.config.num_heads != site.config.num_kv_heads else "every head has its own keys"


def _both(site: Site) -> dict[str, int]:
    return {"q": site.config.num_heads, "k": site.config.num_kv_heads}


_W = "weights"
_INTEGER = tuple(_SCALE_AT)

INJECTIONS = (
    Injection(
        "F01",
        "rows-of-q-and-k",
        _W,
        "rows of q and k in GGUF's interleaved order, not put back",
        within("qkv_matmul", "q"),
        ("row-permutation",),
        artifact=lambda site: permuted(site, _both(site)),
    ),
    Injection(
        "F02",
        "rows-of-k",
        _W,
        "rows of k permuted for twice as many heads as it has",
        within("qkv_matmul", "k"),
        ("row-permutation-heads", "row-permutation"),
        unless=no_group,
        artifact=lambda site: permuted(site, {"k": wrong_head_count(site)}),
    ),
    Injection(
        "F04",
        "attention-norm-less-one",
        _W,
        "one taken off the weight of the norm before attention",
        within("attn_norm"),
        ("norm-offset",),
        artifact=norm_moved("attn_norm", -1.0),
    ),
    Injection(
        "F04",
        "mlp-norm-plus-one",
        _W,
        "one added to the weight of the norm before the MLP",
        within("ffn_norm"),
        ("norm-offset",),
        artifact=norm_moved("ffn_norm", 1.0),
    ),
    Injection(
        "F04",
        "final-norm-plus-one",
        _W,
        "one added to the weight of the last norm",
        outside("final_norm"),
        ("norm-offset",),
        artifact=norm_moved("final_norm", 1.0),
        regimes=("short",),
    ),
    Injection(
        "F05",
        "biases-zero",
        _W,
        "biases of q, k and v set to zero in every layer",
        from_the_start("qkv_bias", "q"),
        ("bias-dropped",),
        unless=no_bias,
        artifact=without_biases,
    ),
    Injection(
        "F06",
        "embedding-as-head",
        _W,
        "the LM head replaced by the embedding",
        outside("lm_head"),
        ("head-tie",),
        unless=tied,
        artifact=embedding_as_head,
    ),
    Injection(
        "F06",
        "head-of-its-own",
        _W,
        "a tied head replaced by one that was never trained",
        outside("lm_head"),
        ("head-tie",),
        unless=untied,
        artifact=untied_head,
        regimes=("short",),
    ),
    Injection(
        "F08",
        "gate-and-up",
        _W,
        "gate_proj and up_proj exchanged",
        within("ffn_gate"),
        ("gate-up-swapped",),
        artifact=exchanged(((0, "gate"), (0, "up"))),
    ),
    Injection(
        "F09",
        "v-transposed",
        _W,
        "v_proj transposed",
        within("qkv_matmul", "v"),
        ("transposed",),
        unless=not_square("v"),
        artifact=transposed("v"),
    ),
    Injection(
        "F09",
        "o-transposed",
        _W,
        "o_proj transposed",
        within("attn_out"),
        ("transposed",),
        unless=not_square("o"),
        artifact=transposed("o"),
    ),
    Injection(
        "F12",
        "tensor-scale",
        _W,
        "the scale of down_proj (1/128) dropped",
        within("ffn_out"),
        ("scale-dropped", "output-scale"),
        artifact=scale_lost,
    ),
    Injection(
        "F12",
        "block-scales",
        _W,
        "the scale of every block of down_proj taken for one",
        within("ffn_out"),
        ("scale-dropped",),
        unless=stored_as("down", _INTEGER),
        artifact=block_scales_lost,
        regimes=("short",),
    ),
    Injection(
        "F13",
        "quants-less-one",
        _W,
        "the zero point of up_proj off by one",
        within("ffn_up"),
        ("zero-point",),
        unless=stored_as("up", ("Q8_0",)),
        artifact=zero_point_moved,
    ),
    Injection(
        "F33",
        "down-of-two-layers",
        _W,
        "down_proj of two neighbouring layers exchanged",
        within("ffn_out"),
        ("other-layer",),
        artifact=exchanged(((0, "down"), (1, "down"))),
    ),
    Injection(
        "F33",
        "two-layers",
        _W,
        "all tensors of two neighbouring layers exchanged",
        within("attn_norm"),
        ("other-layer",),
        artifact=layers_exchanged,
        regimes=("short",),
    ),
    Injection(
        "F34",
        "nan",
        _W,
        "one NaN in a row of up_proj",
        within("ffn_up"),
        ("non-finite",),
        artifact=one_value(float("nan")),
        regimes=("short",),
    ),
    Injection(
        "F34",
        "infinity",
        _W,
        "one infinity in a row of up_proj",
        within("ffn_up"),
        ("non-finite",),
        artifact=one_value(float("inf")),
        regimes=("short",),
        unless=stored_as("up", ("F32", "F16", "BF16")),
    ),
    Injection(
        "F35",
        "scale-bit-high",
        _W,
        "the highest exponent bit of one block's scale flipped",
        within("ffn_up"),
        ("corrupt-block",),
        unless=stored_as("up", _INTEGER),
        artifact=bit_flipped("scale", 14),
        regimes=("short",),
    ),
    Injection(
        "F35",
        "scale-bit-middle",
        _W,
        "the lowest exponent bit of one block's scale flipped",
        within("ffn_up"),
        ("corrupt-block",),
        unless=stored_as("up", _INTEGER),
        artifact=bit_flipped("scale", 10),
        regimes=("short",),
    ),
    Injection(
        "F35",
        "quant-bit-high",
        _W,
        "the high bit of one quant flipped",
        within("ffn_up"),
        ("corrupt-block",),
        unless=stored_as("up", _INTEGER),
        artifact=bit_flipped("quants", 3),
        regimes=("short",),
    ),
    Injection(
        "F35",
        "quant-bit-low",
        _W,
        "the low bit of one quant flipped",
        within("ffn_up"),
        ("corrupt-block",),
        unless=stored_as("up", _INTEGER),
        artifact=bit_flipped("quants", 0),
        regimes=("short",),
    ),
)
"""What can be wrong with the tensors. Formats are kept: a change of values is quantized again."""
