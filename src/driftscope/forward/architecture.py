"""A model's ops in the order in which they run, and what each tap of a trace holds.

One list serves llama, mistral, qwen2 and qwen3; what differs between them are switches in `ModelConfig`:
biases on q, k and v, a norm on q and k, a sliding window, a tied head, scaled rotary frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from driftscope.artifacts.model import ModelConfig
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


LAYER_TAPS = (
    *("attn_norm", "qkv_matmul", "qkv_bias", "q_post_rope", "k_post_rope", "attn_scores", "attn_softmax"),
    *("attention", "attn_out", "post_attn_residual", "ffn_norm", "ffn_gate", "ffn_up", "ffn_silu"),
    *("ffn_swiglu", "ffn_out", "post_ffn_residual"),
)
"""Taps of a layer, in topological order: those of `layer_ops`."""

WHOLE_TAPS = ("embedding", "final_norm", "lm_head")
"""Taps of the whole model, in topological order."""

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
    return Op("embedding", (), ("embed",), config.hidden_size, "embedding rows, not scaled")


def layer_ops(config: ModelConfig) -> tuple[Op, ...]:
    """The ops of one layer, in topological order."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    head_norm = "after the head norm and " if config.qk_norm else "after "
    biased = "after the bias" if config.attention_bias else "the model has no bias: equal to qkv_matmul"
    window = f" and a window of {config.sliding_window}" if config.sliding_window else ""
    stretched = (
        ", times YaRN's attention factor" if (config.rope_scaling or {}).get("rope_type") == "yarn" else ""
    )
    qk_sites = ("norms",) if config.qk_norm else ()
    return (
        Op("attn_norm", ("layer_input",), ("norms",), hidden, "RMSNorm times its weight"),
        Op(
            "qkv_matmul", ("attn_norm",), ("q", "k", "v"), q + 2 * kv, "q, k, v side by side, before the bias"
        ),
        Op("qkv_bias", ("qkv_matmul",), ("q", "k", "v"), q + 2 * kv, f"q, k, v side by side, {biased}"),
        Op(
            "q_post_rope",
            ("qkv_bias",),
            qk_sites,
            q,
            f"{head_norm}RoPE, split-half pairs, not scaled{stretched}",
        ),
        Op("k_post_rope", ("qkv_bias",), qk_sites, kv, f"{head_norm}RoPE, split-half pairs{stretched}"),
        Op(
            "attn_scores",
            ("q_post_rope", "k_post_rope"),
            (),
            0,
            "q.k times the scale, before the mask, all keys of the sequence, head by head",
            ragged=True,
        ),
        Op("attn_softmax", ("attn_scores",), (), 0, f"softmax under the causal mask{window}", ragged=True),
        Op("attention", ("attn_softmax", "qkv_bias"), (), q, "heads side by side, before o_proj"),
        Op("attn_out", ("attention",), ("o",), hidden, "after o_proj, before the residual"),
        Op("post_attn_residual", ("layer_input", "attn_out"), (), hidden, "layer input plus attn_out"),
        Op("ffn_norm", ("post_attn_residual",), ("norms",), hidden, "RMSNorm times its weight"),
        Op("ffn_gate", ("ffn_norm",), ("gate",), ffn, "gate_proj, before the activation"),
        Op("ffn_up", ("ffn_norm",), ("up",), ffn, "up_proj"),
        Op("ffn_silu", ("ffn_gate",), (), ffn, "silu of ffn_gate"),
        Op("ffn_swiglu", ("ffn_silu", "ffn_up"), (), ffn, "ffn_silu times ffn_up"),
        Op("ffn_out", ("ffn_swiglu",), ("down",), hidden, "after down_proj, before the residual"),
        Op(
            "post_ffn_residual",
            ("post_attn_residual", "ffn_out"),
            (),
            hidden,
            "post_attn_residual plus ffn_out: the layer's output",
        ),
    )


def head_ops(config: ModelConfig) -> tuple[Op, ...]:
    """The ops after the layers."""
    tied = " with the embedding's weights" if config.tie_word_embeddings else ""
    return (
        Op("final_norm", ("layer_input",), ("norms",), config.hidden_size, "RMSNorm times its weight"),
        Op("lm_head", ("final_norm",), ("lm_head",), config.vocab_size, f"logits{tied}, not capped"),
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
