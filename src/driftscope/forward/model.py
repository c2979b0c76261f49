"""The streaming forward pass: one layer's weights at a time, whatever the size of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import ROPE_FREQS
from driftscope.errors import InputError
from driftscope.forward.architecture import Op, site_shape, site_tensor
from driftscope.forward.batch import TokenBatch
from driftscope.forward.policy import MATMUL_SITES, WHOLE_MODEL, Policy
from driftscope.forward.rotary import longest_sequence, rope_frequencies, rope_scale
from driftscope.forward.taps import TapConsumer
from driftscope.forward.weights import Weights
from driftscope.kernels.device import kernels_on

F32 = NDArray[np.float32]

_EMBEDDING = "model.embed_tokens.weight"
_SHARED_FIELDS = (
    "hidden_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "attention_bias",
    "qk_norm",
)
"""What artifacts must agree on for their weights to be mixed in one pass."""


class ForwardPass:
    """A model under a policy, ready to run.

    The hyperparameters are those of the artifact of the policy's base choice. The pass keeps no state:
    running layers in chunks, in separate processes, gives the same bits as running them at once, and so
    does any number of threads. Arrays that come in and go out lie on the host, those of the taps too.
    """

    def __init__(
        self, artifacts: Mapping[str, Artifact], policy: Policy, *, threads: int = 1, device: str = "cpu"
    ) -> None:
        """Prepare a pass.

        Args:
            artifacts: by the roles that the policy names.
            policy: which weights and which arithmetic each site uses.
            threads: number of threads; the result does not depend on it.
            device: ``cpu`` or ``cuda`` (`driftscope.kernels.device.choose_device`).

        Raises:
            InputError: a role has no artifact, two artifacts are not of one shape, or the rotary scaling
                is not implemented.
        """
        for role in policy.artifacts:
            if role not in artifacts:
                raise InputError(f"policy: no artifact for the role {role!r}")
        self.policy = policy
        self._threads = threads
        self.config: ModelConfig = artifacts[policy.base.artifact].config
        self._kernels = kernels_on(device, threads)
        self._weights = {role: Weights(artifacts[role], self._kernels) for role in policy.artifacts}
        for role in policy.artifacts:
            _check_same_shape(artifacts[policy.base.artifact], artifacts[role])
        base = self._weights[policy.base.artifact]
        half = self.config.head_dim // 2
        stored = ROPE_FREQS in base.artifact.tensors
        factors = self._kernels.to_host(base.vector(ROPE_FREQS, half)) if stored else None
        self._frequencies = rope_frequencies(self.config, factors)

    def run(self, batch: TokenBatch, tap: TapConsumer | None = None) -> F32:
        """The whole pass: logits of every token as ``float32[n_tokens, vocabulary]``."""
        hidden = self.embed(batch, tap)
        hidden = self.run_layers(hidden, batch, range(self.config.num_layers), tap)
        return self.head(hidden, tap=tap)

    def embed(self, batch: TokenBatch, tap: TapConsumer | None = None) -> F32:
        """Embedding rows of the tokens as ``float32[n_tokens, hidden_size]``.

        Raises:
            InputError: a sequence is longer than the context, or an id is outside of the vocabulary.
        """
        if batch.longest > longest_sequence(self.config):
            path = self._weights[self.policy.base.artifact].artifact.path
            raise InputError(
                f"{path}: a prompt of {batch.longest} tokens is longer than the model's context of "
                f"{longest_sequence(self.config)} tokens"
            )
        largest = int(batch.ids.max())
        if largest >= self.config.vocab_size or int(batch.ids.min()) < 0:
            raise InputError(
                f"token id {largest} is outside of the vocabulary of {self.config.vocab_size} tokens"
            )
        weights = self._weights[self.policy.choice(WHOLE_MODEL, "embed").artifact]
        hidden = weights.rows(_EMBEDDING, (self.config.vocab_size, self.config.hidden_size), batch.ids)
        self._emit(tap, WHOLE_MODEL, "embedding", hidden)
        return hidden

    def run_layers(
        self, hidden: F32, batch: TokenBatch, layers: Iterable[int], tap: TapConsumer | None = None
    ) -> F32:
        """Run some layers, one after the other.

        Args:
            hidden: ``float32[n_tokens, hidden_size]``, the input of the first of them.
            batch: the tokens, for their positions.
            layers: ascending layer numbers.
            tap: receives the taps of these layers.

        Returns:
            ``float32[n_tokens, hidden_size]``, the output of the last of them.
        """
        scale = rope_scale(self.config)
        cosine, sine = self._kernels.rope_tables(self._frequencies, batch.longest, scale=scale)
        hidden = self._kernels.to_device(hidden)
        for layer in layers:
            hidden = self._attention_block(hidden, layer, batch, cosine, sine, tap)
            hidden = self._mlp_block(hidden, layer, tap)
        return self._kernels.to_host(hidden)

    def head(self, hidden: F32, rows: NDArray[np.int64] | None = None, tap: TapConsumer | None = None) -> F32:
        """Final norm and LM head.

        Args:
            hidden: ``float32[n_tokens, hidden_size]``, the output of the last layer.
            rows: tokens whose logits are asked for, or None for all.
            tap: receives ``final_norm`` of all tokens and ``lm_head`` of the tokens asked for.

        Returns:
            ``float32[n_rows, vocabulary]``.
        """
        x = self._norm(self._kernels.to_device(hidden), WHOLE_MODEL, "model.norm.weight")
        self._emit(tap, WHOLE_MODEL, "final_norm", x)
        asked = x if rows is None else x[self._kernels.to_device(rows)]
        logits = self._kernels.to_host(self._matmul(asked, WHOLE_MODEL, "lm_head"))
        self._emit(tap, WHOLE_MODEL, "lm_head", logits)
        return logits

    def activation_format(self, layer: int, op: Op) -> str:
        """Format that an op rounds its activation to, e.g. ``q8_K``; several are joined by ``+``.

        ``none`` where it is not rounded or the op multiplies no weights.
        """
        formats = []
        for site in op.sites:
            if site in MATMUL_SITES and op.tap != "qkv_bias":
                choice = self.policy.choice(layer, site)
                weights = self._weights[choice.artifact]
                name = site_tensor(weights.artifact.config, layer, site)
                formats.append(weights.activation_format(name, choice))
        return "+".join(dict.fromkeys(formats)) or "none"

    def _attention_block(
        self, hidden: F32, layer: int, batch: TokenBatch, cosine: F32, sine: F32, tap: TapConsumer | None
    ) -> F32:
        config = self.config
        x = self._norm(hidden, layer, f"model.layers.{layer}.input_layernorm.weight")
        self._emit(tap, layer, "attn_norm", x)
        q, k, v = (self._matmul(x, layer, site) for site in ("q", "k", "v"))
        self._emit(tap, layer, "qkv_matmul", q, k, v)
        if config.attention_bias:
            q, k, v = (
                y + self._bias(layer, site) for y, site in zip((q, k, v), ("q", "k", "v"), strict=True)
            )
        self._emit(tap, layer, "qkv_bias", q, k, v)
        if config.qk_norm:
            q = self._norm(q, layer, f"model.layers.{layer}.self_attn.q_norm.weight", config.head_dim)
            k = self._norm(k, layer, f"model.layers.{layer}.self_attn.k_norm.weight", config.head_dim)
        positions = self._kernels.to_device(batch.positions)
        q, k = (self._kernels.rope(x, cosine, sine, positions) for x in (q, k))
        self._emit(tap, layer, "q_post_rope", q)
        self._emit(tap, layer, "k_post_rope", k)
        self._emit_attention_maps(tap, layer, q, k, batch)
        x = self._attend(layer, q, k, v, batch)
        self._emit(tap, layer, "attention", x)
        x = self._matmul(x, layer, "o")
        self._emit(tap, layer, "attn_out", x)
        hidden = hidden + x
        self._emit(tap, layer, "post_attn_residual", hidden)
        return hidden

    def _attend(self, layer: int, q: F32, k: F32, v: F32, batch: TokenBatch) -> F32:
        """Attention of a layer; a pass that keeps keys and values puts its own in this place."""
        config = self.config
        found: F32 = self._kernels.attention(
            q,
            k,
            v,
            batch.boundaries,
            n_heads=config.num_heads,
            n_kv_heads=config.num_kv_heads,
            scale=config.head_dim**-0.5,
            window=config.sliding_window,
            kv_type=self.policy.kv_type,
        )
        return found

    def _mlp_block(self, hidden: F32, layer: int, tap: TapConsumer | None) -> F32:
        x = self._norm(hidden, layer, f"model.layers.{layer}.post_attention_layernorm.weight")
        self._emit(tap, layer, "ffn_norm", x)
        gate, up = self._matmul(x, layer, "gate"), self._matmul(x, layer, "up")
        self._emit(tap, layer, "ffn_gate", gate)
        self._emit(tap, layer, "ffn_up", up)
        x = self._kernels.silu(gate)
        self._emit(tap, layer, "ffn_silu", x)
        x = x * up
        self._emit(tap, layer, "ffn_swiglu", x)
        x = self._matmul(x, layer, "down")
        self._emit(tap, layer, "ffn_out", x)
        hidden = hidden + x
        self._emit(tap, layer, "post_ffn_residual", hidden)
        return hidden

    def _emit_attention_maps(
        self, tap: TapConsumer | None, layer: int, q: F32, k: F32, batch: TokenBatch
    ) -> None:
        if tap is None or not (tap.wants(layer, "attn_scores") or tap.wants(layer, "attn_softmax")):
            return
        config = self.config
        for sequence, tokens in enumerate(batch.slices):
            scores = self._kernels.attention_scores(
                q[tokens],
                k[tokens],
                n_heads=config.num_heads,
                n_kv_heads=config.num_kv_heads,
                scale=config.head_dim**-0.5,
                kv_type=self.policy.kv_type,
            )
            self._emit(tap, layer, "attn_scores", scores, sequence=sequence)
            if tap.wants(layer, "attn_softmax"):
                weights = self._kernels.attention_softmax(
                    scores, n_heads=config.num_heads, window=config.sliding_window
                )
                self._emit(tap, layer, "attn_softmax", weights, sequence=sequence)

    def _norm(self, x: F32, layer: int, name: str, channels: int | None = None) -> F32:
        weights = self._weights[self.policy.choice(layer, "norms").artifact]
        weight = weights.vector(name, channels or self.config.hidden_size)
        found: F32 = self._kernels.rms_norm(x, weight, self.config.rms_norm_eps)
        return found

    def _matmul(self, x: F32, layer: int, site: str) -> F32:
        choice = self.policy.choice(layer, site)
        weights = self._weights[choice.artifact]
        # Whether the head is tied is a property of the artifact that the weights come from.
        name = site_tensor(weights.artifact.config, layer, site)
        return weights.matmul(x, name, site_shape(self.config, site), choice)

    def _bias(self, layer: int, site: str) -> F32:
        weights = self._weights[self.policy.choice(layer, site).artifact]
        name = site_tensor(self.config, layer, site).removesuffix("weight") + "bias"
        return weights.vector(name, site_shape(self.config, site)[0])

    def _emit(
        self, tap: TapConsumer | None, layer: int, name: str, *parts: F32, sequence: int | None = None
    ) -> None:
        if tap is not None and tap.wants(layer, name):
            arrays = [self._kernels.to_host(part) for part in parts]
            array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
            tap(layer, name, array, sequence=sequence)


def _check_same_shape(a: Artifact, b: Artifact) -> None:
    for name in _SHARED_FIELDS:
        if getattr(a.config, name) != getattr(b.config, name):
            raise InputError(
                f"{b.path}: {name} is {getattr(b.config, name)}, but {getattr(a.config, name)} in {a.path}; "
                "expected two artifacts of one model"
            )
