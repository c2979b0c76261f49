"""The reference page names every key that a contract may have."""

from __future__ import annotations

from pathlib import Path

from driftscope.contracts.expression import _FUNCTIONS
from driftscope.contracts.loading import known_keys
from driftscope.contracts.model import Contract
from driftscope.contracts.published import PublishedFile

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "contracts.md"


def test_every_key_and_function_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    missing = [
        name
        for name in sorted(known_keys(Contract) | known_keys(PublishedFile) | set(_FUNCTIONS))
        if f"`{name}`" not in page
    ]
    assert missing == []
