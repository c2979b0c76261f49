"""Which engines beside our own are installed. Nothing of them is imported, so that asking is cheap."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Extra:
    """An engine that comes with an extra of this package.

    Attributes:
        modules: what it imports.
        packages: whose versions decide what it computes.
        install: how to get it.
    """

    modules: tuple[str, ...]
    packages: tuple[str, ...]
    install: str


EXTRAS: Mapping[str, Extra] = {
    "llama.cpp": Extra(("llama_cpp",), ("llama-cpp-python",), "pip install 'driftscope[llama-cpp]'"),
    "transformers": Extra(
        ("torch", "transformers"), ("torch", "transformers"), "pip install 'driftscope[transformers]'"
    ),
}
"""Engine to its extra."""


def missing_module(engine: str) -> str:
    """The first module of an engine that is not installed; empty where none is missing."""
    return next((name for name in EXTRAS[engine].modules if importlib.util.find_spec(name) is None), "")


def installed_versions(engine: str) -> dict[str, str]:
    """Package to version, of an engine that is installed."""
    return {name: importlib.metadata.version(name) for name in EXTRAS[engine].packages}
