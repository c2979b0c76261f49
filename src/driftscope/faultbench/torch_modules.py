"""Faults put into a transformers model: modules replaced, weights changed in place, hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from driftscope.artifacts.model import ModelConfig
from driftscope.faultbench.injection import Spot
from driftscope.faultbench.weights import interleaved
from driftscope.forward.policy import WHOLE_MODEL

Patch = Callable[[Any, int], None]


@dataclass(frozen=True)
class TorchFault:
    """One patch of a loaded model.

    Attributes:
        fault: id in the catalogue.
        name: short and unique.
        says: the patch in words.
        first: where it should be found, given the layer of faults that sit in one.
        classes: classes that are right.
        patch: changes a model in place, in a layer.
        unless: why the model cannot have it, or None.
    """

    fault: str
    name: str
    says: str
    first: Callable[[int], Spot]
    classes: tuple[str, ...]
    patch: Patch
    unless: Callable[[ModelConfig], str | None] = lambda config: None


def _layers(model: Any) -> Any:
    return model.model.layers


def _gelu(model: Any, layer: int) -> None:
    import torch

    for block in _layers(model):
        block.mlp.act_fn = torch.nn.GELU()


def _theta(model: Any, layer: int) -> None:
    import torch

    rotary = model.model.rotary_emb
    half = rotary.inv_freq.shape[0]
    exponents = torch.arange(half, dtype=torch.float32) / half
    # theta^-e times 10^-e: theta ten times as large.
    rotary.inv_freq = rotary.inv_freq * 10.0**-exponents


def _changed(parameter: Any, values: Any) -> None:
    import torch

    with torch.no_grad():
        parameter.copy_(values.clone())


def _v_transposed(model: Any, layer: int) -> None:
    weight = _layers(model)[layer].self_attn.v_proj.weight
    _changed(weight, weight.T)


def _o_transposed(model: Any, layer: int) -> None:
    weight = _layers(model)[layer].self_attn.o_proj.weight
    _changed(weight, weight.T)


def _rows_permuted(model: Any, layer: int) -> None:
    import torch

    attention, config = _layers(model)[layer].self_attn, model.config
    for module, heads in (
        (attention.q_proj, config.num_attention_heads),
        (attention.k_proj, config.num_key_value_heads),
    ):
        order = torch.from_numpy(interleaved(module.weight.shape[0], heads))
        _changed(module.weight, module.weight[order])


def _residual_twice(model: Any, layer: int) -> None:
    block = _layers(model)[layer]
    kept: list[Any] = []

    def keep(module: Any, arguments: Any) -> None:
        kept.append(arguments[0])

    block.register_forward_pre_hook(keep)

    def doubled(module: Any, arguments: Any) -> Any:
        return (arguments[0] + kept.pop(),)

    block.post_attention_layernorm.register_forward_pre_hook(doubled)


def _eps(model: Any, layer: int) -> None:
    for block in _layers(model):
        block.input_layernorm.variance_epsilon *= 10.0
        block.post_attention_layernorm.variance_epsilon *= 10.0
    model.model.norm.variance_epsilon *= 10.0


def _no_bias(model: Any, layer: int) -> None:
    for block in _layers(model):
        for module in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            _changed(module.bias, 0.0 * module.bias)


def _scores_doubled(model: Any, layer: int) -> None:
    for block in _layers(model):
        block.self_attn.scaling *= 2.0


def _gate_and_up(model: Any, layer: int) -> None:
    mlp = _layers(model)[layer].mlp
    gate, up = mlp.gate_proj.weight.clone(), mlp.up_proj.weight.clone()
    _changed(mlp.gate_proj.weight, up)
    _changed(mlp.up_proj.weight, gate)


def _norm_plus_one(model: Any, layer: int) -> None:
    weight = _layers(model)[layer].input_layernorm.weight
    _changed(weight, weight + 1.0)


def _two_layers(model: Any, layer: int) -> None:
    here, there = (_layers(model)[index].mlp.down_proj.weight for index in (layer, layer + 1))
    left, right = here.clone(), there.clone()
    _changed(here, right)
    _changed(there, left)


def _one_nan(model: Any, layer: int) -> None:
    weight = _layers(model)[layer].mlp.up_proj.weight
    values = weight.clone()
    values[5, 3] = float("nan")
    _changed(weight, values)


def _shifted_gate(model: Any, layer: int) -> None:
    import torch

    mlp = _layers(model)[layer].mlp

    def forward(x: Any) -> Any:
        up = torch.roll(mlp.up_proj(x), -1, dims=-1)
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * up)

    mlp.forward = forward


def _logits_scaled(model: Any, layer: int) -> None:
    model.lm_head.register_forward_hook(lambda module, arguments, output: output * 0.125)


def _biased(config: ModelConfig) -> str | None:
    return None if config.attention_bias else "the model has no biases"


def _square_v(config: ModelConfig) -> str | None:
    rows = config.num_kv_heads * config.head_dim
    return None if rows == config.hidden_size else f"v_proj is {rows}x{config.hidden_size}, not square"


def _square_o(config: ModelConfig) -> str | None:
    columns = config.num_heads * config.head_dim
    return None if columns == config.hidden_size else f"o_proj is {config.hidden_size}x{columns}, not square"


def _at(tap: str, part: str = "") -> Callable[[int], Spot]:
    return lambda layer: Spot(layer, tap, part)


def _start(tap: str, part: str = "") -> Callable[[int], Spot]:
    return lambda layer: Spot(0, tap, part)


_SCALED = ("output-scale", "scale-dropped")

# transformers gives q, k and v after the bias only, which is where a fault of their weights shows.
FAULTS = (
    TorchFault(
        "F01",
        "rows-of-q-and-k",
        "rows of q and k interleaved",
        _at("qkv_bias", "q"),
        ("row-permutation",),
        _rows_permuted,
    ),
    TorchFault(
        "F04",
        "norm-plus-one",
        "one added to the weight of a norm",
        _at("attn_norm"),
        ("norm-offset",),
        _norm_plus_one,
    ),
    TorchFault(
        "F05",
        "biases-zero",
        "biases of q, k and v set to zero",
        _start("qkv_bias", "q"),
        ("bias-dropped",),
        _no_bias,
        _biased,
    ),
    TorchFault(
        "F08",
        "gate-and-up",
        "weights of gate_proj and up_proj exchanged",
        _at("ffn_gate"),
        ("gate-up-swapped",),
        _gate_and_up,
    ),
    TorchFault(
        "F09",
        "v-transposed",
        "weight of v_proj transposed",
        _at("qkv_bias", "v"),
        ("transposed",),
        _v_transposed,
        _square_v,
    ),
    TorchFault(
        "F09",
        "o-transposed",
        "weight of o_proj transposed",
        _at("attn_out"),
        ("transposed",),
        _o_transposed,
        _square_o,
    ),
    TorchFault(
        "F11",
        "eps-times-ten",
        "variance_epsilon ten times too large",
        _start("attn_norm"),
        ("norm-eps",),
        _eps,
    ),
    TorchFault(
        "F16",
        "theta-times-ten",
        "inv_freq of a theta ten times as large",
        _start("q_post_rope"),
        ("rope-theta",),
        _theta,
    ),
    TorchFault(
        "F22",
        "scores-doubled",
        "scaling of the attention doubled",
        _start("attn_scores"),
        ("score-scale",),
        _scores_doubled,
    ),
    TorchFault("F23", "gelu", "act_fn replaced by GELU", _start("ffn_silu"), ("activation-function",), _gelu),
    TorchFault(
        "F24",
        "logits-multiplied",
        "logits times 0.125, by a hook",
        lambda layer: Spot(WHOLE_MODEL, "lm_head"),
        _SCALED,
        _logits_scaled,
    ),
    TorchFault(
        "F31",
        "shifted-by-one",
        "up rolled by one channel in the MLP's forward",
        _at("ffn_swiglu"),
        ("swiglu-shift",),
        _shifted_gate,
    ),
    TorchFault(
        "F32",
        "added-twice",
        "residual added twice, by a hook",
        _at("post_attn_residual"),
        ("residual",),
        _residual_twice,
    ),
    TorchFault(
        "F33",
        "down-of-two-layers",
        "weights of down_proj of two layers exchanged",
        _at("ffn_out"),
        ("other-layer",),
        _two_layers,
    ),
    TorchFault("F34", "nan", "one NaN in the weight of up_proj", _at("ffn_up"), ("non-finite",), _one_nan),
)
"""What is patched in a transformers model."""
