"""Bad input: one line, exit code 2, and what was found before stays as it is."""

from __future__ import annotations

import resource
from collections.abc import Callable
from typing import Any

import gguf
import pytest
from tests.workflow.case import (
    CONFIG,
    CONTEXT,
    MODEL,
    Case,
    add_keys,
    one_line,
    tiny_model_tensors,
    write_model,
)

pytestmark = pytest.mark.slow


def truncated(case: Case) -> None:
    """Cut the model file in the middle of its tensors."""
    path = case.folder / MODEL
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    case.lock()


def wrong_checksum(case: Case) -> None:
    """Change one byte of the model's weights; the size stays."""
    path = case.folder / MODEL
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def unknown_architecture(case: Case) -> None:
    """Write a model of an architecture that is not built in."""
    write_model(case.folder / MODEL, architecture="gemma")
    case.lock()


def missing_tensor(case: Case) -> None:
    """Write a model without one of its matrices."""
    tensors = tiny_model_tensors()
    del tensors["blk.1.ffn_up.weight"]
    write_model(case.folder / MODEL, tensors)
    case.lock()


def not_a_number_for_a_size(case: Case) -> None:
    """Write a model whose context length is a text."""

    def keys(writer: gguf.GGUFWriter) -> None:
        add_keys(writer)
        writer.add_string("llama.rope.dimension_count", "many")

    write_model(case.folder / MODEL, keys=keys)
    case.lock()


def with_prompt(**prompt: Any) -> Callable[[Case], None]:
    """Configure one more prompt."""

    def configure(case: Case) -> None:
        prompts = [*CONFIG["trace"]["prompts"], {"id": "bad", **prompt}]
        case.configure(trace={**CONFIG["trace"], "prompts": prompts})

    return configure


def unknown_key(case: Case) -> None:
    """Misspell a key."""
    case.configure(trace={**CONFIG["trace"], "chunk": 2})


def too_few_positions(case: Case) -> None:
    """Ask for more token positions than the texts have."""
    case.configure(decomposition={**CONFIG["decomposition"], "minimum_positions": 5000})


def unknown_metric(case: Case) -> None:
    """Give a contract a key that contracts do not have."""
    case.edit("contracts/chain.yaml", "threshold: 1.0", "treshold: 1.0")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncated, ["tiny.gguf"]),
        (wrong_checksum, ["tiny.gguf", "sha256"]),
        (unknown_architecture, ["gemma", "llama"]),
        (missing_tensor, ["model.layers.1.mlp.up_proj.weight"]),
        (not_a_number_for_a_size, ["rope.dimension_count"]),
        (with_prompt(text=""), ["bad", "empty"]),
        (with_prompt(ids=[1] * (CONTEXT + 1)), ["bad", str(CONTEXT + 1), str(CONTEXT)]),
        (with_prompt(ids=[1, 100000]), ["bad", "100000"]),
        (unknown_key, ["trace.chunk", "did you mean `chunks`"]),
        (too_few_positions, ["5000", "minimum_positions"]),
        (unknown_metric, ["chain.yaml", "treshold"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_run_stops_with_one_line(case: Case, spoil: Callable[[Case], None], words: list[str]) -> None:
    before = case.evidence()
    spoil(case)
    line = one_line(case.run())
    for word in words:
        assert word in line
    assert case.evidence() == before


def test_plain_snakemake_gives_the_line_for_an_unknown_key(case: Case) -> None:
    before = case.evidence()
    unknown_key(case)
    assert "trace.chunk" in one_line(case.snakemake())
    assert case.evidence() == before


def limited(size: int) -> Callable[[], None]:
    """What makes a file of more than `size` bytes fail, as a full disk would."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


MODELS = (
    "--teacher",
    "results/tiny/models/teacher.json",
    "--candidate",
    "results/tiny/models/candidate.json",
)
PROMPTS = ("--prompts", "results/tiny/prompts.json")
STAGES = {
    "table": (
        *("sweep", *MODELS, "--part", "0/2"),
        *("--out", "results/tiny/sweep/shard_0.parquet", "--blocks", "results/tiny/sweep/blocks_0.json"),
    ),
    "arrays": (
        *("base", "teacher.f32", *MODELS, *PROMPTS),
        *("--out", "results/tiny/decomposition/base_teacher.f32.safetensors"),
    ),
    "document": (
        *("prompts", "--config", "config/config.yaml", "--model", "results/tiny/models/teacher.json"),
        *("--out", "results/tiny/prompts.json"),
    ),
    "teacher": (
        *("derive", "teacher", "--config", "config/config.yaml"),
        *("--from", "results/tiny/models/source.json", "--out", "results/tiny/models/teacher.json"),
    ),
    "candidate": (
        *("derive", "candidate", "--config", "config/config.yaml"),
        *("--from", "results/tiny/models/teacher.json", "--out", "results/tiny/models/candidate.json"),
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_on_a_full_disk_leaves_what_was_there(case: Case, stage: str) -> None:
    before = case.evidence()
    done = case.driftscope("stage", *STAGES[stage], preexec_fn=limited(1024))
    assert "cannot be written" in one_line(done)
    assert case.evidence() == before
    assert not list((case.folder / "results").rglob("*.partial"))


def test_a_run_on_a_full_disk_leaves_what_was_there(case: Case) -> None:
    arrays = sorted((case.results / "decomposition").glob("*.safetensors"))
    size = min(file.stat().st_size for file in arrays)
    # Snakemake backs up what a job is about to write anew, and would be the first to run out of space.
    for file in arrays:
        file.unlink()
    before = case.evidence()
    case.configure(decomposition={**CONFIG["decomposition"], "minimum_positions": 33})
    line = one_line(case.driftscope("run", "--cores", "2", preexec_fn=limited(size - 1)))
    assert "cannot be written" in line
    assert case.evidence() == before
