"""The product behind a projection: its activation, its weight and its bias, and what a row of it gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from driftscope.analysis.explanations.base import F32, F64, I64, Case
from driftscope.analysis.explanations.caps import capped
from driftscope.engines.trace import PARTS
from driftscope.forward.architecture import SITE_INPUTS, SITE_OUTPUTS, site_tensor
from driftscope.forward.policy import WHOLE_MODEL

_SITES = {tap: site for site, tap in SITE_OUTPUTS.items() if tap not in PARTS}
"""Taps that hold one site's product."""


@dataclass(frozen=True)
class Linear:
    """A projection of a case.

    Attributes:
        case: the case.
        site: its matmul site.
        with_bias: whether the op's output has the bias in it.
    """

    case: Case
    site: str
    with_bias: bool

    @classmethod
    def of(cls, case: Case) -> Linear | None:
        """The projection that an op is, or None where it is none or its input cannot be had."""
        if "linear" not in case.memo:
            case.memo["linear"] = cls._of(case)
        found = case.memo["linear"]
        assert found is None or isinstance(found, cls)
        return found

    @classmethod
    def _of(cls, case: Case) -> Linear | None:
        op = case.op
        site = op.part if op.tap in PARTS else _SITES.get(op.tap, "")
        if not site:
            return None
        found = cls(case, site, op.tap == "qkv_bias" and case.config.attention_bias)
        return found if case.has(SITE_INPUTS[site]) and case.has_tensor(found.name) else None

    @property
    def name(self) -> str:
        """Canonical name of the weight."""
        return site_tensor(self.case.config, self.case.op.layer, self.site)

    @property
    def bias_name(self) -> str:
        """Canonical name of the bias, if there is one."""
        return self.name.removesuffix("weight") + "bias"

    @cached_property
    def x(self) -> F32:
        """The activation as it was recorded, ``float32[tokens, columns]``."""
        return self.case.value(SITE_INPUTS[self.site])

    @cached_property
    def x_used(self) -> F32:
        """The activation as the product sees it."""
        return self.case.activation(self.x, self.name, self.site)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight."""
        rows, columns = self.case.artifact.tensors[self.name].shape
        return rows, columns

    @cached_property
    def weight(self) -> F32:
        """The whole weight, ``float32[rows, columns]``."""
        return self.case.weight(self.name)

    def bias(self, rows: I64 | None = None) -> F32:
        """The bias of some rows; zeros where the output has none in it."""
        count = self.shape[0] if rows is None else len(rows)
        if not self.with_bias or not self.case.has_tensor(self.bias_name):
            return np.zeros(count, np.float32)
        bias = self.case.vector(self.bias_name)
        return bias if rows is None else bias[rows]

    def times(self, weight: F32, x: F32 | None = None) -> F64:
        """``x w^T`` without the bias, ``float64[tokens, rows]``."""
        from driftscope.kernels.matmul import matmul_f32

        left = self.x_used if x is None else x
        with np.errstate(all="ignore"):
            found = matmul_f32(
                np.ascontiguousarray(left, np.float32),
                np.ascontiguousarray(weight, np.float32),
                threads=self.case.context.threads,
            )
        return found.astype(np.float64)

    @property
    def cap(self) -> float | None:
        """Soft cap of the output: of the logits, in models that have one."""
        return self.case.config.logit_softcap if self.site == "lm_head" else None

    def gives(self, product: F64, rows: I64 | None = None) -> F64:
        """The op's output of a product: with the bias, under the cap."""
        found = product + self.bias(rows)
        return capped(found, self.cap) if self.cap else found

    def moved(self, by: F64, rows: I64) -> F64:
        """The expected output of some rows, had something been added to the product."""
        if not self.cap:
            return np.asarray(self.case.expected[:, rows] + by)
        return self.gives(self.times(self.case.weight(self.name, rows)) + by, rows)

    def of_tensor(self, name: str, rows: I64 | None = None, tokens: I64 | None = None) -> F64:
        """What the op gives with another tensor's weights and, where the op has one, its bias."""
        case, x = self.case, self.x if tokens is None else self.x[tokens]
        found = self.times(case.weight(name, rows), case.activation(x, name, self.site))
        bias = name.removesuffix("weight") + "bias"
        if self.with_bias and case.has_tensor(bias):
            values = case.vector(bias)
            found = found + (values if rows is None else values[rows])
        found = capped(found, self.cap) if self.cap else found
        return case.output(found.astype(np.float32)).astype(np.float64)

    def other_layers(self) -> list[tuple[int, str]]:
        """The same site's tensors of other layers that have the same shape."""
        if self.case.op.layer == WHOLE_MODEL:
            return []
        found = []
        for layer in range(self.case.config.num_layers):
            name = site_tensor(self.case.config, layer, self.site)
            ref = self.case.artifact.tensors.get(name)
            if layer != self.case.op.layer and ref is not None and ref.shape == self.shape:
                found.append((layer, name))
        return found
