"""ggml's own matrix product on the CPU: a graph of one node, run by the backend that llama.cpp runs on.

A weight is placed as llama.cpp places it when it loads a model by default: in the first extra buffer type of
the CPU (its repacked layouts) that says it supports the product, else in plain memory. What the backend then
does with plain memory is its own choice: tinyBLAS, tiles, or one dot product after the other.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

_P, _I, _S = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
# ggml_tensor: its type, then (aligned) the pointer to its buffer.
_BUFFER_AT = 8


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _S), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool))


# ctypes frees a callback that Python no longer refers to, and ggml would go on calling it.
_silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _P)(lambda level, text, data: None)


def _libraries() -> tuple[Any, Any]:
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise SystemExit("llama-cpp-python is not installed")
    folder = Path(found.origin).parent / "lib"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    pointers = (
        "ggml_init ggml_new_tensor_2d ggml_mul_mat ggml_new_graph ggml_backend_alloc_ctx_tensors_from_buft"
        " ggml_backend_reg_get_proc_address ggml_backend_reg_dev_get ggml_backend_buft_alloc_buffer"
        " ggml_backend_dev_buffer_type"
    )
    for name in pointers.split():
        getattr(base, name).restype = _P
    cpu.ggml_backend_cpu_init.restype = cpu.ggml_backend_cpu_reg.restype = _P
    base.ggml_backend_buft_name.restype = ctypes.c_char_p
    base.ggml_backend_dev_supports_op.restype = ctypes.c_bool
    base.ggml_init.argtypes = [_InitParams]
    base.ggml_log_set(_silent, None)
    return base, cpu


class Weight:
    """A stored matrix in a buffer of ggml's.

    Attributes:
        buffer: name of the buffer type, ``CPU`` or ``CPU_REPACK``.
    """

    def __init__(
        self, raw: NDArray[np.uint8], ggml_type: int, n_columns: int, *, repack: bool = True
    ) -> None:
        """Place `raw`, ``uint8[rows, row_bytes]``."""
        self._base, self._cpu = base, cpu = _libraries()
        self._backend = _P(cpu.ggml_backend_cpu_init())
        registry = _P(cpu.ggml_backend_cpu_reg())
        device = _P(base.ggml_backend_reg_dev_get(registry, _S(0)))
        self._default = _P(base.ggml_backend_dev_buffer_type(device))
        self._context = _P(base.ggml_init(_InitParams(1 << 20, None, True)))
        self.rows, self.columns = raw.shape[0], n_columns
        self._tensor = _P(base.ggml_new_tensor_2d(self._context, ggml_type, _I(n_columns), _I(self.rows)))
        chosen = self._repacked(registry, device) if repack else self._default
        self.buffer: str = base.ggml_backend_buft_name(chosen).decode()
        self._buffer = _P(base.ggml_backend_alloc_ctx_tensors_from_buft(self._context, chosen))
        raw = np.ascontiguousarray(raw)
        base.ggml_backend_tensor_set(self._tensor, _P(raw.ctypes.data), _S(0), _S(raw.nbytes))

    def _repacked(self, registry: Any, device: Any) -> Any:
        base = self._base
        address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(device)
        # Asked as llama.cpp asks: of a product whose weight is in an empty buffer of that type.
        scratch = _P(base.ggml_init(_InitParams(1 << 20, None, True)))
        x = _P(base.ggml_new_tensor_2d(scratch, 0, _I(self.columns), _I(512)))
        product = _P(base.ggml_mul_mat(scratch, self._tensor, x))
        place = _P.from_address((self._tensor.value or 0) + _BUFFER_AT)
        chosen, index = self._default, 0
        while extra and extra[index] and chosen is self._default:
            buffer = _P(base.ggml_backend_buft_alloc_buffer(_P(extra[index]), _S(0)))
            place.value = buffer.value
            if base.ggml_backend_dev_supports_op(device, product):
                chosen = _P(extra[index])
            place.value = None
            base.ggml_backend_buffer_free(buffer)
            index += 1
        base.ggml_free(scratch)
        return chosen

    def product(self, x: NDArray[np.float32]) -> Product:
        """The product with tokens ``float32[n, columns]``."""
        return Product(self, x)

    def __enter__(self) -> Weight:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.ggml_backend_buffer_free(self._buffer)
        self._base.ggml_free(self._context)
        self._base.ggml_backend_free(self._backend)


class Product:
    """A weight times tokens, to be run as often as one likes while the weight is open."""

    def __init__(self, weight: Weight, x: NDArray[np.float32]) -> None:
        """Build the graph."""
        self._weight, base = weight, weight._base
        self._context = _P(base.ggml_init(_InitParams(1 << 20, None, True)))
        self._shape = (x.shape[0], weight.rows)
        tokens = _P(base.ggml_new_tensor_2d(self._context, 0, _I(x.shape[1]), _I(x.shape[0])))
        self._product = _P(base.ggml_mul_mat(self._context, weight._tensor, tokens))
        self._buffer = _P(base.ggml_backend_alloc_ctx_tensors_from_buft(self._context, weight._default))
        x = np.ascontiguousarray(x, np.float32)
        base.ggml_backend_tensor_set(tokens, _P(x.ctypes.data), _S(0), _S(x.nbytes))
        self._graph = _P(base.ggml_new_graph(self._context))
        base.ggml_build_forward_expand(self._graph, self._product)

    def run(self, threads: int) -> None:
        """Compute."""
        self._weight._cpu.ggml_backend_cpu_set_n_threads(self._weight._backend, threads)
        self._weight._base.ggml_backend_graph_compute(self._weight._backend, self._graph)

    def values(self) -> NDArray[np.float32]:
        """``float32[n, rows]``."""
        out = np.empty(self._shape, np.float32)
        self._weight._base.ggml_backend_tensor_get(self._product, _P(out.ctypes.data), _S(0), _S(out.nbytes))
        return out

    def close(self) -> None:
        """Free the graph."""
        self._weight._base.ggml_backend_buffer_free(self._buffer)
        self._weight._base.ggml_free(self._context)
