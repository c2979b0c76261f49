"""Fixtures that every test can use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.default_model import fetch_default_gguf


@pytest.fixture(scope="session")
def default_gguf() -> Path:
    """The default model, SmolLM2-135M-Instruct as a Q4_1 GGUF file."""
    return fetch_default_gguf()
