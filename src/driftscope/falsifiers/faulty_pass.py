"""Passes with a known fault, made through hyperparameters and inputs; no kernel is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import Policy

F32 = NDArray[np.float32]


class FaultyPass(ForwardPass):
    """A pass whose rotary angles, attention scores or logits are wrong.

    Attributes:
        score_gain: factor of the attention scores.
        mixed_head: share of the channels that the LM head reads in reverse order.
    """

    def __init__(
        self,
        artifacts: Mapping[str, Artifact],
        policy: Policy,
        *,
        theta: float = 1.0,
        angle: float = 1.0,
        score_gain: float = 1.0,
        mixed_head: float = 0.0,
        threads: int = 1,
    ) -> None:
        """Prepare a pass.

        Args:
            artifacts: as in `ForwardPass`.
            policy: as in `ForwardPass`.
            theta: factor of the base of the rotary frequencies.
            angle: factor of the rotary angles; 0 for no RoPE.
            score_gain: factor of the attention scores.
            mixed_head: share of the channels that the LM head reads in reverse order.
            threads: number of threads; the result does not depend on it.
        """
        role = policy.base.artifact
        config = artifacts[role].config
        changed = dataclasses.replace(config, rope_theta=theta * config.rope_theta)
        faulty = {**artifacts, role: dataclasses.replace(artifacts[role], config=changed)}
        super().__init__(faulty, policy, threads=threads)
        self._rotations = self._rotations.times(np.float32(angle))
        self.score_gain, self.mixed_head = score_gain, mixed_head

    def head(self, hidden: F32, rows: NDArray[np.int64] | None = None, tap: object = None) -> F32:
        """Final norm and LM head; the norm's weight stays with its channel."""
        read = np.arange(hidden.shape[1])
        count = int(self.mixed_head * len(read))
        read[:count] = read[:count][::-1]
        return super().head(np.ascontiguousarray(hidden[:, read]), rows)

    def attend(self, layer: int, q: F32, k: F32, v: F32, batch: TokenBatch) -> F32:
        return super().attend(layer, q * np.float32(self.score_gain), k, v, batch)
