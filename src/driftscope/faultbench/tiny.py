"""Small random models, written without torch: a Qwen2 with grouped heads and biases, variants, others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.complete import expected_shapes
from driftscope.artifacts.config import config_from_hf
from driftscope.artifacts.derive.atomic import atomic_folder
from driftscope.artifacts.derive.safetensors_file import SafetensorsWriter
from driftscope.errors import InputError

F32 = NDArray[np.float32]

_QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "dtype": "float32",
}
"""Seven query heads to a key head, as in Qwen2.5-7B; every row is a whole number of 256-value blocks."""

_SQUARE: dict[str, Any] = {"hidden_size": 448, "head_dim": 32, "num_hidden_layers": 3}

WINDOW = 48

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}

_NARROW = 5
"""A window that short prompts reach beyond."""

_GEMMA: dict[str, Any] = {
    # Large enough to matter where the embedding is multiplied by 16.
    "rms_norm_eps": 1e-2,
    "num_attention_heads": 4,
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": _NARROW,
    "tie_word_embeddings": True,
}

_GEMMA2: dict[str, Any] = {
    **_GEMMA,
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 10.0,
    "final_logit_softcapping": 30.0,
}

_GEMMA3: dict[str, Any] = {
    **_GEMMA,
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}

_PHI3: dict[str, Any] = {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "num_attention_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-3,
    "sliding_window": _NARROW,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
"""Half of each head turns."""

_BIG_CHANNEL = 7
_BIG_TOKEN = 1


@dataclass(frozen=True)
class Variant:
    """How a tiny model differs from the plain Qwen2.

    Attributes:
        changes: keys of ``config.json``.
        massive: give token 1 an activation of about 1e5 in one channel of the MLP of layer 1.
        twins: make pairs of rows of the LM head all but equal, so that greedy choices are near-ties.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    massive: bool = False
    twins: bool = False


VARIANTS: Mapping[str, Variant] = {
    "qwen2": Variant(),
    # llama.cpp wants the heads of a Qwen2 to be as wide as the model.
    "qwen2-square": Variant({"hidden_size": 448, "head_dim": 32, "num_hidden_layers": 3}),
    "qwen2-window": Variant({"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0}),
    "qwen2-scaled": Variant({"rope_parameters": _LLAMA3}),
    "qwen2-massive": Variant(massive=True),
    "qwen2-twins": Variant(twins=True),
    "llama": Variant(
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4}
    ),
    "gemma2": Variant(_GEMMA2),
    "gemma3": Variant(_GEMMA3),
    "phi3": Variant(_PHI3),
}


def write_tiny(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write a random float32 model as a safetensors folder, and return the folder.

    Weights are larger than what models are initialized with, so that attention is not flat and every op
    matters to the logits; norms and biases are not left at one and zero.

    Args:
        folder: where to put it.
        name: a key of `VARIANTS`.
        seed: of the weights.

    Raises:
        InputError: no such variant.
    """
    if name not in VARIANTS:
        raise InputError(f"tiny model {name!r} is unknown; expected one of {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    document = {**_QWEN2, **variant.changes}
    values = random_values(document, seed)
    if variant.massive:
        _make_massive(values)
    if variant.twins:
        _make_twins(values, seed)
    with atomic_folder(folder) as partial:
        sizes = {key: ("F32", array.shape, array.nbytes) for key, array in values.items()}
        with SafetensorsWriter(partial / "model.safetensors", sizes) as writer:
            for array in values.values():
                writer.write([array])
        text = json.dumps(document, indent=2) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
    return folder


def random_values(document: Mapping[str, Any], seed: int) -> dict[str, F32]:
    """Canonical name to random values of every tensor of the model that a ``config.json`` describes."""
    config = config_from_hf(document, "tiny model")
    random = np.random.Generator(np.random.Philox(seed))
    values = {}
    for name, shape in expected_shapes(config).items():
        noise = random.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            values[name] = np.float32(1 - config.norm_offset) + np.float32(0.2) * noise
        elif name.endswith("bias"):
            values[name] = np.float32(0.5) * noise
        elif "embed_tokens" in name:
            values[name] = noise
        else:
            values[name] = noise * np.float32(1.5 / shape[-1] ** 0.5)
    return values


def _make_massive(values: dict[str, F32]) -> None:
    """Let one channel of layer 1's MLP answer to token 1's own channel of the residual stream.

    The embedding of that token is large in a channel that the layers before hardly move, and one row of
    gate and up reads that channel alone; ``down_proj`` writes it back where later layers see it.
    """
    values["model.embed_tokens.weight"][:, _BIG_CHANNEL] = 0.0
    values["model.embed_tokens.weight"][_BIG_TOKEN, _BIG_CHANNEL] = 60.0
    for layer in range(_QWEN2["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for site in ("self_attn.o_proj", "mlp.down_proj"):
            values[f"{prefix}.{site}.weight"][_BIG_CHANNEL] = 0.0
    prefix = "model.layers.1.mlp"
    for site in ("gate_proj", "up_proj"):
        row = values[f"{prefix}.{site}.weight"][_BIG_CHANNEL]
        row[:] = 0.0
        row[_BIG_CHANNEL] = 25.0
    values[f"{prefix}.down_proj.weight"][:, _BIG_CHANNEL] *= np.float32(0.02)


def _make_twins(values: dict[str, F32], seed: int) -> None:
    random = np.random.Generator(np.random.Philox(seed + 1))
    head = values["lm_head.weight"]
    noise = random.standard_normal(head[::2].shape, dtype=np.float32)
    head[1::2] = head[::2] * (np.float32(1) + np.float32(1e-4) * noise)
