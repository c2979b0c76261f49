"""Planted faults of projections are called by their names, with quantization noise on top as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.analysis.explanations.planted import F32, LAYER, artifact, at, edited, explained, quantized

from driftscope.forward.model import ForwardPass
from driftscope.kernels.dequantize import dequantize

MODELS = ("llama", "qwen2")
NOISE = (("f32", None), ("int8-dot", "Q4_K_M"))
"""Hidden size 256 and up, so that Q4_K_M has blocks to quantize."""

WIDE = {"hidden_size": 256, "intermediate_size": 512}


def weight(forward: ForwardPass, name: str) -> F32:
    """A matrix in Hugging Face's order."""
    found: Any = forward._weights["model"].artifact.tensors[name]
    raw, order = found.raw(), found.row_order()
    return dequantize(np.ascontiguousarray(raw if order is None else raw[order]), found.dtype)


def gguf_rows(rows: int, heads: int) -> NDArray[np.int64]:
    """Where llama.cpp's converter takes each of its rows from."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


class Swapped(ForwardPass):
    def project(self, layer: int, site: str, x: F32) -> F32:
        if at(layer) and site in ("gate", "up"):
            site = "up" if site == "gate" else "gate"
        return super().project(layer, site, x)


class FromOtherLayer(ForwardPass):
    def project(self, layer: int, site: str, x: F32) -> F32:
        return super().project(0 if at(layer) else layer, site, x)


class Stored(ForwardPass):
    heads = "right"

    def project(self, layer: int, site: str, x: F32) -> F32:
        y = super().project(layer, site, x)
        if at(layer) and site in ("q", "k"):
            right = self.config.num_heads if site == "q" else self.config.num_kv_heads
            heads = right if self.heads == "right" else self.config.num_heads
            y = np.ascontiguousarray(y[:, gguf_rows(y.shape[1], heads)])
        return y


class TakenApart(ForwardPass):
    def project(self, layer: int, site: str, x: F32) -> F32:
        y = super().project(layer, site, x)
        if at(layer) and site in ("q", "k"):
            heads = self.config.num_heads if site == "q" else self.config.num_kv_heads
            y = np.ascontiguousarray(y[:, np.argsort(gguf_rows(y.shape[1], heads))])
        return y


class StoredOverWrongHeads(Stored):
    heads = "wrong"


class Unbiased(ForwardPass):
    def biased(self, layer: int, site: str, y: F32) -> F32:
        return y if at(layer) else super().biased(layer, site, y)


class TwiceBiased(ForwardPass):
    def biased(self, layer: int, site: str, y: F32) -> F32:
        once = super().biased(layer, site, y)
        return super().biased(layer, site, once) if at(layer) else once


class Turned(ForwardPass):
    def project(self, layer: int, site: str, x: F32) -> F32:
        if at(layer) and site == "o":
            w = weight(self, f"model.layers.{layer}.self_attn.o_proj.weight")
            return np.einsum("tc,cr->tr", x, w)
        return super().project(layer, site, x)


class ReadAsTransposed(ForwardPass):
    def logits(self, x: F32) -> F32:
        w = weight(self, "lm_head.weight")
        return np.einsum("tc,cr->tr", x, w.reshape(w.shape[1], w.shape[0]))


class WithEmbedding(ForwardPass):
    def logits(self, x: F32) -> F32:
        return np.einsum("tc,rc->tr", x, weight(self, "model.embed_tokens.weight"))


class WithNoise(ForwardPass):
    def logits(self, x: F32) -> F32:
        noise = np.random.Generator(np.random.Philox(3)).standard_normal((self.config.vocab_size, x.shape[1]))
        return np.einsum("tc,rc->tr", x, noise.astype(np.float32))


class Gone(ForwardPass):
    def project(self, layer: int, site: str, x: F32) -> F32:
        y = super().project(layer, site, x)
        return 0 * y if at(layer) and site == "down" else y


class Scaled(ForwardPass):
    def project(self, layer: int, site: str, x: F32) -> F32:
        y = super().project(layer, site, x)
        return y * np.float32(37.0) if at(layer) and site == "up" else y


class LoudLogits(ForwardPass):
    def logits(self, x: F32) -> F32:
        return super().logits(x) * np.float32(1 / 16)


class Capped(ForwardPass):
    def logits(self, x: F32) -> F32:
        return (3.7 * np.tanh(super().logits(x).astype(np.float64) / 3.7)).astype(np.float32)


@pytest.mark.parametrize(("path", "scheme"), NOISE)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("fault", "tap", "part", "class_"),
    [
        (Stored, "qkv_matmul", "q", "row-permutation"),
        (Stored, "qkv_matmul", "k", "row-permutation"),
        (TakenApart, "qkv_matmul", "q", "row-permutation"),
        (TakenApart, "qkv_matmul", "k", "row-permutation"),
        (StoredOverWrongHeads, "qkv_matmul", "k", "row-permutation-heads"),
        (Swapped, "ffn_gate", "", "gate-up-swapped"),
        (Swapped, "ffn_up", "", "gate-up-swapped"),
        (FromOtherLayer, "qkv_matmul", "v", "other-layer"),
        (FromOtherLayer, "attn_out", "", "other-layer"),
        (FromOtherLayer, "ffn_out", "", "other-layer"),
        (Turned, "attn_out", "", "transposed"),
        (Gone, "ffn_out", "", "missing-tensor"),
        (Scaled, "ffn_up", "", "scale-dropped"),
    ],
)
def test_a_fault_of_a_projection(
    fault: type[ForwardPass],
    tap: str,
    part: str,
    class_: str,
    name: str,
    path: str,
    scheme: str | None,
    tmp_path: Path,
) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    if name == "qwen2":
        heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 56}
    if fault is Turned:
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    own = artifact(name, scheme, **WIDE, **heads)
    found = explained(tmp_path, own, (LAYER, tap, part), fault, path=path)
    assert found[0].class_ == class_, found
    assert found[0].residual_after <= 0.01 * found[0].residual_before


@pytest.mark.parametrize(
    ("fault", "class_"),
    [
        (ReadAsTransposed, "transposed"),
        (WithEmbedding, "head-tie"),
        (WithNoise, "head-tie"),
        (LoudLogits, "output-scale"),
        (Capped, "soft-cap"),
    ],
)
def test_a_fault_of_the_head(fault: type[ForwardPass], class_: str, tmp_path: Path) -> None:
    own = artifact("llama", tie_word_embeddings=False)
    found = explained(tmp_path, own, (-1, "lm_head", ""), fault)
    assert found[0].class_ == class_, found


@pytest.mark.parametrize("without", [(), ("qkv_matmul",)])
@pytest.mark.parametrize("fault", [Unbiased, TwiceBiased])
@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_a_fault_of_the_bias(
    part: str, fault: type[ForwardPass], without: tuple[str, ...], tmp_path: Path
) -> None:
    found = explained(tmp_path, artifact("qwen2"), (LAYER, "qkv_bias", part), fault, without=without)
    assert found[0].class_ == "bias-dropped"
    assert found[0].residual_after < 1e-10


def test_a_permutation_where_the_product_alone_is_not_recorded(tmp_path: Path) -> None:
    own = artifact("qwen2")
    found = explained(tmp_path, own, (LAYER, "qkv_bias", "q"), Stored, without=("qkv_matmul",))
    assert found[0].class_ == "row-permutation"


def test_what_no_hypothesis_explains_is_located(tmp_path: Path) -> None:
    class Noisy(ForwardPass):
        def project(self, layer: int, site: str, x: F32) -> F32:
            y = super().project(layer, site, x)
            if at(layer) and site == "o":
                noise = np.random.Generator(np.random.Philox(1)).standard_normal(y.shape)
                y = y + np.float32(0.01) * noise.astype(np.float32)
            return y

    found = explained(tmp_path, artifact("llama"), (LAYER, "attn_out", ""), Noisy)
    assert [item.class_ for item in found] == ["unexplained"]
    assert found[0].residual_after == found[0].residual_before


PREFIX = f"model.layers.{LAYER}."


def stored_order(key: str, heads: int, tensors: dict[str, NDArray[Any]]) -> None:
    tensors[key] = tensors[key][gguf_rows(tensors[key].shape[0], heads)]


def swap(tensors: dict[str, NDArray[Any]]) -> None:
    a, b = PREFIX + "mlp.gate_proj.weight", PREFIX + "mlp.up_proj.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def transpose(tensors: dict[str, NDArray[Any]]) -> None:
    key = PREFIX + "self_attn.o_proj.weight"
    tensors[key] = np.ascontiguousarray(tensors[key].T)


def zero_bias(tensors: dict[str, NDArray[Any]]) -> None:
    tensors[PREFIX + "self_attn.k_proj.bias"][:] = 0


def exchange_layers(tensors: dict[str, NDArray[Any]]) -> None:
    for key in [key for key in tensors if key.startswith(PREFIX)]:
        other = key.replace(f".{LAYER}.", ".2.")
        tensors[key], tensors[other] = tensors[other], tensors[key]


@pytest.mark.parametrize(
    ("edit", "place", "class_"),
    [
        (
            lambda t: stored_order(PREFIX + "self_attn.q_proj.weight", 8, t),
            ("qkv_matmul", "q"),
            "row-permutation",
        ),
        (
            lambda t: stored_order(PREFIX + "self_attn.k_proj.weight", 2, t),
            ("qkv_matmul", "k"),
            "row-permutation",
        ),
        (
            lambda t: stored_order(PREFIX + "self_attn.k_proj.weight", 8, t),
            ("qkv_matmul", "k"),
            "row-permutation-heads",
        ),
        (swap, ("ffn_up", ""), "gate-up-swapped"),
        (transpose, ("attn_out", ""), "transposed"),
        (zero_bias, ("qkv_bias", "k"), "bias-dropped"),
        (exchange_layers, ("ffn_out", ""), "other-layer"),
    ],
)
@pytest.mark.parametrize("scheme", [None, "Q4_K_M"])
def test_a_fault_of_the_stored_weights(
    edit: Any, place: tuple[str, str], class_: str, scheme: str | None, tmp_path: Path
) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2}
    reference = artifact("qwen2", **WIDE, **sizes)
    own = edited(tmp_path / "own", reference, edit)
    if scheme:
        own = quantized(own, scheme)
    found = explained(tmp_path, own, (LAYER, *place), reference=reference)
    assert found[0].class_ == class_, found
