"""The one file that knows how to compile: everything jitted goes through `kernel` and `device`.

No fast-math and no parallel=True: each result is one fixed sequence of IEEE operations, and threads
are ours (`driftscope.kernels.parallel`) because kernels release the GIL.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import extending
from numba.core import config as numba_config

# A function in LLVM's intermediate language; untyped, so that kernels can call it like any other.
intrinsic: Any = extending.intrinsic

# Several threads may be the first to call a kernel; and Numba's setting of the folder is global.
_compiling = threading.Lock()

_OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": False, "error_model": "numpy", "boundscheck": False}


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` for use inside kernels; it specialises with the kernel that calls it."""
    compiled: Callable[..., Any] = numba.njit(**_OPTIONS)(function)
    return compiled


def kernel(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function for one explicit signature, at its first call, and keep it on disk.

    One signature: no second specialisation is ever compiled by an unusual argument, which raises a
    TypeError instead. At first call: importing a module costs nothing. `R` in the signature stands for
    a C-contiguous array that may be read-only (``R(uint8, 2)``), as a memory map is.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] | None = None

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                with _compiling:
                    compiled = compiled or _compile(function, signature)
            return compiled(*arguments)

        return call

    return decorate


def _compile(function: Callable[..., Any], signature: str) -> Callable[..., Any]:
    names = {name: getattr(numba.types, name) for name in numba.types.__all__}
    names["R"] = lambda item, ndim: numba.types.Array(item, ndim, "C", readonly=True)
    types = eval(signature, {"__builtins__": {}}, names)
    folder = _cache_folder(function)
    config: Any = numba_config
    before = config.CACHE_DIR
    try:
        config.CACHE_DIR = str(folder) if folder else before
        compiled: Callable[..., Any] = numba.njit(types, cache=folder is not None, **_OPTIONS)(function)
    finally:
        config.CACHE_DIR = before
    return compiled


def _cache_folder(function: Callable[..., Any]) -> Path | None:
    """Folder for the compiled code of `function`, or None where no folder can be written.

    Numba notices an edit of the file that defines a kernel, but not of a file whose functions the
    kernel calls; so the folder is named after the content of all of them.
    """
    digest = hashlib.sha256()
    for file in sorted(_sources(function, set())):
        digest.update(Path(file).read_bytes())
    base = os.environ.get("NUMBA_CACHE_DIR")
    if base is None:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        base = str(Path(base) / "driftscope" / "kernels")
    folder = Path(base) / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _sources(function: Callable[..., Any], seen: set[Callable[..., Any]]) -> Iterator[str]:
    """Files of `function` and of every jitted function that it reaches."""
    if function in seen:
        return
    seen.add(function)
    yield function.__code__.co_filename
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        inner = getattr(value, "py_func", None) or getattr(value, "_defn", None)
        if inner is not None:
            yield from _sources(inner, seen)


@intrinsic
def bits_to_float(_context: Any, bits: Any) -> Any:
    """The f32 whose bits are this u32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return (numba.float32(numba.uint32), generate) if bits == numba.uint32 else None


@intrinsic
def bits_of(_context: Any, value: Any) -> Any:
    """The bits of an f32 as u32."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return (numba.uint32(numba.float32), generate) if value == numba.float32 else None
