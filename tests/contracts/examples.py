"""One small contract and a measurement that fits it, to be edited by the tests."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from driftscope.contracts.loading import load_contract
from driftscope.contracts.model import Contract

CONTRACT_YAML = """\
id: coin
version: 1.2.0
title: A coin that may be loaded
references:
- Bernoulli, Ars Conjectandi, 1713
equations:
- id: share
  formula: heads / throws
obligations:
- id: fair
  statement: the coin shows both sides alike
  falsifiers: [loaded-coin]
falsifiers:
- id: loaded-coin
  hypothesis: The coin is loaded towards heads.
  prediction: In every hand the share of heads is above six in ten.
  measurement:
    name: coin
    parameters:
      throws: 100
    regimes:
      left: {hand: left}
      right: {hand: right}
    seeds: [1, 2]
  judgement:
    clauses:
    - id: share
      metric: heads
      comparator: ">"
      threshold: 0.6
      why: four standard deviations of 100 fair throws
    text:
      asked: Does the coin show heads in more than {clauses.share.threshold:.0%} of its throws?
      found:
        supported: It shows heads in {regimes.left.heads:.0%} (left) and {regimes.right.heads:.0%} (right).
        default: Left {regimes.left.heads:.0%}, right {regimes.right.heads:.0%}.
      would_change: A hand with less than {clauses.share.threshold:.0%} heads.
    figures:
      left: regimes.left.heads
    contradicts:
      supported: [fair-play]
  controls:
  - {id: two-headed, kind: positive, what: a coin with two heads}
  - {id: fair, kind: negative, what: a fair coin}
status_history:
- {version: 1.2.0, status: active}
"""


def write_contract(folder: Path, text: str = CONTRACT_YAML, name: str = "coin.yaml") -> Path:
    """Write a contract file and return its path."""
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def coin_contract(folder: Path, text: str = CONTRACT_YAML) -> Contract:
    """Return the example contract, loaded from a file."""
    return load_contract(write_contract(folder, text))


def _share(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"heads": {"value": value, "low": low or value, "high": high or value}}


def coin_measurement(
    left: dict[str, Any] | None = None, right: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return a measurement whose prediction holds unless a regime is replaced."""
    return copy.deepcopy(
        {
            "samples": 200,
            "regimes": {
                "left": left or _share(0.8, 0.75, 0.85),
                "right": right or _share(0.7, 0.65, 0.75),
            },
            "controls": {"two-headed": _share(1.0), "fair": _share(0.5, 0.4, 0.58)},
            "domain": [_share(0.1), _share(0.9)],
        }
    )


share = _share
