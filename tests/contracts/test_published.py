"""Published figures: what decides between reproduced and refuted, and the registered ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from driftscope.contracts.loading import load_contracts
from driftscope.contracts.published import (
    PublishedFigure,
    falsifiers_read,
    judge_published,
    load_published,
)
from driftscope.errors import InputError

FOLDER = Path(__file__).parents[2] / "contracts" / "published"


def _figure(printed: str, **compute: Any) -> PublishedFigure:
    return PublishedFigure.model_validate(
        {"id": "figure", "title": "A figure", "source": "a thread", "printed": printed, "compute": compute}
    )


def _verdict(figure: PublishedFigure, **measurements: Any) -> str:
    return str(judge_published([figure], measurements)[0]["verdict"])


@pytest.mark.parametrize(
    ("printed", "verdict"),
    [("18.23", "reproduced"), ("18.24", "refuted"), ("18.2", "reproduced"), ("18.231", "reproduced")],
)
def test_a_figure_is_reproduced_to_its_printed_digits(printed: str, verdict: str) -> None:
    arithmetic = {"expression": "a / b", "inputs": {"a": "1.2216", "b": "0.067006"}}
    assert _verdict(_figure(printed, arithmetic=arithmetic)) == verdict


def test_the_rounding_of_the_inputs_counts_unless_they_are_taken_as_printed() -> None:
    factors = {"block": "0.077", "chain": "5.70", "batch": "50", "real": "5.56", "free": "14"}
    arithmetic: dict[str, Any] = {"expression": "block * chain * batch * real * free", "inputs": factors}
    assert _verdict(_figure("1715", arithmetic=arithmetic)) == "reproduced"
    assert _verdict(_figure("1715", arithmetic={**arithmetic, "exact_inputs": True})) == "refuted"
    assert _verdict(_figure("1708", arithmetic={**arithmetic, "exact_inputs": True})) == "reproduced"


def test_a_measured_figure_is_read_by_path_and_a_missing_measurement_is_not_run() -> None:
    figure = _figure("0xc693a21e", measured={"falsifier": "f", "metric": "published.bits"})
    assert _verdict(figure) == "not-run"
    assert _verdict(figure, f={"status": "not-run"}) == "not-run"
    assert _verdict(figure, f={"published": {"bits": "0xc693a21e"}}) == "reproduced"
    assert _verdict(figure, f={"published": {"bits": "0xc693a21f"}}) == "refuted"
    with pytest.raises(InputError, match=r"has no `published\.bits`"):
        _verdict(figure, f={"published": {}})


def _ratio(scope: str, tokens: int) -> dict[str, Any]:
    return {
        "tap": "layers.3.ffn_swiglu",
        "above": {"value": "1.2216", "scope": scope, "tokens": tokens, "channels": 18944, "path": "a"},
        "below": {"value": "0.067006", "scope": "last", "tokens": 1, "channels": 18944, "path": "b"},
    }


def test_a_ratio_across_populations_is_refuted_by_its_refusal() -> None:
    document = judge_published([_figure("18.23", ratio=_ratio("all", 7))], {})[0]
    assert document["verdict"] == "refuted"
    assert "132608 against 18944" in document["found"]
    assert _verdict(_figure("18.23", ratio=_ratio("last", 1))) == "reproduced"


def test_what_needs_the_weights_is_not_reproducible_here() -> None:
    figure = _figure("8127", arithmetic={"expression": "8127"}).model_copy(update={"needs": "model-7b"})
    assert _verdict(figure) == "not-reproducible-here"
    assert judge_published([figure], {}, {"model-7b"})[0]["verdict"] == "reproduced"


def test_a_figure_of_other_weights_that_this_model_lacks_is_not_run() -> None:
    figure = _figure("1.0", measured={"falsifier": "f", "metric": "layers.3"})
    needing = figure.model_copy(update={"needs": "model-7b"})
    document = judge_published([needing], {"f": {"layers": {}}}, {"model-7b"})[0]
    assert document["verdict"] == "not-run"
    assert "has no such figure" in document["found"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('printed: "0.4391"', "printed: 0.4391", "printed"),
        ("  source:", "  sauce:", "did you mean `source`"),
        ("measured: {falsifier", "measured: {id: 1, falsifier", "unknown key"),
        ("- id: chain-amplification\n", "- id: chain-percent\n", "already used"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = (FOLDER / "chain.yaml").read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "chain.yaml"
    file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match=r"chain\.yaml:") as caught:
        load_published([tmp_path])
    assert said in str(caught.value)


def test_the_registered_figures_compute_without_any_measurement() -> None:
    figures = load_published([FOLDER])
    documents = {document["id"]: document for document in judge_published(figures, {})}
    verdicts = {name: document["verdict"] for name, document in documents.items()}
    assert verdicts["swiglu-quotient"] == "reproduced"
    assert verdicts["swiglu-drift"] == "refuted"
    assert verdicts["swiglu-like-for-like"] == "reproduced"
    assert verdicts["product-printed"] == "refuted"
    assert "1708" in documents["product-printed"]["found"]
    assert verdicts["product-explains"] == "refuted"
    assert verdicts["product-later"] == "reproduced"
    assert verdicts["smallest-cosine"] == "reproduced"
    assert verdicts["gate-gpu-argmax"] == "not-reproducible-here"
    assert verdicts["block-percent"] == "not-run"
    assert all(document["found"].endswith(".") for document in documents.values())
    registered = {
        falsifier.id for item in load_contracts([FOLDER.parent]) for falsifier in item.contract.falsifiers
    }
    read = falsifiers_read(figures)
    assert {"chain-superlinear", "one-block-excess"} <= set(read) <= registered
