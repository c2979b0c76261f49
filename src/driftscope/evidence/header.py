"""What every evidence file says about its own making."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from driftscope.evidence.digest import code_digest, sha256_json


@dataclass(frozen=True)
class EvidenceHeader:
    """The inputs, code and parameters that an evidence file was made of.

    Attributes:
        stage: the workflow stage, a key of `STAGE_PACKAGES`.
        inputs: name to SHA-256 of each input.
        code: digest of the sources that make the stage's evidence.
        parameters: digest of the parameters that decide the evidence.
        clause: digest of the contract clause, where one governs the evidence.
    """

    stage: str
    inputs: Mapping[str, str]
    code: str
    parameters: str
    clause: str | None = None

    @classmethod
    def of(
        cls, stage: str, inputs: Mapping[str, str], parameters: Any, clause: str | None = None
    ) -> EvidenceHeader:
        """Make the header of a stage from its inputs' digests and its parameters (any JSON value)."""
        return cls(stage, dict(sorted(inputs.items())), code_digest(stage), sha256_json(parameters), clause)

    def as_dict(self) -> dict[str, Any]:
        """Return the header as a JSON object."""
        return asdict(self)
