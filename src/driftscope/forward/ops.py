"""The ops of a model, one method each: what a forward pass strings together and a replay runs singly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import ROPE_FREQS
from driftscope.errors import InputError
from driftscope.forward.architecture import Op, attention_options, norm_tensor, site_shape, site_tensor
from driftscope.forward.batch import TokenBatch
from driftscope.forward.policy import MATMUL_SITES, WHOLE_MODEL, Policy
from driftscope.forward.rotary import Rotations, longest_sequence, rotary_dim
from driftscope.forward.weights import Weights
from driftscope.kernels.device import kernels_on
from driftscope.kernels.forward import to_f16
from driftscope.kernels.matmul import matmul_f32

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
    "post_norms",
)
"""What artifacts must agree on for their weights to be mixed in one pass."""

_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu"}
"""Activation of the gate to its kernel."""


class Ops:
    """A model's ops under a policy. Arrays that come in and go out lie on the device of the kernels.

    Attributes:
        policy: which weights and which arithmetic each site uses.
        config: hyperparameters, those of the artifact of the policy's base choice.
        kernels: those of the device.
    """

    def __init__(
        self, artifacts: Mapping[str, Artifact], policy: Policy, *, threads: int = 1, device: str = "cpu"
    ) -> None:
        """Prepare the ops.

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
        self.kernels = kernels_on(device, threads)
        self._weights = {role: Weights(artifacts[role], self.kernels) for role in policy.artifacts}
        for role in policy.artifacts:
            check_same_shape(artifacts[policy.base.artifact], artifacts[role])
        base = self._weights[policy.base.artifact]
        half = rotary_dim(self.config) // 2
        stored = ROPE_FREQS in base.artifact.tensors
        factors = self.kernels.to_host(base.vector(ROPE_FREQS, half)) if stored else None
        self._rotations = Rotations(self.config, factors)
        # Rows of the tables that tokens turn by, and the same on the device.
        self._rows: tuple[NDArray[np.int64], Any] | None = None
        self._activation = _ACTIVATIONS.get(self.config.activation, "")
        if not self._activation:
            raise InputError(
                f"{base.artifact.path}: activation {self.config.activation!r} has no forward pass; "
                f"expected one of {', '.join(_ACTIVATIONS)}"
            )

    def embedding(self, batch: TokenBatch) -> F32:
        """Embedding rows of the tokens as ``float32[n_tokens, hidden_size]``, on the host.

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
        rows = weights.rows(_EMBEDDING, (self.config.vocab_size, self.config.hidden_size), batch.ids)
        scale = np.float32(self.config.embedding_scale)
        return rows if scale == 1 else rows * scale

    def attn_norm(self, layer: int, x: F32) -> F32:
        """RMSNorm before the attention."""
        return self._norm(x, layer, "attn_norm")

    def project(self, layer: int, site: str, x: F32) -> F32:
        """Multiply with the weight of a matmul site, without its bias."""
        choice = self.policy.choice(layer, site)
        weights = self._weights[choice.artifact]
        # Whether the head is tied is a property of the artifact that the weights come from.
        name = site_tensor(weights.artifact.config, layer, site)
        return weights.matmul(x, name, site_shape(self.config, site), choice)

    def biased(self, layer: int, site: str, y: F32) -> F32:
        """Add the bias of q, k or v, where the model has one."""
        if not self.config.attention_bias:
            return y
        weights = self._weights[self.policy.choice(layer, site).artifact]
        name = site_tensor(self.config, layer, site).removesuffix("weight") + "bias"
        summed: F32 = y + weights.vector(name, site_shape(self.config, site)[0])
        return summed

    def turned(self, layer: int, site: str, y: F32, batch: TokenBatch) -> F32:
        """The norm of each head, where the model has one, and RoPE, of ``q`` or ``k``."""
        if self.config.qk_norm:
            y = self._norm(y, layer, f"{site}_post_rope", self.config.head_dim)
        return self._turn(layer, y, batch)

    def scores(self, layer: int, q: F32, k: F32) -> F32:
        """Scores of one sequence, ``float32[t, heads * t]``, scaled and capped, before the mask."""
        options = attention_options(self.config, layer)
        del options["window"]
        found: F32 = self.kernels.attention_scores(
            q, k, n_kv_heads=self.config.num_kv_heads, kv_type=self.policy.kv_type, **options
        )
        return found

    def softmax(self, layer: int, scores: F32) -> F32:
        """Softmax of the scores of one sequence under the mask."""
        found: F32 = self.kernels.attention_softmax(
            scores, n_heads=self.config.num_heads, window=self.config.window_of(layer)
        )
        return found

    def weigh(self, layer: int, weights: F32, v: F32) -> F32:
        """Weighted sum of the values of one sequence: the last step of `attend`, on the CPU.

        Args:
            layer: its layer.
            weights: ``float32[t, heads * t]`` from `softmax`.
            v: ``float32[t, kv_heads * head_dim]``.

        Returns:
            ``float32[t, heads * head_dim]``, with the bits of `attend` but for the sign of zeros.
        """
        if self.policy.kv_type == "f16":
            weights, v = to_f16(weights), to_f16(v)
        length, head_dim = v.shape[0], self.config.head_dim
        group = self.config.num_heads // self.config.num_kv_heads
        heads = []
        for head in range(self.config.num_heads):
            kv = head // group
            values = np.ascontiguousarray(v[:, kv * head_dim : (kv + 1) * head_dim].T)
            heads.append(matmul_f32(weights[:, head * length : (head + 1) * length], values))
        return np.concatenate(heads, axis=1)

    def attend(self, layer: int, q: F32, k: F32, v: F32, batch: TokenBatch) -> F32:
        """Attention of all sequences, ``float32[n_tokens, heads * head_dim]``: scores, softmax, weighted sum.

        A pass that keeps keys and values puts its own in this place.
        """
        found: F32 = self.kernels.attention(
            q,
            k,
            v,
            batch.boundaries,
            n_kv_heads=self.config.num_kv_heads,
            kv_type=self.policy.kv_type,
            **attention_options(self.config, layer),
        )
        return found

    def post_attn_norm(self, layer: int, x: F32) -> F32:
        """RMSNorm of the attention's output, in models that have one."""
        return self._norm(x, layer, "post_attn_norm")

    def add(self, layer: int, tap: str, residual: F32, x: F32) -> F32:
        """The residual stream plus a block's output; `tap` names the sum."""
        summed: F32 = residual + x
        return summed

    def ffn_norm(self, layer: int, x: F32) -> F32:
        """RMSNorm before the MLP."""
        return self._norm(x, layer, "ffn_norm")

    def activated(self, layer: int, gate: F32) -> F32:
        """SiLU or GELU of the gate."""
        found: F32 = getattr(self.kernels, self._activation)(gate)
        return found

    def gated(self, layer: int, activated: F32, up: F32) -> F32:
        """The activated gate times up."""
        product: F32 = activated * up
        return product

    def post_ffn_norm(self, layer: int, x: F32) -> F32:
        """RMSNorm of the MLP's output, in models that have one."""
        return self._norm(x, layer, "post_ffn_norm")

    def final_norm(self, x: F32) -> F32:
        """RMSNorm before the LM head."""
        return self._norm(x, WHOLE_MODEL, "final_norm")

    def logits(self, x: F32) -> F32:
        """LM head, capped where the model caps its logits."""
        found = self.project(WHOLE_MODEL, "lm_head", x)
        if self.config.logit_softcap:
            found = self.kernels.soft_cap(found, self.config.logit_softcap)
        return found

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

    def _norm(self, x: F32, layer: int, tap: str, channels: int | None = None) -> F32:
        """The norm that gives a tap, or that is the first step of it."""
        weights = self._weights[self.policy.choice(layer, "norms").artifact]
        weight = weights.norm(norm_tensor(self.config, layer, tap), channels or self.config.hidden_size)
        found: F32 = self.kernels.rms_norm(x, weight, self.config.rms_norm_eps)
        return found

    def _turn(
        self,
        layer: int,
        y: F32,
        batch: TokenBatch,
        *,
        positions: NDArray[np.int64] | None = None,
        interleaved: bool = False,
    ) -> F32:
        """RoPE of q or k at the batch's positions, or at others."""
        cosine, sine, rows = self._rotations.tables(layer, batch, self.kernels.rope_tables, positions)
        if self._rows is None or self._rows[0] is not rows:
            self._rows = (rows, self.kernels.to_device(rows))
        found: F32 = self.kernels.rope(
            y, cosine, sine, self._rows[1], interleaved=interleaved, head_dim=self.config.head_dim
        )
        return found


def check_same_shape(a: Artifact, b: Artifact) -> None:
    """Check that two artifacts are of one model, as far as their hyperparameters say.

    Raises:
        InputError: they differ in one that decides a shape.
    """
    for name in _SHARED_FIELDS:
        if getattr(a.config, name) != getattr(b.config, name):
            raise InputError(
                f"{b.path}: {name} is {getattr(b.config, name)}, but {getattr(a.config, name)} in {a.path}; "
                "expected two artifacts of one model"
            )
