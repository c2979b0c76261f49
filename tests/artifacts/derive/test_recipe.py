"""The format of each tensor, against llama.cpp's quantizer."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from tests.helpers.llama_quantizer import quantize_with_llama_cpp
from tests.helpers.tiny_gguf import write_gguf

from driftscope.artifacts.derive.recipe import SCHEMES, gets_more_bits, tensor_formats
from driftscope.errors import InputError

# Rows that fit blocks of 256, rows that fit blocks of 32 only, rows that fit neither, and a mixture.
# hidden, inner, layers, heads, key/value heads
SHAPES = {
    "fits": (256, 512, 9, 4, 2),
    "falls back": (64, 96, 5, 2, 2),
    "mixed": (64, 256, 17, 2, 1),
    "fits no block": (72, 40, 3, 2, 1),
    "70B depth": (256, 32, 80, 8, 1),
}
VOCAB = 32


def _shapes(name: str, architecture: str, *, tied: bool) -> dict[str, tuple[int, ...]]:
    hidden, inner, layers, heads, kv_heads = SHAPES[name]
    kv_rows = hidden // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, hidden)}
    for layer in range(layers):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (hidden,),
            "attn_q.weight": (hidden, hidden),
            "attn_k.weight": (kv_rows, hidden),
            "attn_v.weight": (kv_rows, hidden),
            "attn_output.weight": (hidden, hidden),
            "ffn_norm.weight": (hidden,),
            "ffn_gate.weight": (inner, hidden),
            "ffn_up.weight": (inner, hidden),
            "ffn_down.weight": (hidden, inner),
        }
        if architecture.startswith("gemma"):
            block |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
        if architecture == "phi3":
            del (
                block["attn_q.weight"],
                block["attn_k.weight"],
                block["attn_v.weight"],
                block["ffn_gate.weight"],
            )
            block |= {"attn_qkv.weight": (hidden + 2 * kv_rows, hidden), "ffn_up.weight": (2 * inner, hidden)}
        if architecture == "qwen2":
            block |= {"attn_q.bias": (hidden,), "attn_k.bias": (kv_rows,), "attn_v.bias": (kv_rows,)}
        shapes |= {f"blk.{layer}.{key}": shape for key, shape in block.items()}
    shapes["output_norm.weight"] = (hidden,)
    return shapes if tied else {**shapes, "output.weight": (VOCAB, hidden)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


def _source(folder: Path, name: str, architecture: str, *, tied: bool) -> Path:
    """An F32 file of zeros, made once; the quantizer's choice does not depend on values."""
    path = folder / f"{name}-{architecture}-{tied}.gguf"
    if path.exists():
        return path
    hidden, inner, layers, heads, kv_heads = SHAPES[name]

    def keys(writer: gguf.GGUFWriter) -> None:
        writer.add_block_count(layers)
        writer.add_context_length(64)
        writer.add_embedding_length(hidden)
        writer.add_feed_forward_length(inner)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(VOCAB)

    shapes = _shapes(name, architecture, tied=tied)
    zeros = {key: np.zeros(shape, dtype=np.float32) for key, shape in shapes.items()}
    return write_gguf(path, architecture, zeros, keys=keys)


CASES = [
    *((scheme, "fits", "llama", False) for scheme in SCHEMES),
    *((scheme, "fits", "qwen2", True) for scheme in SCHEMES),
    *((scheme, "falls back", "llama", True) for scheme in SCHEMES),
    *((scheme, "falls back", "qwen2", False) for scheme in SCHEMES),
    *((scheme, "mixed", "llama", True) for scheme in SCHEMES),
    *((scheme, "fits no block", "llama", False) for scheme in SCHEMES),
    *((scheme, "fits", "gemma2", True) for scheme in SCHEMES),
    *((scheme, "fits", "phi3", False) for scheme in SCHEMES),
    *((scheme, "mixed", "phi3", True) for scheme in SCHEMES),
    # A rule of its own for the values of 80 layers, in the mixtures of K formats.
    ("Q4_K_M", "70B depth", "llama", False),
    ("Q4_K_M", "70B depth", "qwen2", True),
    ("Q5_K_M", "70B depth", "llama", False),
]


@pytest.mark.parametrize(("scheme", "name", "architecture", "tied"), CASES)
def test_formats_are_those_of_llama_cpp(
    folder: Path, scheme: str, name: str, architecture: str, tied: bool
) -> None:
    source = _source(folder, name, architecture, tied=tied)
    theirs = quantize_with_llama_cpp(source, folder / "out.gguf", SCHEMES[scheme].file_type)
    _, _, _, heads, kv_heads = SHAPES[name]
    ours = tensor_formats(
        _shapes(name, architecture, tied=tied),
        scheme,
        architecture=architecture,
        n_heads=heads,
        n_kv_heads=kv_heads,
    )
    assert ours == {key: theirs[key].tensor_type.name for key in ours}
    assert ours.keys() == theirs.keys()


def test_more_bits_at_both_ends_and_every_third_between() -> None:
    layers = [layer for layer in range(16) if gets_more_bits(layer, 16)]
    assert layers == [0, 1, 4, 7, 10, 13, 14, 15]


def test_unknown_scheme_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'Q3_K_M' is not supported; expected one of F32, "):
        tensor_formats({}, "Q3_K_M", architecture="llama", n_heads=1, n_kv_heads=1)
