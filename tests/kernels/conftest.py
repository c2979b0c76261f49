"""ggml's own C functions, from the shared libraries that llama-cpp-python installs."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import pytest


def _library(name: str) -> ctypes.CDLL:
    found = importlib.util.find_spec("llama_cpp")
    assert found is not None
    assert found.origin is not None
    return ctypes.CDLL(str(Path(found.origin).parent / "lib" / f"lib{name}.so"))


@pytest.fixture(scope="session")
def ggml_base() -> ctypes.CDLL:
    return _library("ggml-base")


@pytest.fixture(scope="session")
def ggml_cpu() -> ctypes.CDLL:
    _library("ggml-base")
    library = _library("ggml-cpu")
    # Fills the table that the f16 conversions of some kernels read.
    library.ggml_cpu_init()
    return library
