"""Kernels that keep the errors of blocks and rows of a comparison, in the same pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from driftscope.artifacts.tensor import TensorRef
from driftscope.kernels.compare import TensorComparison
from driftscope.kernels.cpu import CpuKernels
from driftscope.kernels.device import Kernels

if TYPE_CHECKING:
    from driftscope.analysis.weights.block_findings import BlockFindings
    from driftscope.kernels.block_errors import BlockErrors


class WatchedKernels:
    """The kernels of a device, whose comparison of whole tensors keeps its errors by block.

    Only `compare` is watched, all else is that of the device. Errors by block come from the CPU: there in the
    pass of the comparison itself, beside any other device in a pass of their own.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self._errors: list[BlockErrors] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    @property
    def unwatched(self) -> Kernels:
        """The kernels of the device."""
        return self._kernels

    def compare(
        self, a_raw: Any, a_dtype: str, b_raw: Any, b_dtype: str, *, rows_a: Any = None, rows_b: Any = None
    ) -> TensorComparison:
        """See `driftscope.kernels.compare.compare`: the same figures."""
        from driftscope.kernels.block_errors import compare_blocks

        host = self._kernels if isinstance(self._kernels, CpuKernels) else None
        compared, errors = compare_blocks(
            *(a_raw, a_dtype, b_raw, b_dtype),
            rows_a=rows_a,
            rows_b=rows_b,
            threads=host.threads if host else 1,
        )
        self._errors.append(errors)
        if host:
            return compared
        return self._kernels.compare(a_raw, a_dtype, b_raw, b_dtype, rows_a=rows_a, rows_b=rows_b)

    def blocks(self, a: TensorRef, b: TensorRef, tensor: str) -> BlockFindings | None:
        """What blocks and rows of the tensor that was compared are off; None where none was looked into.

        That is a tensor that was compared in parts, because a container adds a constant to it; one that was
        decoded to floats on the way, which has no bytes whose bits could be off; one in a format whose
        steps are not known; and one compared with values that are rounded more coarsely than its own.
        """
        from driftscope.analysis.weights.block_findings import findings
        from driftscope.analysis.weights.rounded_copy import is_coarser
        from driftscope.kernels.compare_cells import has_steps
        from driftscope.kernels.formats import format_of

        decoded = b.stored_dtype != b.dtype and b.dtype in ("F32", "F64")
        # Nearly all values of BF16 are values of F16.
        formats = (a.stored_dtype, b.stored_dtype)
        coarser = is_coarser(*formats) and formats != ("BF16", "F16")
        if coarser or decoded or len(self._errors) != 1 or not has_steps(format_of(b.dtype)):
            return None
        return findings(a, b, self._errors[0], tensor=tensor)

    def findings(self, a: TensorRef, b: TensorRef, tensor: str) -> list[dict[str, Any]]:
        """The findings of `blocks`, worst first."""
        found = self.blocks(a, b, tensor)
        return [] if found is None else list(found.to_dict()["findings"])
