"""The key-values and the extra tensors of a GGUF file, from a model's hyperparameters and vocabulary."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.gguf_config import gguf_attention_scale
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import GGUF_ARCHITECTURES, ROPE_FREQS, ROPE_LONG, ROPE_SHORT
from driftscope.artifacts.rope_factors import llama3_factors
from driftscope.artifacts.tokenizers.vocabulary import (
    SPECIAL_KEYS,
    SPM,
    Vocabulary,
    strip_right_of_phi3,
)
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
    writer.add_rope_dimension_count(config.rotary_dim or config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if config.attention_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)
    if config.local_rope_theta is not None:
        writer.add_rope_freq_base_swa(config.local_rope_theta)
    _add_windows(writer, config)
    _add_rope_scaling(writer, config, where)


def check_expressible(config: ModelConfig, where: str) -> None:
    """Refuse hyperparameters that llama.cpp does not read from a file, and takes otherwise than `config`.

    Raises:
        InputError: names the first, in Hugging Face's terms.
    """
    if not config.architecture.startswith("gemma"):
        return
    kind = (config.rope_scaling or {}).get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise InputError(f"{where}: RoPE scaling {kind!r} cannot be written as GGUF in {config.architecture}")
    scale = gguf_attention_scale(
        config.architecture, config.num_layers, config.hidden_size, config.num_heads, config.head_dim
    )
    if config.attention_scale != scale:
        found = config.head_dim if config.attention_scale is None else config.attention_scale**-2
        taken = config.head_dim if scale is None else config.hidden_size // config.num_heads
        raise InputError(
            f"{where}: query_pre_attn_scalar is {found:g}, which GGUF cannot hold; llama.cpp takes {taken} "
            f"for {config.architecture} with {config.num_layers} layers"
        )
    if config.architecture != "gemma2":
        return
    if config.attention_softcap is None or config.logit_softcap is None:
        name = "attn_logit_softcapping" if config.attention_softcap is None else "final_logit_softcapping"
        raise InputError(f"{where}: {name} is null, which GGUF cannot hold in gemma2")
    if not config.tie_word_embeddings:
        raise InputError(f"{where}: tie_word_embeddings is false, which GGUF cannot hold in gemma2")


def _add_windows(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """The window, and its layers where these are not what a reader takes by itself.

    llama.cpp reads both for gemma2 and gemma3; the others have no window there.
    """
    is_gemma = config.architecture.startswith("gemma")
    window = config.sliding_window
    if window is None and config.architecture == "gemma2":
        # It has one by default. None of its layers will.
        window = config.context_length
    if window is None:
        return
    writer.add_sliding_window(window)
    if is_gemma or config.sliding_layers is not None:
        writer.add_sliding_window_pattern(
            [config.window_of(layer) is not None for layer in range(config.num_layers)]
        )


def _add_rope_scaling(writer: gguf.GGUFWriter, config: ModelConfig, where: str) -> None:
    scaling: dict[str, Any] = dict(config.rope_scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("default", "llama3"):
        # Llama 3's divisors are a tensor: `rope_divisors`.
        return
    if kind == "longrope" and config.architecture == "phi3":
        # So are LongRoPE's.
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(float(scaling["attention_factor"]))
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


def rope_divisors(config: ModelConfig) -> dict[str, NDArray[np.float32]]:
    """Divisors of the rotary frequencies that GGUF stores, name to ``float32[rotary_dim / 2]``.

    Llama 3's are one tensor, LongRoPE's two, and other scalings have none.
    """
    scaling = dict(config.rope_scaling or {})
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "longrope":
        return {
            ROPE_LONG: np.array(scaling["long_factor"], dtype=np.float32),
            ROPE_SHORT: np.array(scaling["short_factor"], dtype=np.float32),
        }
    if kind != "llama3":
        return {}
    factors = llama3_factors(
        config.rope_theta,
        config.head_dim,
        factor=float(scaling.get("factor", 8.0)),
        low=float(scaling.get("low_freq_factor", 1.0)),
        high=float(scaling.get("high_freq_factor", 4.0)),
        original_length=int(scaling.get("original_max_position_embeddings", 8192)),
    )
    return {ROPE_FREQS: factors.astype(np.float32)}


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary | None) -> None:
    """Add the ``tokenizer.*`` keys; a model without a tokenizer says so."""
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    writer.add_tokenizer_model("llama" if vocabulary.kind == SPM else "gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.strip_right and vocabulary.strip_right == strip_right_of_phi3(
        vocabulary.tokens, vocabulary.types
    ):
        # GGUF has no key for it; llama.cpp goes by the name, and so does `vocabulary_from_gguf`.
        writer.add_name("phi-3")
    if vocabulary.kind == SPM:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    else:
        writer.add_token_merges([f"{left} {right}" for left, right in vocabulary.merges])
    for name, index in vocabulary.special.items():
        writer.add_uint32(SPECIAL_KEYS[name], index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
