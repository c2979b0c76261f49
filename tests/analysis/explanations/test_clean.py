"""What a clean engine's own noise is given no name, op by op."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.analysis.explanations.planted import PROMPTS, artifact, trace_of

from driftscope.analysis.explanations import CLASSES, Context, explain
from driftscope.analysis.replay import Replayer
from driftscope.engines import transformers


def found(trace, own, reference=None):  # type: ignore[no-untyped-def]
    component = "engine" if reference is None else "model"
    replayer = Replayer(trace, own, reference=reference)
    context = Context(own, reference, trace, component, replayer)
    for place in replayer.places():
        op = replayer.op(*place)
        if op.sides(component) is not None:
            yield place, explain(op, context)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_transformers(name: str, dtype: str, tmp_path: Path) -> None:
    own = artifact(name)
    options = transformers.TransformersOptions(dtype=dtype)
    trace = transformers.trace(own.path, PROMPTS, tmp_path / "trace", options)
    named = {place: item[0].statement for place, item in found(trace, own) if item[0].class_ != "unexplained"}
    assert named == {}


@pytest.mark.parametrize("scheme", ["Q8_0", "Q4_K_M"])
def test_quantized_weights(scheme: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    own, reference = artifact("qwen2", scheme, **sizes), artifact("qwen2", **sizes)
    for component in (None, reference):
        trace = trace_of(tmp_path / str(component is None), own, path="int8-dot")
        explained = found(trace, own, component)
        named = {place: item[0].statement for place, item in explained if item[0].class_ != "unexplained"}
        assert named == {}


def test_every_answer_is_of_a_class(tmp_path: Path) -> None:
    own = artifact("llama")
    for _, items in found(trace_of(tmp_path, own), own):
        assert all(item.class_ in CLASSES for item in items)
        assert set(items[0].to_dict()) == {
            "class",
            "statement",
            "residual_before",
            "residual_after",
            "evidence",
        }


def test_the_page_lists_every_class() -> None:
    page = Path(__file__).parents[3] / "docs" / "reference" / "explanations.md"
    rows = [line.split("`")[1] for line in page.read_text("utf-8").splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(CLASSES)
