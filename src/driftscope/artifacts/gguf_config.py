"""Hyperparameters from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from driftscope.artifacts.config import (
    SUPPORTED,
    checked,
    checked_layers,
    gemma_constants,
    has_qk_norm,
    unsupported_architecture,
)
from driftscope.artifacts.gguf import GgufTensor
from driftscope.artifacts.model import ModelConfig
from driftscope.artifacts.names import GGUF_ARCHITECTURES
from driftscope.artifacts.rope_config import checked_rope_scaling
from driftscope.artifacts.values import count, epsilon, number, positive, short, shortest
from driftscope.artifacts.windows import Windows, window_on
from driftscope.artifacts.yarn import attention_factor
from driftscope.errors import InputError

_DEFAULT_THETA = 10000.0

# Keys, without their architecture, that change the forward pass in a way that is not implemented, with
# the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}

# Field of `ModelConfig` to key, and what llama.cpp takes where Gemma 2 has none.
_SOFT_CAPS_OF_GEMMA2 = {
    "attention_softcap": ("attn_logit_softcapping", 50.0),
    "logit_softcap": ("final_logit_softcapping", 30.0),
}
_SOFT_CAPS = tuple(key for key, _ in _SOFT_CAPS_OF_GEMMA2.values())
# Of Gemma 2, and of how many layers the last one has no window, where a file does not say.
_DEFAULT_WINDOW = 4096
_DEFAULT_PERIOD = {"gemma2": 2, "gemma3_text": 6}
_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}


def config_from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor], where: str
) -> ModelConfig:
    """Read the hyperparameters of a GGUF file.

    Some are not in the metadata: the head is tied where there is no ``output.weight``, and the size of
    the vocabulary may be known from the embedding alone.

    Args:
        metadata: the key-values.
        tensors: GGUF name to tensor.
        where: the file, for messages.

    Raises:
        InputError: an unknown architecture, a missing or nonsensical value, or a switch that would change
            the forward pass in a way that is not implemented.
    """
    stored = metadata.get("general.architecture")
    # Mistral models say "llama": the first name that matches is the right one.
    architecture = next((name for name in SUPPORTED if GGUF_ARCHITECTURES[name] == stored), None)
    if architecture is None:
        raise unsupported_architecture(stored, where, "general.architecture")
    if metadata.get("split.count", 1) not in (0, 1):
        raise InputError(
            f"{where}: one of {metadata['split.count']} parts of a model; expected one file for all of it"
        )
    keys = _Keys(metadata, str(stored), where)
    is_gemma = architecture.startswith("gemma")
    neutral_here = _NEUTRAL | {key: (0.0,) for key in _SOFT_CAPS if not _reads_cap(architecture, key)}
    for key, neutral in neutral_here.items():
        value = keys.get(key)
        if value is not None and value not in neutral:
            raise InputError(f"{where}: {stored}.{key} is {value}, which is not supported")
    hidden_size = keys.count("embedding_length")
    num_heads = keys.count("attention.head_count")
    head_dim = keys.count("attention.key_length", default=0)
    if not head_dim:
        if hidden_size % num_heads:
            raise InputError(
                f"{where}: {stored}.embedding_length {hidden_size} is not a multiple of "
                f"{stored}.attention.head_count {num_heads}"
            )
        head_dim = hidden_size // num_heads
    for key in ("attention.value_length", "attention.key_length_swa", "attention.value_length_swa"):
        if keys.count(key, default=head_dim) != head_dim:
            raise InputError(
                f"{where}: {stored}.{key} is {keys.get(key)}; expected the head size, {head_dim}"
            )
    rotary_dim = keys.count("rope.dimension_count", default=head_dim)
    if rotary_dim != head_dim and architecture != "phi3":
        raise InputError(
            f"{where}: {stored}.rope.dimension_count is {rotary_dim}; expected the head size, {head_dim}"
        )
    if keys.count("rope.dimension_count_swa", default=rotary_dim) != rotary_dim:
        raise InputError(
            f"{where}: {stored}.rope.dimension_count_swa is {keys.get('rope.dimension_count_swa')}; "
            f"expected that of all layers, {rotary_dim}"
        )
    num_layers = checked_layers(keys.count("block_count"), where)
    window, sliding_layers = _windows(keys, architecture, num_layers)
    if architecture == "llama" and window is not None:
        # No llama model has one.
        architecture = "mistral"
    gemma = _gemma_switches(keys, architecture, hidden_size, num_heads, head_dim) if is_gemma else {}
    return checked(
        ModelConfig(
            architecture=architecture,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=keys.count("attention.head_count_kv", default=num_heads),
            head_dim=head_dim,
            intermediate_size=keys.count("feed_forward_length"),
            vocab_size=_vocab_size(keys, tensors),
            context_length=keys.count("context_length"),
            rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon", check=epsilon),
            rope_theta=keys.number("rope.freq_base", default=_DEFAULT_THETA, check=positive),
            rope_scaling=_rope_scaling(keys),
            local_rope_theta=_local_theta(keys, architecture) if window is not None else None,
            rotary_dim=None if rotary_dim == head_dim else rotary_dim,
            attention_bias=architecture == "qwen2",
            qk_norm=has_qk_norm(architecture),
            tie_word_embeddings="output.weight" not in tensors,
            sliding_window=window,
            sliding_layers=sliding_layers,
            **gemma,
        ),
        where,
    )


class _Keys:
    """The keys of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, where: str) -> None:
        self.metadata = metadata
        self.architecture = architecture
        self.where = where

    def get(self, key: str) -> Any:
        """A value; where a file has one for each layer and they agree, that one."""
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full)
        if isinstance(value, tuple):
            if len(set(value)) != 1:
                raise InputError(f"{self.where}: {full} differs between layers, which is not supported")
            value = value[0]
        return value

    def count(self, key: str, *, default: int | None = None) -> int:
        full = f"{self.architecture}.{key}"
        return count({full: self.get(key)}, full, self.where, default=default)

    def number(
        self, key: str, *, default: float | None = None, check: Callable[..., float] = number
    ) -> float:
        """A number; one stored as f32 is given as the shortest decimal that rounds to it.

        Args:
            key: without the architecture.
            default: for a missing key; None makes the key mandatory.
            check: `number`, `positive` or `epsilon`.
        """
        full = f"{self.architecture}.{key}"
        return shortest(check({full: self.get(key)}, full, self.where, default=default))


