"""Reading the tensors of llama.cpp's compute graph while it runs, through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from driftscope.errors import InputError

_P, _I64, _SIZE, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_int32
_MAX_DIMS, _MAX_SOURCES, _OP_PARAMS, _NAME_BYTES = 4, 10, 16, 64
_F32 = 0


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h up to its name; the layout is checked when the library is opened."""

    _fields_ = (
        ("type", _I32),
        ("buffer", _P),
        ("ne", _I64 * _MAX_DIMS),
        ("nb", _SIZE * _MAX_DIMS),
        ("op", _I32),
        ("op_params", _I32 * _OP_PARAMS),
        ("flags", _I32),
        ("src", _P * _MAX_SOURCES),
        ("view_src", _P),
        ("view_offs", _SIZE),
        ("data", _P),
        ("name", ctypes.c_char * _NAME_BYTES),
    )


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _P), ("no_alloc", ctypes.c_bool))


class GraphTensor:
    """A tensor of the graph, valid during the callback that it is given to.

    Attributes:
        name: the name that llama.cpp gave it last, e.g. ``ffn_out-3``; that of a view is its own.
        op: what computes it, in ggml's words: ``MUL_MAT``, ``ROPE``, ...
    """

    __slots__ = ("_raw", "name", "op")

    def __init__(self, address: int, op_names: Callable[[Any], bytes]) -> None:
        self._raw = _Tensor.from_address(address)
        self.name = self._raw.name.decode(errors="replace")
        self.op = op_names(address).decode()

    def operand_names(self) -> tuple[str, ...]:
        """Names of the first two operands, as far as there are any: one of them may be a weight."""
        sources = self._raw.src
        return tuple(
            _Tensor.from_address(source).name.decode(errors="replace")
            for source in (sources[0], sources[1])
            if source
        )

    @property
    def readable(self) -> bool:
        """Whether the values are float32 and lie in one piece, so that `values` can show them."""
        return self._raw.type == _F32 and _is_contiguous(self._raw)

    def values(self, operand: int | None = None) -> NDArray[np.float32]:
        """The values, or those of an operand: a view, ``float32[ne3, ne2, ne1, ne0]`` in ggml's terms.

        Raises:
            InputError: they are not float32, or not contiguous.
        """
        raw = self._raw if operand is None else _Tensor.from_address(self._raw.src[operand])
        if raw.type != _F32 or not _is_contiguous(raw):
            raise InputError(
                f"llama.cpp: {self.name} ({self.op}) is of ggml's type {raw.type} with strides "
                f"{list(raw.nb)}; expected contiguous float32"
            )
        pointer = ctypes.cast(raw.data, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, shape=tuple(reversed(raw.ne)))


class Watch:
    """An evaluation callback for llama.cpp: asks for tensors, takes them, and keeps what went wrong.

    An exception must not pass through C. It is kept, the rest of the graph is left out, and `check` raises
    it.

    Attributes:
        callback: the value for llama.cpp's ``cb_eval``.
    """

    def __init__(
        self, api: Any, wants: Callable[[GraphTensor], bool], take: Callable[[GraphTensor], None]
    ) -> None:
        """Watch a graph.

        Args:
            api: the module ``llama_cpp``.
            wants: whether a tensor is to be computed by itself and then given to `take`. What is not wanted
                runs together with what comes after it, as it would without a callback.
            take: called with each wanted tensor as soon as it is computed.
        """
        op_names = _library().ggml_op_desc
        self._error: BaseException | None = None

        def seen(address: int, ask: bool, _: int) -> bool:
            if self._error is not None:
                return ask
            try:
                tensor = GraphTensor(address, op_names)
                if ask:
                    return wants(tensor)
                take(tensor)
            except BaseException as error:
                self._error = error
            # Asked: compute this one, so that the next call can end the graph.
            return ask if self._error is not None else True

        self.callback = api.ggml_backend_sched_eval_callback(seen)

    def check(self) -> None:
        """Raise what went wrong since the last check."""
        error, self._error = self._error, None
        if error is not None:
            raise error


def _is_contiguous(raw: _Tensor) -> bool:
    stride = 4
    for length, step in zip(raw.ne, raw.nb, strict=True):
        if length != 1 and step != stride:
            return False
        stride *= length
    return True


_opened: Any = None


def _library() -> Any:
    global _opened
    if _opened is None:
        from llama_cpp._ggml import libggml_base_path

        library = ctypes.CDLL(str(next(libggml_base_path.glob("*ggml-base.*"))))
        library.ggml_op_desc.restype = ctypes.c_char_p
        library.ggml_op_desc.argtypes = [_P]
        _check_layout(library)
        _opened = library
    return _opened


def _check_layout(library: Any) -> None:
    """Compare a tensor that ggml made with what our structure reads in it."""
    for name in ("ggml_init", "ggml_new_tensor_3d", "ggml_add", "ggml_get_data"):
        getattr(library, name).restype = _P
    library.ggml_init.argtypes = [_InitParams]
    library.ggml_new_tensor_3d.argtypes = [_P, _I32, _I64, _I64, _I64]
    library.ggml_add.argtypes = [_P, _P, _P]
    library.ggml_set_name.argtypes = [_P, ctypes.c_char_p]
    library.ggml_get_data.argtypes = library.ggml_free.argtypes = [_P]
    context = library.ggml_init(_InitParams(1 << 16, None, False))
    if not context:
        raise InputError("llama.cpp: ggml cannot make a context")
    try:
        a, b = (library.ggml_new_tensor_3d(context, _F32, 3, 5, 7) for _ in range(2))
        total = library.ggml_add(context, a, b)
        library.ggml_set_name(total, b"probe-7")
        raw = _Tensor.from_address(total)
        as_expected = (
            raw.type == _F32
            and list(raw.ne) == [3, 5, 7, 1]
            and list(raw.nb) == [4, 12, 60, 420]
            and list(raw.src[:3]) == [a, b, None]
            and raw.data == library.ggml_get_data(total)
            and cast(bytes, raw.name) == b"probe-7"
            and library.ggml_op_desc(total) == b"ADD"
        )
    finally:
        library.ggml_free(context)
    if not as_expected:
        raise InputError(
            "llama.cpp: this version's tensors are laid out in a way that driftscope cannot read"
        )
