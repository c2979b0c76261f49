"""The registered falsifiers, measured as they are and with their mechanism broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from driftscope.contracts.judge import judge
from driftscope.contracts.loading import load_contract
from driftscope.falsifiers.reader import EvidenceReader, FolderReader
from driftscope.falsifiers.registry import measurement_module

CONTRACTS = Path(__file__).parents[2] / "contracts"
NOWHERE = FolderReader(Path("/nonexistent"))


def measured(contract: str, falsifier: str, evidence: EvidenceReader = NOWHERE) -> dict[str, Any]:
    """Measure a registered falsifier with its registered parameters."""
    asked = load_contract(CONTRACTS / f"{contract}.yaml").falsifier(falsifier).measurement
    return measurement_module(asked.name).measure(asked.parameters, asked.regimes, asked.seeds, evidence)


def verdict(contract: str, falsifier: str, measurement: dict[str, Any]) -> dict[str, Any]:
    """Judge a measurement by the registered falsifier."""
    loaded = load_contract(CONTRACTS / f"{contract}.yaml")
    return judge(loaded, loaded.falsifier(falsifier), measurement)
