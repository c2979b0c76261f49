"""A chat that asks for Python, continued greedily: does every fenced Python block of the answer parse?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from driftscope.artifacts.model import Artifact
from driftscope.errors import InputError
from driftscope.falsifiers.case_logits import manifest, missing, policy_of, tokenizer_of
from driftscope.falsifiers.code_blocks import CodeBlock, code_blocks
from driftscope.falsifiers.reader import EvidenceReader
from driftscope.falsifiers.sampling import F64, Resampling, generator, parameter, rounded, with_interval
from driftscope.forward.generate import NOT_FINITE, Generation, generate

_SOUND = """\
def fibonacci(n):
    if n < 0:
        raise ValueError("negative")
    first, second = 0, 1
    for _ in range(n):
        first, second = second, first + second
    return first
"""
_BROKEN = _SOUND.replace("for _ in range(n):", "for _ in range(n)")
_DOMAIN_BLOCKS = 4
_DAMAGES = 200


def inputs(parameters: Mapping[str, Any]) -> list[str]:
    """Name the evidence that is read: the models that generate."""
    return [manifest(role) for role in _roles(parameters)]


def measure(
    parameters: Mapping[str, Any],
    regimes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    evidence: EvidenceReader,
) -> dict[str, Any]:
    """Render the chat with each model's own template, continue it greedily, and parse its Python blocks.

    Nothing that a model wrote is run.

    Args:
        parameters: `roles`, the models; `system` and `user`, the messages; `new_tokens` at most;
            `new_tokens_by_architecture`, where a model has more; `resamples`, `confidence`.
        regimes: name to `path`, a role and an arithmetic (``teacher.f32``).
        seeds: of the damage in the null model.
        evidence: the models.

    Returns:
        In each regime: `blocks` of Python, `unfinished` ones without a closing fence, `parsed`;
        `parsed_share`, only where there is a block and none is unfinished; `text`, `tokens`, `ended` and
        `smallest_margin` of the completion. `null`: how often a sound block still parses when its lines are
        shuffled, one character is left out, or its end is cut off.
    """
    absent = missing(inputs(parameters), evidence)
    if absent:
        return absent
    resampling = Resampling.of(parameters)
    models = {role: evidence.model(manifest(role)) for role in _roles(parameters)}
    found: dict[str, Any] = {}
    for name, regime in regimes.items():
        path = parameter(regime, "path", str)
        role = path.partition(".")[0]
        if role not in models:
            raise InputError(f"measurement parameter `path` is {path!r}; expected one of {', '.join(models)}")
        completion = _complete(models[role], path, parameters)
        if completion is None:
            return {"status": "not-run", "reason": f"the model {role} has no chat template"}
        if completion["ended"] != NOT_FINITE:
            found[name] = _metrics(completion["text"]) | completion
    texts = [
        "\n".join(_fenced(_BROKEN if i < broken else _SOUND) for i in range(_DOMAIN_BLOCKS))
        for broken in range(_DOMAIN_BLOCKS + 1)
    ]
    return {
        "samples": sum(metrics["tokens"] for metrics in found.values()),
        "regimes": found,
        "null": _null(seeds, resampling),
        "controls": {"sound": _metrics(_fenced(_SOUND)), "missing-colon": _metrics(_fenced(_BROKEN))},
        "domain": [_metrics(text) for text in texts],
    }


def _roles(parameters: Mapping[str, Any]) -> list[str]:
    roles = parameters.get("roles")
    if not isinstance(roles, list) or not roles or not all(isinstance(role, str) for role in roles):
        raise InputError(f"measurement parameter `roles` is {roles!r}; expected a list of models")
    return roles


def _complete(artifact: Artifact, path: str, parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    from driftscope.artifacts.chat import render_chat
    from driftscope.artifacts.tokenizers.stop_tokens import stop_tokens

    tokenizer = tokenizer_of(artifact)
    if tokenizer is None or tokenizer.chat_template is None:
        return None
    messages = [{"role": role, "content": parameter(parameters, role, str)} for role in ("system", "user")]
    prompt = render_chat(
        tokenizer.chat_template,
        messages,
        bos_token=tokenizer.special.get("bos_token"),
        eos_token=tokenizer.special.get("eos_token"),
        fold_system=True,
    )
    ids, policy = tokenizer.encode(prompt), policy_of(path)
    completion: Generation = generate(
        {policy.base.artifact: artifact},
        policy,
        [ids],
        limit=_new_tokens(parameters, artifact.config.architecture),
        stop=stop_tokens(artifact, tokenizer),
    )[0]
    return {
        "prompt_tokens": len(ids),
        "tokens": len(completion.tokens),
        "ended": completion.ended,
        "smallest_margin": rounded(min(completion.margins)) if completion.margins else None,
        "text": tokenizer.decode(completion.tokens),
    }


def _new_tokens(parameters: Mapping[str, Any], architecture: str) -> int:
    special = parameters.get("new_tokens_by_architecture", {})
    if not isinstance(special, Mapping):
        raise InputError(
            f"measurement parameter `new_tokens_by_architecture` is {special!r}; expected numbers by name"
        )
    if architecture in special:
        return parameter(special, architecture, int, least=1)
    return parameter(parameters, "new_tokens", int, least=1)


def _metrics(text: str) -> dict[str, Any]:
    python = [block for block in code_blocks(text) if block.is_python]
    unfinished = sum(not block.closed for block in python)
    parsed = sum(block.parses for block in python if block.closed)
    found: dict[str, Any] = {"blocks": len(python), "unfinished": unfinished, "parsed": parsed}
    if python and not unfinished:
        found["parsed_share"] = rounded(parsed / len(python))
    return found


def _fenced(code: str) -> str:
    return f"```python\n{code}```\n"


def _null(seeds: Sequence[int], resampling: Resampling) -> dict[str, Any]:
    """How strict is parsing? Damage a sound block at random and see how often it still parses."""
    lines = _SOUND.splitlines()
    damaged: dict[str, list[str]] = {"shuffled_lines": [], "one_character_less": [], "cut": []}
    for seed in seeds:
        random = generator(seed)
        for _ in range(_DAMAGES // len(seeds)):
            order, at = random.permutation(len(lines)), int(random.integers(0, len(_SOUND) - 1))
            damaged["shuffled_lines"].append("\n".join(lines[i] for i in order) + "\n")
            damaged["one_character_less"].append(_SOUND[:at] + _SOUND[at + 1 :])
            damaged["cut"].append(_SOUND[:at] + "\n")
    return {
        kind: with_interval(
            _mean,
            np.array([CodeBlock("python", code, True).parses for code in codes], np.float64),
            resampling,
        )
        for kind, codes in damaged.items()
    }


def _mean(sample: F64) -> F64:
    mean: F64 = sample.mean(axis=1)
    return mean
