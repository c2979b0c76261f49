"""The one file that knows how to compile: everything jitted goes through `kernel` and `device`.

No fast-math and no parallel=True: each result is one fixed sequence of IEEE operations, and threads
are ours (`driftscope.kernels.parallel`) because kernels release the GIL.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import extending
from numba.core import config as numba_config
from numba.core.caching import FunctionCache
from numba.core.runtime import rtsys

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
    compiled: Any = numba.njit(**_OPTIONS)(function)
    config: Any = numba_config
    before = config.CACHE_DIR
    try:
        if folder is not None:
            config.CACHE_DIR = str(folder)
            compiled._cache = _KernelCache(function)
        compiled.compile(types)
    finally:
        config.CACHE_DIR = before
    compiled.disable_compile()
    call: Callable[..., Any] = compiled
    return call


class _KernelCache(FunctionCache):
    """Numba's cache on disk, without preparing for a compilation where there is nothing to compile.

    Numba reads its whole library of typed functions before it looks into the cache, which takes longer
    than all else in the first call of a kernel.
    """

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The compiled function, or None where it must be compiled."""
        rtsys.initialize(context)
        with self._guard_against_spurious_io_errors():
            found = self._load_overload(signature, context)
        if found is None:
            with _without_scipy():
                context.refresh()
        return found


@contextlib.contextmanager
def _without_scipy() -> Iterator[None]:
    """Keep Numba from importing scipy.linalg, slow to import, merely to see whether it is installed.

    A product that needs it looks for it again when it is compiled; no kernel here uses any.
    """
    from numba.np import linalg

    modules: Any = linalg
    look = modules.ensure_blas
    modules.ensure_blas = lambda: None
    try:
        yield
    finally:
        modules.ensure_blas = look


def _cache_folder(function: Callable[..., Any]) -> Path | None:
    """Folder for the compiled code of `function`, or None where no folder can be written.

    Numba notices an edit of the file that defines a kernel, but not of a file whose functions the
    kernel calls; so the folder is named after the content of all that its file imports of this package.
    """
    digest = hashlib.sha256()
    for file in sorted(_sources(Path(function.__code__.co_filename))):
        digest.update(_read(file))
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


_PACKAGE = Path(__file__).parent
_IMPORTS = re.compile(rb"^\s*from driftscope\.kernels(?:\.(\w+) import|\s+import\s+(\([^)]*\)|[^\n]*))", re.M)


def _sources(file: Path) -> set[Path]:
    """`file` and every module of this package that it imports, directly or not."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for module, several in _IMPORTS.findall(_read(file)):
            for name in re.findall(rb"\w+", module or several):
                imported = _PACKAGE / f"{name.decode()}.py"
                if imported.exists():
                    waiting.append(imported)
    return found


@functools.cache
def _read(file: Path) -> bytes:
    return file.read_bytes()


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
