"""Small GGUF models with seeded random weights, written by the gguf package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, VOCAB, CONTEXT = 64, 96, 2, 4, 2, 50, 128
HEAD_DIM = HIDDEN // HEADS


def tiny_tensors(
    architecture: str, *, tied: bool = False, fused: bool = False, seed: int = 0
) -> dict[str, NDArray[np.float32]]:
    """GGUF name to values of a whole model.

    Args:
        architecture: GGUF's name.
        tied: whether there is no head.
        fused: whether q, k and v are one matrix, as they always are in phi3.
        seed: of the values.
    """
    random = np.random.Generator(np.random.Philox(seed))
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN)}
    kv_rows = KV_HEADS * HEAD_DIM
    for layer in range(LAYERS):
        block: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HIDDEN, HIDDEN),
            "attn_k.weight": (kv_rows, HIDDEN),
            "attn_v.weight": (kv_rows, HIDDEN),
            "attn_output.weight": (HIDDEN, HIDDEN),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (INNER, HIDDEN),
            "ffn_up.weight": (INNER, HIDDEN),
            "ffn_down.weight": (HIDDEN, INNER),
        }
        if architecture == "qwen2":
            block |= {"attn_q.bias": (HIDDEN,), "attn_k.bias": (kv_rows,), "attn_v.bias": (kv_rows,)}
        if architecture in ("qwen3", "gemma3"):
            block |= {"attn_q_norm.weight": (HEAD_DIM,), "attn_k_norm.weight": (HEAD_DIM,)}
        if architecture.startswith("gemma"):
            block |= {"post_attention_norm.weight": (HIDDEN,), "post_ffw_norm.weight": (HIDDEN,)}
        if architecture == "phi3":
            del block["ffn_gate.weight"]
            block["ffn_up.weight"] = (2 * INNER, HIDDEN)
        if fused or architecture == "phi3":
            for kind in ("weight", "bias"):
                parts = [block.pop(f"attn_{site}.{kind}", None) for site in "qkv"]
                if parts[0] is not None:
                    rows = sum(part[0] for part in parts if part is not None)
                    block[f"attn_qkv.{kind}"] = (rows, *parts[0][1:])
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    shapes["output_norm.weight"] = (HIDDEN,)
    if not tied:
        shapes["output.weight"] = (VOCAB, HIDDEN)
    return {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def add_hyperparameters(writer: gguf.GGUFWriter, *, vocabulary: bool = True) -> None:
    """The keys that every architecture needs, with or without a vocabulary."""
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_array("general.languages", ["en", "fr"])
    if vocabulary:
        writer.add_token_list([f"token {i} é" for i in range(VOCAB)])
        writer.add_token_scores([0.25 * i for i in range(VOCAB)])
        writer.add_bool("tokenizer.ggml.add_bos_token", True)


def write_gguf(
    path: Path,
    architecture: str,
    tensors: Mapping[str, NDArray[np.float32]],
    *,
    formats: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    keys: Callable[[gguf.GGUFWriter], None] = add_hyperparameters,
    alignment: int | None = None,
) -> Path:
    """Write a GGUF file, and return its path.

    Args:
        path: where to put it.
        architecture: GGUF's name.
        tensors: GGUF name to values.
        formats: for tensors that are not to be F32.
        keys: adds the key-values.
        alignment: of the tensors, if not GGUF's default.
    """
    writer = gguf.GGUFWriter(path, architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    keys(writer)
    for name, values in tensors.items():
        kind = (formats or {}).get(name, gguf.GGMLQuantizationType.F32)
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
