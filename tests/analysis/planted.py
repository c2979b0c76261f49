"""A small random llama in memory, copies of it in other formats, and copies with something wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.weights.sweep import Band, compare_tensor, inventory, pairs, relate, summarise
from driftscope.artifacts.complete import expected_shapes
from driftscope.artifacts.derive.quantize import quantize
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.tensor import TensorRef
from driftscope.faultbench.edited import EditedTensor, values_of

F32 = NDArray[np.float32]

BAND = Band(0.0, 1.6)
LAYERS = 6
CONFIG = ModelConfig(
    architecture="llama",
    hidden_size=256,
    num_layers=LAYERS,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=512,
    vocab_size=512,
    context_length=128,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
Q, K, V, OUT = (f"model.layers.2.self_attn.{name}_proj.weight" for name in "qkvo")
GATE, UP, DOWN = (f"model.layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
NORM = "model.layers.2.input_layernorm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def ref(name: str, values: F32, dtype: str = "F32", **fields: Any) -> EditedTensor:
    """A tensor in memory."""
    rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
    raw = np.ascontiguousarray(rows.view(np.uint8) if dtype == "F32" else quantize(rows, dtype))
    file = Path(hashlib.sha256(raw.tobytes()).hexdigest())
    plain = TensorRef(name, name, values.shape, dtype, file, 0, raw.nbytes, **fields)
    return EditedTensor(**vars(plain), _bytes=raw)


def random_model(seed: int = 0, **config: Any) -> Artifact:
    """Weights of normal and Laplace values, in BF16 as checkpoints are; norms about one."""
    random = np.random.Generator(np.random.Philox([seed, 66]))
    changed = replace(CONFIG, **config)
    tensors = {}
    for index, (name, shape) in enumerate(expected_shapes(changed).items()):
        draw = random.laplace if index % 3 else random.standard_normal
        values = (np.float32(0.03) * draw(size=shape)).astype(np.float32)
        if len(shape) == 1:
            values += np.float32(1.0)
        bits = values.view(np.uint32) & np.uint32(0xFFFF0000)
        tensors[name] = ref(name, bits.view(np.float32))
    return Artifact(Path(f"seed-{seed}"), "safetensors", changed, tensors)


def values(model: Artifact, name: str) -> F32:
    """The values of a tensor."""
    return values_of(model, name)


def copied(model: Artifact, scheme: str = "F32", changed: Mapping[str, F32] | None = None) -> Artifact:
    """A copy whose matrices are stored in a format, with other values for some tensors."""
    tensors = {}
    for name, item in model.tensors.items():
        found = (changed or {}).get(name)
        found = values_of(model, name) if found is None else found
        # Vectors stay F32 in quantized files; in float formats they go along.
        kept = len(item.shape) == 1 and scheme not in ("BF16", "F16")
        tensors[name] = ref(name, found, "F32" if kept else scheme)
    return replace(model, path=Path("copy"), tensors=tensors)


def judge(a: Artifact, b: Artifact, band: Band = BAND) -> dict[str, Any]:
    """The summary of a pair, searched."""
    rows = [compare_tensor(pair.a, pair.b, tensor=pair.tensor) for pair in pairs(a, b)]
    listed = inventory(a, b)
    return summarise(rows, listed, relate(rows, listed, band, a, b))
