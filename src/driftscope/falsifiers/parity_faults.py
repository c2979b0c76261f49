"""Would a parity gate catch a fault of RoPE or of the attention scale?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact
from driftscope.errors import InputError
from driftscope.falsifiers.case_logits import (
    F32,
    PROMPTS,
    difference,
    finite,
    manifest,
    missing,
    policy_of,
    prompt_batch,
)
from driftscope.falsifiers.faulty_pass import FaultyPass
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.forward.batch import TokenBatch
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import Policy

_FAULTS = ("theta", "angle", "score_gain")
_DRAWN_TOKENS = 7
_MIXED_HEADS = (0.0, 0.02, 0.1, 1.0)
_SCORE_GAINS = (1.02, 1.1, 2.0)


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: a model of the case and the prompts."""
    return [manifest(parameter(parameters, "role", str)), PROMPTS]


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Put faults into one of two paths of one model, and compare the logits.

    Args:
        parameters: `set_up`, ``one-token`` (sequences of one token at position 0, as published) or
            ``prompts``; `role`, the model; `text_tokens` of the case's first text beside the traced prompts;
            `resamples`, `confidence`.
        regimes: name to the fault: `theta`, a factor of the base of the rotary frequencies; `angle`, a factor
            of the rotary angles (0 for no RoPE); `score_gain`, a factor of the attention scores.
        seeds: with ``one-token``, each draws tokens beside the one that begins the first chat or prompt.
        evidence: model and prompts.

    Returns:
        In each regime, of the ``int8-dot`` path with the fault against the same path without: `cosine`, the
        smallest over positions; `cosine_last`, the smallest over the prompts' last positions;
        `same_argmax`, share of positions; `differing`, values that differ in a bit. And of the faulty
        ``int8-dot`` path against the sound ``f32`` path, `excess`: the error of the logits over that of
        the sound ``int8-dot`` path, median over positions. No regime where the sound paths have logits that
        are not finite.
    """
    absent = missing(inputs(parameters), evidence)
    if absent:
        return absent
    set_up = parameter(parameters, "set_up", str)
    if set_up not in ("one-token", "prompts"):
        raise InputError(f"measurement parameter `set_up` is {set_up!r}; expected one-token or prompts")
    resampling = Resampling.of(parameters)
    role = parameter(parameters, "role", str)
    case = _Case(
        artifacts={role: evidence.model(manifest(role))},
        path=policy_of(f"{role}.int8-dot"),
        batch=_batch(set_up, parameters, seeds, evidence),
    )
    exact = ForwardPass(case.artifacts, policy_of(f"{role}.f32")).run(case.batch)
    sound = ForwardPass(case.artifacts, case.path).run(case.batch)
    if not finite(exact, sound):
        return {"samples": 0, "set_up": set_up, "regimes": {}, "controls": {}, "domain": []}
    floor = difference(exact, sound).error

    def compare(faulty: F32) -> dict[str, Any]:
        return _compare(case.batch, exact, sound, faulty, floor, resampling)

    faulty = {name: _fault(regime) for name, regime in regimes.items()}
    half = dataclasses.replace(case.path, kv_type="f16")
    heads = _MIXED_HEADS if set_up == "one-token" else ()
    gains = _SCORE_GAINS if set_up == "prompts" else ()
    return {
        "samples": case.batch.n_tokens * len(regimes),
        "set_up": set_up,
        "positions": case.batch.n_tokens,
        "floor": rounded(float(np.median(floor))),
        "regimes": {name: compare(case.run(**fault)) for name, fault in faulty.items()},
        "controls": {
            "no-fault": compare(ForwardPass(case.artifacts, half).run(case.batch)),
            "mixed-head": compare(case.run(mixed_head=1.0)),
        },
        # Its first sample is sound, whatever state RoPE and the attention are in.
        "domain": [
            compare(sound),
            *(compare(case.run(mixed_head=share)) for share in heads),
            *(compare(case.run(score_gain=gain)) for gain in gains),
        ],
    }


@dataclasses.dataclass(frozen=True)
class _Case:
    artifacts: Mapping[str, Artifact]
    path: Policy
    batch: TokenBatch

    def run(self, **fault: Any) -> F32:
        return FaultyPass(self.artifacts, self.path, **fault).run(self.batch)


def _fault(regime: Mapping[str, Any]) -> dict[str, float]:
    unknown = sorted(set(regime) - set(_FAULTS))
    if unknown or not regime:
        raise InputError(f"measurement regime {dict(regime)!r}; expected some of {', '.join(_FAULTS)}")
    return {name: parameter(regime, name, float, least=0.0) for name in regime}


def _batch(
    set_up: str, parameters: Mapping[str, Any], seeds: Sequence[int], evidence: EvidenceReader
) -> TokenBatch:
    prompts = prompt_batch(parameters, evidence)
    if set_up == "prompts":
        return prompts
    # A chat begins with the token that begins a sequence, which is the published one.
    first = int(prompts.ids[prompts.starts[-1]])
    chats = [
        prompt["ids"][0] for prompt in evidence.document(PROMPTS)["trace"] if prompt.get("kind") == "chat"
    ]
    known = np.unique(prompts.ids)
    drawn = [int(token) for seed in seeds for token in generator(seed).choice(known, _DRAWN_TOKENS)]
    return TokenBatch.of([[int(chats[0]) if chats else first], *([token] for token in drawn)])


def _compare(
    batch: TokenBatch, exact: F32, sound: F32, faulty: F32, floor: F64, resampling: Resampling
) -> dict[str, Any]:
    beside = difference(sound, faulty)
    last: NDArray[np.int64] = batch.boundaries[1:] - 1
    found: dict[str, Any] = {
        "cosine": rounded(beside.cosine.min()),
        "cosine_last": rounded(beside.cosine[last].min()),
        "same_argmax": with_interval(_mean, beside.same_argmax.astype(np.float64), resampling),
        "differing": int(beside.differing.sum()),
    }
    known = floor > 0.0
    if known.any():
        ratio = difference(exact, faulty).error[known] / floor[known]
        found["excess"] = with_interval(lambda sample: np.median(sample, axis=1), ratio, resampling)
    return found


def _mean(sample: F64) -> F64:
    mean: F64 = sample.mean(axis=1)
    return mean
