"""The model's own activations: what its matmul sites are given in a short pass over the case's prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact
from driftscope.falsifiers.super_block import F32
from driftscope.forward.architecture import SITE_INPUTS
from driftscope.forward.policy import LAYER_SITES

PROMPTS = "prompts.json"

INPUT_TAPS: Mapping[str, str] = {site: SITE_INPUTS[site] for site in LAYER_SITES}
"""Matmul site to the tap that is its input."""


@dataclass(frozen=True)
class OwnActivations:
    """Inputs of matmul sites, for the tokens of several prompts in one batch.

    Attributes:
        arrays: layer and tap to ``float32[tokens, channels]``.
        prompt: ``int64[tokens]``, number of each token's prompt.
        position: ``int64[tokens]``, its position in it.
    """

    arrays: Mapping[tuple[int, str], F32]
    prompt: NDArray[np.int64]
    position: NDArray[np.int64]

    def at(self, layer: int, site: str) -> F32:
        """``float32[tokens, channels]``: what a site of a layer is given."""
        return self.arrays[layer, INPUT_TAPS[site]]


def own_activations(
    artifact: Artifact, path: str, prompts: Mapping[str, Any], *, most_tokens: int
) -> OwnActivations:
    """Run the configured prompts, each cut to its first tokens, and keep what the matmul sites are given.

    Args:
        artifact: the model of the path.
        path: one of `driftscope.engines.own.PATHS`.
        prompts: the document ``prompts.json``.
        most_tokens: of each prompt.
    """
    from driftscope.engines.own import forward_pass
    from driftscope.forward.batch import TokenBatch
    from driftscope.forward.taps import Collector

    forward = forward_pass({path.partition(".")[0]: artifact}, path)
    batch = TokenBatch.of([prompt["ids"][:most_tokens] for prompt in prompts["trace"]])
    wanted = set(INPUT_TAPS.values())
    collector = Collector(lambda name: name.rpartition(".")[2] in wanted)
    hidden = forward.embed(batch, collector)
    forward.run_layers(hidden, batch, range(artifact.config.num_layers), collector)
    arrays = {
        (layer, tap): collector.arrays[f"layers.{layer}.{tap}"]
        for layer in range(artifact.config.num_layers)
        for tap in sorted(wanted)
    }
    prompt = np.repeat(np.arange(batch.n_sequences), np.diff(batch.boundaries))
    return OwnActivations(arrays, prompt, batch.positions)
