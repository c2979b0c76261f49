"""Different prompts, greedy continuations: does every pair of them differ?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from driftscope.artifacts.model import Artifact
from driftscope.errors import InputError
from driftscope.falsifiers.case_logits import manifest, missing, policy_of, tokenizer_of
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.forward.generate import NOT_FINITE, Generation, generate

if TYPE_CHECKING:
    from driftscope.artifacts.tokenizers.tokenizer import Tokenizer

_CONTROL_TOKENS = 8
_DRAWN_VOCABULARY = 1000

Tokens = Sequence[int]


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: the models that generate."""
    return [manifest(role) for role in _texts(parameters, "roles")]


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Continue every prompt greedily and compare the continuations, pair by pair.

    Args:
        parameters: `roles`, the models; `prompts`, their texts; `new_tokens` at most for each; `resamples`,
            `confidence`.
        regimes: name to `path`, a role and an arithmetic (``teacher.f32``).
        seeds: of the drawn continuations of a control and the domain.
        evidence: the models.

    Returns:
        In each regime: `identical_pairs` of `pairs`; `distinct` continuations; `differing`, the share of
        positions at which a pair differs (a shorter one differs behind its end), mean over pairs, bootstrap
        over pairs; `smallest_differing`, of the closest pair; `continuations`. A regime whose logits are
        not finite is left out.
    """
    absent = missing(inputs(parameters), evidence)
    if absent:
        return absent
    resampling = Resampling.of(parameters)
    prompts, limit = _texts(parameters, "prompts"), parameter(parameters, "new_tokens", int, least=1)
    if len(prompts) < 2:
        raise InputError("measurement parameter `prompts` has one text; expected at least two")
    models: dict[str, _Model] = {}
    for role in _texts(parameters, "roles"):
        artifact = evidence.model(manifest(role))
        tokenizer = tokenizer_of(artifact)
        if tokenizer is None:
            return {"status": "not-run", "reason": f"the model {role} has no tokenizer that can be used"}
        models[role] = _Model(artifact, tokenizer)
    found: dict[str, Any] = {}
    for name, regime in regimes.items():
        path = parameter(regime, "path", str)
        model = _of(models, path)
        generations = model.generate(path, [model.encode(prompt) for prompt in prompts], limit)
        if all(generation.ended != NOT_FINITE for generation in generations):
            found[name] = _metrics([generation.tokens for generation in generations], resampling) | {
                "continuations": [
                    {
                        "prompt": prompt,
                        "tokens": len(item.tokens),
                        "ended": item.ended,
                        "text": model.decode(item),
                    }
                    for prompt, item in zip(prompts, generations, strict=True)
                ]
            }
    path = parameter(next(iter(regimes.values())), "path", str)
    model = _of(models, path)
    first = model.encode(prompts[0])
    # The same prompts, of which the model sees no more than the first token of the first.
    blind = [first, first, *([first[0]] for _ in prompts)]
    same = [item.tokens for item in model.generate(path, blind, min(limit, _CONTROL_TOKENS))]
    drawn = [_drawn(seed, len(prompts), limit) for seed in seeds]
    return {
        "samples": sum(len(prompts) for _ in found),
        "prompts": len(prompts),
        "new_tokens": limit,
        "regimes": found,
        "controls": {
            "drawn": _metrics(drawn[0], resampling),
            "same-prompt": _metrics(same[:2], resampling),
            "cut-prompt": _metrics(same[2:], resampling),
        },
        "domain": [
            *(_metrics(texts, resampling) for texts in drawn),
            *(_metrics([texts[0], *texts[:-1]], resampling) for texts in drawn),
            _metrics([drawn[0][0]] * len(prompts), resampling),
        ],
    }


class _Model:
    """A model with its tokenizer."""

    def __init__(self, artifact: Artifact, tokenizer: Tokenizer) -> None:
        from driftscope.artifacts.tokenizers.stop_tokens import stop_tokens

        self._artifact, self._tokenizer = artifact, tokenizer
        self._stop = stop_tokens(artifact, tokenizer)

    def encode(self, prompt: str) -> list[int]:
        return self._tokenizer.encode(prompt, add_special=True)

    def decode(self, generation: Generation) -> str:
        return self._tokenizer.decode(generation.tokens)

    def generate(self, path: str, prompts: Sequence[Tokens], limit: int) -> list[Generation]:
        policy = policy_of(path)
        return generate({policy.base.artifact: self._artifact}, policy, prompts, limit=limit, stop=self._stop)


def _of(models: Mapping[str, _Model], path: str) -> _Model:
    role = path.partition(".")[0]
    if role not in models:
        raise InputError(f"measurement parameter `path` is {path!r}; expected one of the models in `roles`")
    return models[role]


def _texts(parameters: Mapping[str, Any], name: str) -> list[str]:
    texts = parameters.get(name)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise InputError(f"measurement parameter `{name}` is {texts!r}; expected a list of texts")
    return texts


def _drawn(seed: int, count: int, length: int) -> list[Tokens]:
    tokens: list[Tokens] = generator(seed).integers(0, _DRAWN_VOCABULARY, (count, length)).tolist()
    return tokens


def _metrics(continuations: Sequence[Tokens], resampling: Resampling) -> dict[str, Any]:
    shares = [_differing(list(a), list(b)) for a, b in combinations(continuations, 2)]
    return {
        "pairs": len(shares),
        "identical_pairs": sum(share == 0.0 for share in shares),
        "distinct": len({tuple(tokens) for tokens in continuations}),
        "differing": with_interval(_mean, np.array(shares, dtype=np.float64), resampling),
        "smallest_differing": rounded(min(shares)),
    }


def _differing(a: list[int], b: list[int]) -> float:
    """Share of positions that differ, over the length of the longer; 0 where both are the same or empty."""
    longest = max(len(a), len(b))
    same = sum(x == y for x, y in zip(a, b, strict=False))
    return (longest - same) / longest if longest else 0.0


def _mean(sample: F64) -> F64:
    mean: F64 = sample.mean(axis=1)
    return mean
