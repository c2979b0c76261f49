"""Every measurement by name. To add one: write its module, add its line here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

from driftscope.errors import InputError
from driftscope.falsifiers.reader import EvidenceReader

MEASUREMENTS: dict[str, str] = {
    "acceptance": "driftscope.falsifiers.acceptance",
    "batch": "driftscope.falsifiers.batch",
    "budget": "driftscope.falsifiers.budget",
    "chain": "driftscope.falsifiers.chain",
    "chat_template": "driftscope.falsifiers.chat_template",
    "code_completion": "driftscope.falsifiers.code_completion",
    "depth": "driftscope.falsifiers.depth",
    "dequantizers": "driftscope.falsifiers.dequantizers",
    "grouped_attention": "driftscope.falsifiers.grouped_attention",
    "layer_memory": "driftscope.falsifiers.layer_memory",
    "layer_series": "driftscope.falsifiers.layer_series",
    "logit_parity": "driftscope.falsifiers.logit_parity",
    "norm": "driftscope.falsifiers.norm",
    "one_block": "driftscope.falsifiers.one_block",
    "outlier_cost": "driftscope.falsifiers.outlier_cost",
    "outlier_step": "driftscope.falsifiers.outlier_step",
    "parity_faults": "driftscope.falsifiers.parity_faults",
    "prompt_sensitivity": "driftscope.falsifiers.prompt_sensitivity",
    "real_weights": "driftscope.falsifiers.real_weights",
    "rope": "driftscope.falsifiers.rope",
    "scale": "driftscope.falsifiers.scale",
    "softmax": "driftscope.falsifiers.softmax",
    "sum_order": "driftscope.falsifiers.sum_order",
    "sweep_cosine": "driftscope.falsifiers.sweep_cosine",
    "sweep_faults": "driftscope.falsifiers.sweep_faults",
    "sweep_origin": "driftscope.falsifiers.sweep_origin",
    "thread_counts": "driftscope.falsifiers.thread_counts",
    "token_scope": "driftscope.falsifiers.token_scope",
}
"""Name to module. A module is imported when its measurement is asked for."""

ON_DEVICE = frozenset({"grouped_attention"})
"""Measurements that also run a kernel on the case's device."""


class MeasurementModule(Protocol):
    """What a module of `MEASUREMENTS` holds."""

    def inputs(self, parameters: Mapping[str, Any]) -> list[str]:
        """Return the evidence files that `measure` reads, relative to the results folder."""

    def measure(
        self,
        parameters: Mapping[str, Any],
        regimes: Mapping[str, Mapping[str, Any]],
        seeds: Sequence[int],
        evidence: EvidenceReader,
    ) -> dict[str, Any]:
        """Measure. The same arguments and evidence give the same bytes.

        Returns:
            ``samples`` (how many values went in), ``regimes`` and ``controls`` (objects of metrics, all of
            one shape), ``domain`` (a list of them, over which the predicate must change), further figures;
            or ``{status: not-run, reason}`` where the evidence is not there.

        Raises:
            InputError: a parameter is missing or out of range.
        """


def measurement_module(name: str) -> MeasurementModule:
    """Return the module of a measurement.

    Raises:
        InputError: there is none of that name.
    """
    if name not in MEASUREMENTS:
        raise InputError(
            f"measurement `{name}` is not registered; known are {', '.join(sorted(MEASUREMENTS))}"
        )
    return cast(MeasurementModule, importlib.import_module(MEASUREMENTS[name]))
