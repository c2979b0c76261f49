"""A model's ops in the order in which they run, and what each tap of a trace holds.

One list serves llama, mistral, qwen2, qwen3, gemma2, gemma3 and phi3; what differs between them are
switches in `ModelConfig`: biases on q, k and v, a norm on q and k, norms behind the attention and the MLP,
an offset of the norms' weights, a sliding window in all or some layers and a theta of its own there, heads
that are turned in part, scaled rotary frequencies, the scale and the cap of the scores, GELU for SiLU,
scaled embeddings, a tied head, capped logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from driftscope.artifacts.model import ModelConfig
from driftscope.evidence.taps import LAYER_TAPS, WHOLE_TAPS
from driftscope.forward.policy import WHOLE_MODEL

SITE_TENSORS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""Module of each matmul site within a layer, in Hugging Face's names."""

_PARTS = ("", "q", "k", "v")


SITE_INPUTS = {
    **dict.fromkeys(("q", "k", "v"), "attn_norm"),
    "o": "attention",
    **dict.fromkeys(("gate", "up"), "ffn_norm"),
    "down": "ffn_swiglu",
    "lm_head": "final_norm",
}
"""Tap that each matmul site reads."""

SITE_OUTPUTS = {
    **dict.fromkeys(("q", "k", "v"), "qkv_matmul"),
    "o": "attn_out",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_out",
    "lm_head": "lm_head",
}
"""Tap that each matmul site's product is in."""


@dataclass(frozen=True)
class Op:
    """One op of a model; its output is a tap.

    Attributes:
        tap: name of the output, without the layer.
        inputs: taps that it reads; those of the whole model, and the output of the layer before
            (``layer_input``), included.
        sites: the sites whose weights it reads (`driftscope.forward.policy.SITES`).
        channels: values a token, 0 where it depends on the length of the sequence (``ragged``).
        capture_point: what exactly the tap holds, so that taps of two engines can be told apart.
        ragged: delivered sequence by sequence as ``[tokens, heads * tokens]``.
    """

    tap: str
    inputs: tuple[str, ...]
    sites: tuple[str, ...]
    channels: int
    capture_point: str
    ragged: bool = False


@dataclass(frozen=True)
class Tap:
    """One tap of a model: an op's output at a layer (`WHOLE_MODEL` where it has none)."""

    layer: int
    op: Op

    @property
    def name(self) -> str:
        """Full name, e.g. ``layers.3.ffn_swiglu``."""
        return tap_name(self.layer, self.op.tap)


def tap_name(layer: int, tap: str) -> str:
    """Full name of a tap: ``embedding``, ``layers.3.ffn_swiglu``."""
    return tap if layer == WHOLE_MODEL else f"layers.{layer}.{tap}"


def op_order(layer: int, tap: str, part: str = "") -> tuple[int, int, int]:
    """A key that sorts ops topologically: embedding, the layers, final norm, LM head; q, k, v within a tap.

    Raises:
        ValueError: no such tap or part.
    """
    within = _PARTS.index(part)
    if layer != WHOLE_MODEL:
        return layer, LAYER_TAPS.index(tap), within
    return (WHOLE_MODEL if tap == "embedding" else 2**31), WHOLE_TAPS.index(tap), within


def embedding_op(config: ModelConfig) -> Op:
    """The op before the layers."""
    scaled = "not scaled" if config.embedding_scale == 1.0 else f"times {config.embedding_scale:.7g}"
    return Op("embedding", (), ("embed",), config.hidden_size, f"embedding rows, {scaled}")


