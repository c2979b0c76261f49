"""The examples of docs/howto/write-a-dump.md run as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.engines.test_aprt import dump
from tests.forward.models import write_model
from tests.test_docs import ROOT, blocks

from driftscope.artifacts.open import open_artifact
from driftscope.engines import own
from driftscope.engines.trace import Trace
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.policy import WHOLE_MODEL

EXAMPLES = list(blocks(ROOT / "docs" / "howto" / "write-a-dump.md", "python"))


def run(index: int) -> None:
    exec(compile(EXAMPLES[index], "write-a-dump.md", "exec"), {})


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_dump_in_twenty_lines() -> None:
    assert len(EXAMPLES) == 4
    assert len(EXAMPLES[0].splitlines()) <= 20
    assert "driftscope." not in EXAMPLES[0]
    run(0)
    run(1)
    assert len(Trace(Path("my-trace")).places) == 6


def test_the_recorder() -> None:
    run(2)
    assert (1, "attention") in Trace(Path("recorded")).places


def test_stage_files(capsys: pytest.CaptureFixture[str]) -> None:
    artifact = open_artifact(write_model(Path("model"), "llama", vocab_size=4096))
    ours = own.trace(artifact, [("prompt", [3838, 374, 220, 17])], Path("ours"), Arithmetic.of())
    dump(Path("stages"), ours, ids=4)
    capsys.readouterr()
    run(3)
    assert "'lm_head': 'it was saved of the last token only'" in capsys.readouterr().out
    assert Trace(Path("apr-trace")).places == ours.places - {(WHOLE_MODEL, "lm_head")}
