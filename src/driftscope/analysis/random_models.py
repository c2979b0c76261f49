"""Small models with random weights in any storage format: one file of bytes, no container."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.derive.quantize import quantize
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.tensor import TensorRef
from driftscope.forward.architecture import SITE_TENSORS, site_shape
from driftscope.forward.policy import LAYER_SITES
from driftscope.kernels.formats import format_of

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Shape:
    """The shape of a model; norms of heads and biases come with the architecture."""

    architecture: str
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int = 1
    vocabulary: int = 96
    theta: float = 10000.0
    window: int | None = None

    @property
    def config(self) -> ModelConfig:
        """As hyperparameters."""
        return ModelConfig(
            architecture=self.architecture,
            hidden_size=self.hidden,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.inner,
            vocab_size=self.vocabulary,
            context_length=4096,
            rms_norm_eps=1e-6,
            rope_theta=self.theta,
            attention_bias=self.architecture == "qwen2",
            qk_norm=self.architecture == "qwen3",
            sliding_window=self.window,
        )


def random_weights(shape: Shape, seed: int) -> dict[str, F32]:
    """Canonical name to values of a whole model.

    Odd seeds have weights of heavy tails, runs of 16 whose sizes differ by up to six times; every third seed
    has a few channels whose norm weight is ten times the others', which makes outliers in activations.
    """
    random = np.random.Generator(np.random.Philox(seed))
    config = shape.config

    def matrix(rows: int, columns: int, scale: float = 1.2) -> F32:
        values = random.standard_normal((rows, columns), dtype=np.float32)
        if seed % 2:
            # Steps of a half, so that no exponential has a say in the bytes.
            steps = random.integers(0, 6, size=(rows, columns // 16, 1)).astype(np.float32)
            values = (values.reshape(rows, -1, 16) * (0.5 + 0.5 * steps)).reshape(rows, columns)
        spread: F32 = (values * np.float32(scale / columns**0.5)).astype(np.float32)
        return spread

    def norm(channels: int) -> F32:
        values = 1.0 + 0.2 * random.standard_normal(channels, dtype=np.float32)
        if seed % 3 == 0:
            values[random.integers(0, channels, size=3)] *= np.float32(10)
        return np.asarray(values, np.float32)

    weights = {"model.embed_tokens.weight": matrix(config.vocab_size, config.hidden_size, scale=8.0)}
    for layer in range(config.num_layers):
        stem = f"model.layers.{layer}."
        weights[f"{stem}input_layernorm.weight"] = norm(config.hidden_size)
        for site in LAYER_SITES:
            rows, columns = site_shape(config, site)
            weights[f"{stem}{SITE_TENSORS[site]}.weight"] = matrix(rows, columns)
            if config.attention_bias and site in "qkv":
                bias = 0.5 * random.standard_normal(rows, dtype=np.float32)
                weights[f"{stem}{SITE_TENSORS[site]}.bias"] = np.asarray(bias, np.float32)
        if config.qk_norm:
            weights[f"{stem}self_attn.q_norm.weight"] = norm(config.head_dim)
            weights[f"{stem}self_attn.k_norm.weight"] = norm(config.head_dim)
        weights[f"{stem}post_attention_layernorm.weight"] = norm(config.hidden_size)
    weights["model.norm.weight"] = norm(config.hidden_size)
    weights["lm_head.weight"] = matrix(config.vocab_size, config.hidden_size)
    return weights


def write_random_model(
    file: Path,
    config: ModelConfig,
    weights: dict[str, F32],
    fmt: str = "F32",
    *,
    convert: Callable[[F32, str], NDArray[np.uint8]] = quantize,
) -> Artifact:
    """Write a model's tensors one after another, and describe where they are.

    Args:
        file: where to put the bytes.
        config: its hyperparameters.
        weights: canonical name to values.
        fmt: of matrices whose rows are whole blocks of it; others are ``Q8_0``, or ``F16`` if they must.
            Vectors stay F32, as quantizers keep them, and take the dtype of float formats.
        convert: rows and format to bytes.
    """
    tensors, offset = {}, 0
    with file.open("wb") as out:
        for name, values in weights.items():
            rows = values if values.ndim == 2 else values[None]
            kind = _format(fmt, values)
            raw = convert(np.ascontiguousarray(rows), kind)
            out.write(raw.tobytes())
            tensors[name] = TensorRef(name, name, values.shape, kind, file, offset, raw.nbytes)
            offset += raw.nbytes
    return Artifact(file, "random", config, tensors, files=(file,))


def _format(fmt: str, values: F32) -> str:
    layout = format_of(fmt)
    if values.ndim == 1:
        return "F32" if layout.is_integer else fmt
    for name in (fmt, "Q8_0", "F16"):
        if values.shape[1] % format_of(name).block_size == 0:
            return name
    return "F32"
