"""Where kernels run: on the CPU or on a CUDA device."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError

if TYPE_CHECKING:
    from driftscope.kernels.activations import QuantizedActivation, RoundedActivation
    from driftscope.kernels.compare import TensorComparison
    from driftscope.kernels.statistics import TapStatistics

Request = Literal["cpu", "auto", "cuda"]
REQUESTS: tuple[str, ...] = get_args(Request)
"""``cpu``; ``cuda``; or ``auto``: ``cuda`` where a device answers, else ``cpu``."""

# The first that multiplies 32 int8 at a time on its tensor cores.
_OLDEST = 8

Array = Any
"""A NumPy array, or one of the device that the kernels run on."""


class Kernels(Protocol):
    """The kernels of one device. Functions are those of `driftscope.kernels`, without ``threads``."""

    @property
    def device_name(self) -> str:
        """The card's name; empty on the CPU."""
        ...

    def to_device(self, array: Array) -> Array:
        """An array where the kernels want it."""
        ...

    def to_host(self, array: Array) -> NDArray[Any]:
        """A NumPy array."""
        ...

    def resident(self, key: tuple[str, ...], load: Callable[[], NDArray[np.uint8]]) -> Array:
        """Stored bytes where the kernels want them; `load` is asked for what is not there yet."""
        ...

    def quantize_activation(self, x: Array, fmt: str) -> QuantizedActivation | RoundedActivation:
        """See `driftscope.kernels.activations`."""
        ...

    def matmul_f32_quantized(self, x: Array, raw: Array, dtype: str) -> Array:
        """See `driftscope.kernels.matmul`."""
        ...

    def matmul_quantized(self, x: Array, raw: Array, dtype: str, *, activation: str | None = None) -> Array:
        """See `driftscope.kernels.matmul`."""
        ...

    def compare(
        self,
        a_raw: Array,
        a_dtype: str,
        b_raw: Array,
        b_dtype: str,
        *,
        rows_a: NDArray[np.int64] | None = None,
        rows_b: NDArray[np.int64] | None = None,
        transposed_a: bool = False,
        transposed_b: bool = False,
    ) -> TensorComparison:
        """See `driftscope.kernels.compare`."""
        ...

    def tap_statistics(self, x: Array) -> TapStatistics:
        """See `driftscope.kernels.statistics`."""
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """See `driftscope.kernels.forward`, here and below."""
        ...

    def rope_tables(
        self, frequencies: NDArray[np.float32], n_positions: int, *, scale: float = 1.0
    ) -> tuple[Array, Array]:
        """Cosine and sine of every rotary angle."""
        ...

    def rope(
        self,
        x: Array,
        cosine: Array,
        sine: Array,
        positions: Array,
        *,
        interleaved: bool = False,
        head_dim: int | None = None,
    ) -> Array:
        """Rotate heads."""
        ...

    def silu(self, gate: Array) -> Array:
        """SiLU."""
        ...

    def gelu(self, gate: Array) -> Array:
        """GELU with the tanh approximation."""
        ...

    def soft_cap(self, x: Array, cap: float) -> Array:
        """``cap * tanh(x / cap)``."""
        ...

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        starts: NDArray[np.int64],
        *,
        n_heads: int,
        n_kv_heads: int,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        kv_type: str = "f32",
    ) -> Array:
        """Causal attention."""
        ...

    def attention_scores(
        self,
        q: Array,
        k: Array,
        *,
        n_heads: int,
        n_kv_heads: int,
        scale: float,
        soft_cap: float | None = None,
        kv_type: str = "f32",
    ) -> Array:
        """Scores of one sequence."""
        ...

    def attention_softmax(self, scores: Array, *, n_heads: int, window: int | None = None) -> Array:
        """Softmax of the scores of one sequence."""
        ...


def choose_device(request: str) -> str:
    """Resolve a request, one of `REQUESTS`, to ``cpu`` or ``cuda``.

    Raises:
        InputError: an unknown request, or ``cuda`` where it cannot be had; the line says what is missing.
    """
    if request not in REQUESTS:
        raise InputError(f"device {request!r} is unknown; expected one of {', '.join(REQUESTS)}")
    if request == "cpu":
        return "cpu"
    reason = why_not_cuda()
    if not reason:
        return "cuda"
    if request == "cuda":
        raise InputError(f"device cuda: {reason}")
    return "cpu"


def why_not_cuda() -> str:
    """What is missing for the kernels to run on a CUDA device, in one line; empty where nothing is."""
    if importlib.util.find_spec("cupy") is None:
        return (
            "CuPy is not installed; install driftscope[cuda12] or driftscope[cuda13], "
            "whichever CUDA the driver supports (`nvidia-smi` says)"
        )
    try:
        from driftscope.kernels.cuda.module import compiler_version, compute_capability, device_count
    except ImportError as error:
        return f"CuPy does not import ({_first_line(error)}); install driftscope[cuda12] or [cuda13] anew"
    try:
        count = device_count()
    except RuntimeError as error:
        return f"no CUDA device answers ({_first_line(error)}); see that `nvidia-smi` lists one"
    if not count:
        return "no CUDA device answers; see that `nvidia-smi` lists one"
    major, minor = compute_capability()
    if major < _OLDEST:
        return f"the card has compute capability {major}.{minor}; expected {_OLDEST}.0 or later"
    try:
        compiler_version()
    except RuntimeError as error:
        return (
            f"NVRTC, CUDA's compiler, is missing ({_first_line(error)}); "
            "install driftscope[cuda12] or [cuda13] anew"
        )
    return ""


def kernels_on(device: str, threads: int = 1) -> Kernels:
    """The kernels of a device that `choose_device` gave; `threads` are for the CPU."""
    if device == "cuda":
        return _on_card()
    from driftscope.kernels.cpu import CpuKernels

    return CpuKernels(threads)


@cache
def _on_card() -> Kernels:
    # One a process, so that weights stay on the card from pass to pass.
    from driftscope.kernels.cuda.kernels import CudaKernels
    from driftscope.kernels.cuda.module import CupyCard

    return CudaKernels(CupyCard())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