def layer_ops(config: ModelConfig) -> tuple[Op, ...]:
    """The ops of one layer, in topological order."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    head_norm = "after the head norm and " if config.qk_norm else "after "
    biased = "after the bias" if config.attention_bias else "the model has no bias: equal to qkv_matmul"
    norm = _norm_point(config)
    turned = _rope_point(config)
    capped = f" and capped at {config.attention_softcap:g}" if config.attention_softcap else ""
    gelu = config.activation == "gelu_tanh"
    qk_sites = ("norms",) if config.qk_norm else ()
    attended, moved = ("post_attn_norm", "post_ffn_norm") if config.post_norms else ("attn_out", "ffn_out")
    before = "its norm" if config.post_norms else "the residual"
    ops = (
        Op("attn_norm", ("layer_input",), ("norms",), hidden, norm),
        Op(
            "qkv_matmul", ("attn_norm",), ("q", "k", "v"), q + 2 * kv, "q, k, v side by side, before the bias"
        ),
        Op("qkv_bias", ("qkv_matmul",), ("q", "k", "v"), q + 2 * kv, f"q, k, v side by side, {biased}"),
        Op(
            "q_post_rope",
            ("qkv_bias",),
            qk_sites,
            q,
            f"{head_norm}RoPE, split-half pairs, not scaled{turned}",
        ),
        Op("k_post_rope", ("qkv_bias",), qk_sites, kv, f"{head_norm}RoPE, split-half pairs{turned}"),
        Op(
            "attn_scores",
            ("q_post_rope", "k_post_rope"),
            (),
            0,
            f"q.k times the scale{capped}, before the mask, all keys of the sequence, head by head",
            ragged=True,
        ),
        Op(
            "attn_softmax",
            ("attn_scores",),
            (),
            0,
            f"softmax under the causal mask{_window_point(config)}",
            ragged=True,
        ),
        Op("attention", ("attn_softmax", "qkv_bias"), (), q, "heads side by side, before o_proj"),
        Op("attn_out", ("attention",), ("o",), hidden, f"after o_proj, before {before}"),
        Op("post_attn_norm", ("attn_out",), ("norms",), hidden, f"{norm}, before the residual"),
        Op("post_attn_residual", ("layer_input", attended), (), hidden, f"layer input plus {attended}"),
        Op("ffn_norm", ("post_attn_residual",), ("norms",), hidden, norm),
        Op("ffn_gate", ("ffn_norm",), ("gate",), ffn, "gate_proj, before the activation"),
        Op("ffn_up", ("ffn_norm",), ("up",), ffn, "up_proj"),
        Op("ffn_silu", ("ffn_gate",), (), ffn, f"{'gelu (tanh)' if gelu else 'silu'} of ffn_gate"),
        Op("ffn_swiglu", ("ffn_silu", "ffn_up"), (), ffn, "ffn_silu times ffn_up"),
        Op("ffn_out", ("ffn_swiglu",), ("down",), hidden, f"after down_proj, before {before}"),
        Op("post_ffn_norm", ("ffn_out",), ("norms",), hidden, f"{norm}, before the residual"),
        Op(
            "post_ffn_residual",
            ("post_attn_residual", moved),
            (),
            hidden,
            f"post_attn_residual plus {moved}: the layer's output",
        ),
    )
    return tuple(op for op in ops if config.post_norms or op.tap not in _POST_NORMS)


_POST_NORMS = ("post_attn_norm", "post_ffn_norm")


def _norm_point(config: ModelConfig) -> str:
    weight = f"{config.norm_offset:g} plus its weight" if config.norm_offset else "its weight"
    return f"RMSNorm times {weight}"


def _rope_point(config: ModelConfig) -> str:
    """What RoPE does beyond turning all pairs by plain frequencies."""
    rope_type = (config.rope_scaling or {}).get("rope_type")
    stretched = {"yarn": ", times YaRN's attention factor", "longrope": ", times LongRoPE's attention factor"}
    partly = f", the leading {config.rotary_dim} channels of a head" if config.rotary_dim else ""
    local = (
        f", theta {config.local_rope_theta:g} in layers with a window"
        if config.local_rope_theta and config.sliding_window
        else ""
    )
    return partly + local + stretched.get(str(rope_type), "")


def _window_point(config: ModelConfig) -> str:
    if not config.sliding_window:
        return ""
    some = "" if config.sliding_layers is None else ", in the layers that have one"
    return f" and a window of {config.sliding_window}{some}"


def head_ops(config: ModelConfig) -> tuple[Op, ...]:
    """The ops after the layers."""
    tied = " with the embedding's weights" if config.tie_word_embeddings else ""
    capped = f"capped at {config.logit_softcap:g}" if config.logit_softcap else "not capped"
    return (
        Op("final_norm", ("layer_input",), ("norms",), config.hidden_size, _norm_point(config)),
        Op("lm_head", ("final_norm",), ("lm_head",), config.vocab_size, f"logits{tied}, {capped}"),
    )


def taps(config: ModelConfig) -> Iterator[Tap]:
    """Every tap of a model, in topological order."""
    yield Tap(WHOLE_MODEL, embedding_op(config))
    ops = layer_ops(config)
    for layer in range(config.num_layers):
        for op in ops:
            yield Tap(layer, op)
    for op in head_ops(config):
        yield Tap(WHOLE_MODEL, op)


def site_shape(config: ModelConfig, site: str) -> tuple[int, int]:
    """Rows and columns of the weight of a matmul site."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, ffn = config.hidden_size, config.intermediate_size
    return {
        "q": (q, hidden),
        "k": (kv, hidden),
        "v": (kv, hidden),
        "o": (hidden, q),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
        "lm_head": (config.vocab_size, hidden),
    }[site]


def site_tensor(config: ModelConfig, layer: int, site: str) -> str:
    """Canonical name of the weight of a matmul site."""
    if site == "lm_head":
        return "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return f"model.layers.{layer}.{SITE_TENSORS[site]}.weight"


def norm_tensor(config: ModelConfig, layer: int, tap: str) -> str:
    """Canonical name of the weight of the norm that gives a tap: of a whole row, or of each head of q or k.

    Raises:
        ValueError: the tap is no norm's.
    """
    if tap == "final_norm":
        return "model.norm.weight"
    names = {
        "attn_norm": "input_layernorm",
        "q_post_rope": "self_attn.q_norm",
        "k_post_rope": "self_attn.k_norm",
        "post_attn_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm",
        "post_ffn_norm": "post_feedforward_layernorm",
    }
    if tap not in names:
        raise ValueError(f"tap {tap!r}; expected one of {', '.join((*names, 'final_norm'))}")
    return f"model.layers.{layer}.{names[tap]}.weight"


def score_scale(config: ModelConfig) -> float:
    """Factor of the attention scores."""
    return config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale


def attention_options(config: ModelConfig, layer: int) -> dict[str, Any]:
    """How a layer attends, as keywords of `driftscope.kernels.forward.attention` without its key heads."""
    return {
        "n_heads": config.num_heads,
        "scale": score_scale(config),
        "window": config.window_of(layer),
        "soft_cap": config.attention_softcap,
    }
