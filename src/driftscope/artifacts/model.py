"""What a model on disk is, whatever its container: hyperparameters and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from driftscope.artifacts.tensor import TensorRef


@dataclass(frozen=True)
class ModelConfig:
    """Hyperparameters in Hugging Face's terms; units are counts unless said otherwise.

    Attributes:
        architecture: Hugging Face's ``model_type`` (``llama``, ``mistral``, ``qwen2``, ``qwen3``).
        rms_norm_eps: added to the mean square before the root.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Hugging Face's ``rope_parameters``/``rope_scaling`` without theta, or None.
        attention_bias: biases on q, k and v.
        qk_norm: RMSNorm over the head dimension of q and k, before RoPE.
        sliding_window: tokens that a query sees, itself included, or None.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None
    attention_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None


@dataclass(frozen=True)
class Artifact:
    """A model on disk.

    Attributes:
        path: the file or folder that was opened.
        container: ``gguf`` or ``safetensors``.
        config: hyperparameters.
        tensors: canonical name to tensor, in the canonical order of the model.
        unmapped: stored names that have no canonical name; never dropped silently.
        files: every file that holds tensors or metadata, sorted.
        metadata: raw metadata of the container (GGUF key-values, or config.json).
    """

    path: Path
    container: str
    config: ModelConfig
    tensors: Mapping[str, TensorRef]
    unmapped: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
