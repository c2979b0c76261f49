"""The key-values and the extra tensors of a GGUF file, from a model's hyperparameters and vocabulary."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import GGUF_ARCHITECTURES
from driftscope.artifacts.rope_factors import llama3_factors
from driftscope.artifacts.vocabulary import SPECIAL_KEYS, Vocabulary
from driftscope.artifacts.yarn import attention_factor, softening
from driftscope.errors import InputError


def gguf_architecture(artifact: Artifact) -> str:
    """GGUF's name of the architecture.

    Raises:
        InputError: there is none here.
    """
    architecture = GGUF_ARCHITECTURES.get(artifact.config.architecture)
    if architecture is None:
        raise InputError(
            f"{artifact.path}: architecture {artifact.config.architecture!r} cannot be written as GGUF; "
            f"expected one of {', '.join(sorted(GGUF_ARCHITECTURES))}"
        )
    return architecture


def add_hyperparameters(writer: gguf.GGUFWriter, config: ModelConfig, where: str) -> None:
    """Add the ``<architecture>.*`` keys.

    Raises:
        InputError: a RoPE scaling that has no GGUF form here.
    """
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
    _add_rope_scaling(writer, dict(config.rope_scaling or {}), where)


def _add_rope_scaling(writer: gguf.GGUFWriter, scaling: dict[str, Any], where: str) -> None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", "llama3"):
        # Llama 3's factors are a tensor: `rope_frequency_factors`.
        return
    if kind not in ("linear", "yarn"):
        raise InputError(f"{where}: RoPE scaling {kind!r} cannot be written as GGUF")
    try:
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        if kind == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            return
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
    except KeyError as error:
        raise InputError(f"{where}: RoPE scaling {kind!r} lacks {error}") from error
    if not scaling.get("truncate", True):
        raise InputError(f"{where}: a YaRN scaling with truncate set to false cannot be written as GGUF")
    found, implied = attention_factor(scaling), softening(float(scaling["factor"]))
    if found != implied:
        # The one says what it is; llama.cpp reads the other, a multiple of what the factor implies.
        writer.add_rope_scaling_yarn_attn_factor(found)
        writer.add_rope_scaling_attn_factors(found / implied)
    optional = {
        "extrapolation_factor": writer.add_rope_scaling_yarn_ext_factor,
        "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
        "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
    }
    for key, add in optional.items():
        if scaling.get(key) is not None:
            add(float(scaling[key]))


def rope_frequency_factors(config: ModelConfig) -> NDArray[np.float32] | None:
    """Llama 3's divisors of the rotary frequencies as ``float32[head_dim / 2]``, or None.

    GGUF stores them as the tensor ``rope_freqs.weight``.
    """
    scaling = dict(config.rope_scaling or {})
    if scaling.get("rope_type", scaling.get("type")) != "llama3":
        return None
    return llama3_factors(
        config.rope_theta,
        config.head_dim,
        factor=float(scaling.get("factor", 8.0)),
        low=float(scaling.get("low_freq_factor", 1.0)),
        high=float(scaling.get("high_freq_factor", 4.0)),
        original_length=int(scaling.get("original_max_position_embeddings", 8192)),
    ).astype(np.float32)


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary | None) -> None:
    """Add the ``tokenizer.*`` keys; a model without a tokenizer says so."""
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges([f"{left} {right}" for left, right in vocabulary.merges])
    for name, index in vocabulary.special.items():
        writer.add_uint32(SPECIAL_KEYS[name], index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
