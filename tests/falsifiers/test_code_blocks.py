"""Fenced blocks as CommonMark has them, parsed and not run."""

from __future__ import annotations

import pytest

from driftscope.falsifiers.code_blocks import code_blocks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no block", []),
        ("```python\nx = 1\n```", [("python", "x = 1\n", True)]),
        ("a\n\n```Python title\nx\n```\nb\n~~~py\ny\n~~~\n", [("python", "x\n", True), ("py", "y\n", True)]),
        ("```python\nx = 1\n", [("python", "x = 1\n", False)]),
        ("````python\n```\n````", [("python", "```\n", True)]),
        ("```python\n~~~\n```", [("python", "~~~\n", True)]),
        ("```python\nx = '''\n``` not a fence\n```", [("python", "x = '''\n``` not a fence\n", True)]),
        ("```\nplain\n```", [("", "plain\n", True)]),
        ("    ```python\nindented code, no fence", []),
        ("```a`b\nno fence, a backtick in its info", []),
        ("```python\n```", [("python", "\n", True)]),
    ],
)
def test_blocks(text: str, expected: list[tuple[str, str, bool]]) -> None:
    assert [(block.language, block.code, block.closed) for block in code_blocks(text)] == expected


@pytest.mark.parametrize(
    ("code", "parses"),
    [
        ("def f(n):\n    return n", True),
        ("x = '\\d'", True),
        ("", True),
        ("def f(n)\n    return n", False),
        ("    x", False),
        ("x = (", False),
        ("x\x00y", False),
        ("(" * 5000, False),
        ("-" * 100_000 + "1", False),
    ],
)
def test_parsing(code: str, parses: bool) -> None:
    (block,) = code_blocks(f"```python\n{code}\n```")
    assert block.parses is parses


def test_nothing_is_run() -> None:
    (block,) = code_blocks("```python\nraise SystemExit(3)\n```")
    assert block.parses