def _reads_cap(architecture: str, key: str) -> bool:
    """Whether an architecture has a soft cap of the scores or of the logits."""
    return architecture == "gemma2" or (architecture == "gemma3_text" and key.startswith("final"))


def gguf_attention_scale(
    architecture: str, num_layers: int, hidden_size: int, num_heads: int, head_dim: int
) -> float | None:
    """The factor of Gemma's scores that llama.cpp takes, None for ``head_dim ** -0.5``.

    A GGUF file does not say it; llama.cpp knows the models of 27 billion weights, which differ, by their
    number of layers (``src/models/gemma2.cpp``, ``gemma3.cpp``).
    """
    scalar = hidden_size // num_heads if num_layers == _LAYERS_OF_27B[architecture] else head_dim
    return None if scalar == head_dim else scalar**-0.5


def _gemma_switches(
    keys: _Keys, architecture: str, hidden_size: int, num_heads: int, head_dim: int
) -> dict[str, Any]:
    """The fields of `ModelConfig` that only Gemma 2 and 3 set, as llama.cpp takes them."""
    scale = gguf_attention_scale(architecture, keys.count("block_count"), hidden_size, num_heads, head_dim)
    caps = {}
    for name, (key, default) in _SOFT_CAPS_OF_GEMMA2.items():
        cap = keys.number(key, default=default if architecture == "gemma2" else 0.0)
        if cap < 0:
            raise InputError(f"{keys.where}: {keys.architecture}.{key} is {cap}; expected more than 0")
        caps[name] = cap or None
    return gemma_constants(hidden_size) | {"attention_scale": scale, **caps}


