"""The ops of a model, one method each: what a forward pass strings together and a replay runs singly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import ROPE_FREQS
from driftscope.errors import InputError
from driftscope.forward.architecture import Op, site_shape, site_tensor
from driftscope.forward.batch import TokenBatch
from driftscope.forward.policy import MATMUL_SITES, WHOLE_MODEL, Policy
from driftscope.forward.rotary import longest_sequence, rope_frequencies, rope_scale
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
)
"""What artifacts must agree on for their weights to be mixed in one pass."""


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
        half = self.config.head_dim // 2
        stored = ROPE_FREQS in base.artifact.tensors
        factors = self.kernels.to_host(base.vector(ROPE_FREQS, half)) if stored else None
        self._frequencies = rope_frequencies(self.config, factors)
        self._rotation: tuple[TokenBatch, tuple[F32, F32, Any]] | None = None

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
        return weights.rows(_EMBEDDING, (self.config.vocab_size, self.config.hidden_size), batch.ids)

    def attn_norm(self, layer: int, x: F32) -> F32:
        """RMSNorm before the attention."""
        return self._norm(x, layer, f"model.layers.{layer}.input_layernorm.weight")

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
            name = f"model.layers.{layer}.self_attn.{site}_norm.weight"
            y = self._norm(y, layer, name, self.config.head_dim)
        found: F32 = self.kernels.rope(y, *self._rotation_of(batch))
        return found

    def scores(self, layer: int, q: F32, k: F32) -> F32:
        """Scores of one sequence, ``float32[t, heads * t]``, scaled, before the mask."""
        found: F32 = self.kernels.attention_scores(
            q,
            k,
            n_heads=self.config.num_heads,
            n_kv_heads=self.config.num_kv_heads,
            scale=self.config.head_dim**-0.5,
            kv_type=self.policy.kv_type,
        )
        return found

    def softmax(self, layer: int, scores: F32) -> F32:
        """Softmax of the scores of one sequence under the mask."""
        found: F32 = self.kernels.attention_softmax(
            scores, n_heads=self.config.num_heads, window=self.config.sliding_window
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
        config = self.config
        found: F32 = self.kernels.attention(
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

    def add(self, layer: int, tap: str, residual: F32, x: F32) -> F32:
        """The residual stream plus a block's output; `tap` names the sum."""
        summed: F32 = residual + x
        return summed

    def ffn_norm(self, layer: int, x: F32) -> F32:
        """RMSNorm before the MLP."""
        return self._norm(x, layer, f"model.layers.{layer}.post_attention_layernorm.weight")

    def activated(self, layer: int, gate: F32) -> F32:
        """SiLU of the gate."""
        found: F32 = self.kernels.silu(gate)
        return found

    def gated(self, layer: int, activated: F32, up: F32) -> F32:
        """The activated gate times up."""
        product: F32 = activated * up
        return product

    def final_norm(self, x: F32) -> F32:
        """RMSNorm before the LM head."""
        return self._norm(x, WHOLE_MODEL, "model.norm.weight")

    def logits(self, x: F32) -> F32:
        """LM head."""
        return self.project(WHOLE_MODEL, "lm_head", x)

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

    def _norm(self, x: F32, layer: int, name: str, channels: int | None = None) -> F32:
        weights = self._weights[self.policy.choice(layer, "norms").artifact]
        weight = weights.vector(name, channels or self.config.hidden_size)
        found: F32 = self.kernels.rms_norm(x, weight, self.config.rms_norm_eps)
        return found

    def _rotation_of(self, batch: TokenBatch) -> tuple[F32, F32, Any]:
        """Cosines, sines and positions, which every layer of a batch turns by."""
        if self._rotation is None or self._rotation[0] is not batch:
            tables = self.kernels.rope_tables(self._frequencies, batch.longest, scale=rope_scale(self.config))
            self._rotation = (batch, (*tables, self.kernels.to_device(batch.positions)))
        return self._rotation[1]


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
