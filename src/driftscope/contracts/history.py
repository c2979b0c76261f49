"""What the git history says of a contract: the same version must mean the same question."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from driftscope.contracts.strict_yaml import load_yaml, parse_yaml
from driftscope.errors import InputError


def changes_without_version(file: Path) -> list[str] | None:
    """Say what a contract asks otherwise than an earlier commit did under the same version.

    Args:
        file: a contract file.

    Returns:
        One line a change, each naming the newest commit that it differs from; None where there is no git
        history to compare with (no git, no repository, a file that was never committed).
    """
    commits = _git(file, "log", "--format=%H", "--", file.name)
    if not commits:
        return None
    now = load_yaml(file).values
    found: dict[str, str] = {}
    for commit in commits.split():
        text = _git(file, "show", f"{commit}:./{file.name}")
        if text is None:
            continue
        try:
            before = parse_yaml(text, file).values
        except InputError:
            continue  # It was not a contract then.
        if before.get("version") != now.get("version"):
            continue
        for what in _differences(_questions(before), _questions(now)):
            found.setdefault(what, commit[:12])
    return [
        f"{what} differs from commit {commit}, which has version {now.get('version')} too"
        for what, commit in sorted(found.items())
    ]


def _questions(values: dict[str, Any]) -> dict[str, Any]:
    """What a version stands for: every measurement, every comparison, every control."""
    found: dict[str, Any] = {}
    for falsifier in _mappings(values.get("falsifiers")):
        name = falsifier.get("id")
        judgement = falsifier.get("judgement")
        judgement = judgement if isinstance(judgement, dict) else {}
        found[f"the measurement of `{name}`"] = falsifier.get("measurement")
        found[f"the judgement of `{name}`"] = [
            _comparisons(judgement.get("admits")),
            _comparisons(judgement.get("clauses")),
        ]
    for gate in _mappings(values.get("gates")):
        found[f"gate `{gate.get('id')}`"] = _comparisons(gate.get("clauses"))
    return found


def _comparisons(clauses: Any) -> list[dict[str, Any]]:
    """Clauses without their prose."""
    return [{key: value for key, value in item.items() if key != "why"} for item in _mappings(clauses)]


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the questions that were there before and are gone or other now."""
    return [name for name, asked in before.items() if now.get(name) != asked]


def _git(file: Path, *arguments: str) -> str | None:
    """Output of a git command run beside a file, or None where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(file.resolve().parent), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, UnicodeDecodeError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