def _windows(keys: _Keys, architecture: str, num_layers: int) -> Windows:
    """The window and its layers (llama.cpp, ``load_swa_pattern``)."""
    found = keys.get("attention.sliding_window")
    if found == 0 or (found is None and architecture != "gemma2"):
        return None, None
    window = keys.count("attention.sliding_window", default=_DEFAULT_WINDOW)
    full = f"{keys.architecture}.attention.sliding_window_pattern"
    pattern = keys.metadata.get(full)
    if isinstance(pattern, tuple):
        if len(pattern) < num_layers:
            raise InputError(f"{keys.where}: {full} has {len(pattern)} values; expected {num_layers}")
        return window_on(window, [bool(value) for value in pattern[:num_layers]])
    if pattern is None and architecture not in _DEFAULT_PERIOD:
        return window, None
    period = _DEFAULT_PERIOD.get(architecture, 1) if pattern is None else pattern
    if isinstance(period, bool) or not isinstance(period, int) or period < 0:
        raise InputError(f"{keys.where}: {full} is {short(period)}; expected a whole number")
    return window_on(window, [period == 0 or layer % period < period - 1 for layer in range(num_layers)])


def _local_theta(keys: _Keys, architecture: str) -> float | None:
    """Theta of the layers with a window, None where it is that of all."""
    if not architecture.startswith("gemma") or (
        architecture == "gemma2" and keys.get("rope.freq_base_swa") is None
    ):
        return None
    return keys.number("rope.freq_base_swa", default=_DEFAULT_THETA, check=positive)


def _vocab_size(keys: _Keys, tensors: Mapping[str, GgufTensor]) -> int:
    """From its key, or from the embedding, or from the tokens."""
    if keys.get("vocab_size") is not None:
        return keys.count("vocab_size")
    embedding = tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2:
        return count({"rows": embedding.shape[0]}, "rows", f"{keys.where}: token_embd.weight")
    tokens = keys.metadata.get("tokenizer.ggml.tokens", ())
    if not isinstance(tokens, str) and hasattr(tokens, "__len__") and len(tokens):
        return len(tokens)
    raise InputError(
        f"{keys.where}: {keys.architecture}.vocab_size, token_embd.weight and "
        "tokenizer.ggml.tokens are all missing"
    )


def _rope_scaling(keys: _Keys) -> dict[str, Any] | None:
    """The keys ``rope.scaling.*`` in Hugging Face's terms (llama.cpp, ``llama_model_base::load_hparams``)."""
    where = keys.where
    kind = keys.get("rope.scaling.type")
    if kind == "longrope" and keys.architecture == "phi3":
        # Its parameters are two tensors: `rope_factors.with_stored_factors`.
        return None
    if kind not in (None, "none", "linear", "yarn"):
        raise InputError(
            f"{where}: {keys.architecture}.rope.scaling.type is {str(kind)[:80]!r}; "
            "expected none, linear or yarn"
        )
    name = "rope.scaling.factor" if keys.get("rope.scaling.factor") is not None else "rope.scale_linear"
    factor = keys.number(name, default=0.0)
    if kind == "none" or (kind != "yarn" and factor in (0.0, 1.0)):
        return None
    scaling: dict[str, Any] = {"rope_type": kind or "linear", "factor": factor or 1.0}
    if kind == "yarn":
        original = "rope.scaling.original_context_length"
        if keys.get(original) is not None:
            scaling["original_max_position_embeddings"] = keys.count(original)
        for key, stored in (
            ("extrapolation_factor", "rope.scaling.yarn_ext_factor"),
            ("attention_factor", "rope.scaling.yarn_attn_factor"),
            ("beta_fast", "rope.scaling.yarn_beta_fast"),
            ("beta_slow", "rope.scaling.yarn_beta_slow"),
        ):
            if keys.get(stored) is not None:
                scaling[key] = keys.number(stored)
        if keys.get("rope.scaling.yarn_log_multiplier"):
            scaling |= {"mscale": 1.0, "mscale_all_dim": keys.number("rope.scaling.yarn_log_multiplier")}
        # llama.cpp multiplies its own factor by this one; what a file says outright comes first.
        extra = keys.number("rope.scaling.attn_factor", default=1.0)
        if extra != 1.0 and "attention_factor" not in scaling:
            scaling["attention_factor"] = attention_factor(scaling) * extra
    return checked_rope_scaling(scaling, where)
