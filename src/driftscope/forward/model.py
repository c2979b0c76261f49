"""The streaming forward pass: one layer's weights at a time, whatever the size of the model."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from driftscope.forward.batch import TokenBatch
from driftscope.forward.ops import Ops
from driftscope.forward.policy import WHOLE_MODEL
from driftscope.forward.taps import TapConsumer

F32 = NDArray[np.float32]


class ForwardPass(Ops):
    """A model under a policy, ready to run.

    The pass keeps no state: running layers in chunks, in separate processes, gives the same bits as running
    them at once, and so does any number of threads. Arrays that come in and go out of the methods below lie
    on the host, those of the taps too.
    """

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
        hidden = self.embedding(batch)
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
        hidden = self.kernels.to_device(hidden)
        for layer in layers:
            hidden = self._attention_block(hidden, layer, batch, tap)
            hidden = self._mlp_block(hidden, layer, tap)
        return self.kernels.to_host(hidden)

    def head(self, hidden: F32, rows: NDArray[np.int64] | None = None, tap: TapConsumer | None = None) -> F32:
        """Final norm and LM head.

        Args:
            hidden: ``float32[n_tokens, hidden_size]``, the output of the last layer.
            rows: tokens whose logits are asked for, or None for all.
            tap: receives ``final_norm`` of all tokens and ``lm_head`` of the tokens asked for.

        Returns:
            ``float32[n_rows, vocabulary]``.
        """
        x = self.final_norm(self.kernels.to_device(hidden))
        self._emit(tap, WHOLE_MODEL, "final_norm", x)
        asked = x if rows is None else x[self.kernels.to_device(rows)]
        logits = self.kernels.to_host(self.logits(asked))
        self._emit(tap, WHOLE_MODEL, "lm_head", logits)
        return logits

    def _attention_block(self, hidden: F32, layer: int, batch: TokenBatch, tap: TapConsumer | None) -> F32:
        x = self.attn_norm(layer, hidden)
        self._emit(tap, layer, "attn_norm", x)
        q, k, v = (self.project(layer, site, x) for site in ("q", "k", "v"))
        self._emit(tap, layer, "qkv_matmul", q, k, v)
        q, k, v = (self.biased(layer, site, y) for site, y in zip(("q", "k", "v"), (q, k, v), strict=True))
        self._emit(tap, layer, "qkv_bias", q, k, v)
        q, k = self.turned(layer, "q", q, batch), self.turned(layer, "k", k, batch)
        self._emit(tap, layer, "q_post_rope", q)
        self._emit(tap, layer, "k_post_rope", k)
        self._emit_attention_maps(tap, layer, q, k, batch)
        x = self.attend(layer, q, k, v, batch)
        self._emit(tap, layer, "attention", x)
        x = self.project(layer, "o", x)
        self._emit(tap, layer, "attn_out", x)
        if self.config.post_norms:
            x = self.post_attn_norm(layer, x)
            self._emit(tap, layer, "post_attn_norm", x)
        hidden = self.add(layer, "post_attn_residual", hidden, x)
        self._emit(tap, layer, "post_attn_residual", hidden)
        return hidden

    def _mlp_block(self, hidden: F32, layer: int, tap: TapConsumer | None) -> F32:
        x = self.ffn_norm(layer, hidden)
        self._emit(tap, layer, "ffn_norm", x)
        gate, up = self.project(layer, "gate", x), self.project(layer, "up", x)
        self._emit(tap, layer, "ffn_gate", gate)
        self._emit(tap, layer, "ffn_up", up)
        x = self.activated(layer, gate)
        self._emit(tap, layer, "ffn_silu", x)
        x = self.gated(layer, x, up)
        self._emit(tap, layer, "ffn_swiglu", x)
        x = self.project(layer, "down", x)
        self._emit(tap, layer, "ffn_out", x)
        if self.config.post_norms:
            x = self.post_ffn_norm(layer, x)
            self._emit(tap, layer, "post_ffn_norm", x)
        hidden = self.add(layer, "post_ffn_residual", hidden, x)
        self._emit(tap, layer, "post_ffn_residual", hidden)
        return hidden

    def _emit_attention_maps(
        self, tap: TapConsumer | None, layer: int, q: F32, k: F32, batch: TokenBatch
    ) -> None:
        if tap is None or not (tap.wants(layer, "attn_scores") or tap.wants(layer, "attn_softmax")):
            return
        for sequence, tokens in enumerate(batch.slices):
            scores = self.scores(layer, q[tokens], k[tokens])
            self._emit(tap, layer, "attn_scores", scores, sequence=sequence)
            if tap.wants(layer, "attn_softmax"):
                self._emit(tap, layer, "attn_softmax", self.softmax(layer, scores), sequence=sequence)

    def _emit(
        self, tap: TapConsumer | None, layer: int, name: str, *parts: F32, sequence: int | None = None
    ) -> None:
        if tap is not None and tap.wants(layer, name):
            arrays = [self.kernels.to_host(part) for part in parts]
            array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)
            tap(layer, name, array, sequence=sequence)
