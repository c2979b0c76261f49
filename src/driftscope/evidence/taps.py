"""Names of taps, as evidence tables have them, in the order in which a forward pass makes them."""

from __future__ import annotations

LAYER_TAPS = (
    *("attn_norm", "qkv_matmul", "qkv_bias", "q_post_rope", "k_post_rope", "attn_scores", "attn_softmax"),
    *("attention", "attn_out", "post_attn_norm", "post_attn_residual", "ffn_norm", "ffn_gate", "ffn_up"),
    *("ffn_silu", "ffn_swiglu", "ffn_out", "post_ffn_norm", "post_ffn_residual"),
)
"""All taps that a layer can have, in topological order; not every architecture has each."""

WHOLE_TAPS = ("embedding", "final_norm", "lm_head")
"""Taps of the whole model, in topological order."""
