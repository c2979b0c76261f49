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
        architecture: Hugging Face's ``model_type`` (``llama``, ``mistral``, ``qwen2``, ``qwen3``,
            ``gemma2``, ``gemma3_text``, ``phi3``).
        rms_norm_eps: added to the mean square before the root.
        rope_theta: base of the rotary frequencies.
        rope_scaling: Hugging Face's ``rope_parameters``/``rope_scaling`` without theta, or None.
        attention_bias: biases on q, k and v.
        qk_norm: RMSNorm over the head dimension of q and k, before RoPE.
        sliding_window: tokens that a query sees, itself included, or None.
        sliding_layers: ascending numbers of the layers that the window holds for, or None for all of them.
        local_rope_theta: base of the rotary frequencies of the layers with the window, which are then not
            scaled; None where all layers turn alike.
        rotary_dim: leading channels of a head that RoPE turns, or None for all.
        activation: of the gate: ``silu`` or ``gelu_tanh``.
        norm_offset: added to every norm's weight before it multiplies.
        post_norms: RMSNorm on the output of the attention and of the MLP too, before the residual.
        embedding_scale: factor of the embedding rows.
        attention_scale: factor of the scores, or None for ``head_dim ** -0.5``.
        attention_softcap: scores become ``cap * tanh(score / cap)``, or None.
        logit_softcap: the same of the logits, or None.
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
    sliding_layers: tuple[int, ...] | None = None
    local_rope_theta: float | None = None
    rotary_dim: int | None = None
    activation: str = "silu"
    norm_offset: float = 0.0
    post_norms: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    def window_of(self, layer: int) -> int | None:
        """Tokens that a query of a layer sees, itself included, or None for all before it."""
        if self.sliding_layers is not None and layer not in self.sliding_layers:
            return None
        return self.sliding_window


@dataclass(frozen=True)
class Artifact:
    """A model on disk.

    Attributes:
        path: the file or folder that was opened.
        container: ``gguf``, ``safetensors`` or ``apr``.
        config: hyperparameters.
        tensors: canonical name to tensor, in the canonical order of the model.
        unmapped: stored names that have no canonical name; never dropped silently.
        files: every file that holds tensors or metadata, sorted.
        metadata: raw metadata of the container (GGUF key-values, config.json, or an .apr file's object, the
            keys of its tokenizer under GGUF's names).
    """

    path: Path
    container: str
    config: ModelConfig
    tensors: Mapping[str, TensorRef]
    unmapped: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
