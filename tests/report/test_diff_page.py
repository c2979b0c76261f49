"""The page of a diff: self-contained, escaped, the same bytes, and what it says of each relation."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.workflow.case import tiny_model_tensors, write_model

from driftscope.analysis.weights.pair_diff import diff_models
from driftscope.analysis.weights.relations import Band
from driftscope.artifacts.open import open_artifact
from driftscope.report.diff_page import STEPS, heat_map, legend, level_of, render_diff
from driftscope.report.diff_words import relation_words, sentence, short_name

Tensors = dict[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model against one with swapped layers, a NaN, a name that is HTML and a tensor less."""
    folder = tmp_path_factory.mktemp("models")
    tensors: Tensors = tiny_model_tensors()
    changed: Tensors = {name: values.copy() for name, values in tensors.items()}
    for name in ("ffn_up", "ffn_down"):
        first, second = f"blk.0.{name}.weight", f"blk.1.{name}.weight"
        changed[first], changed[second] = changed[second], changed[first]
    changed["blk.1.attn_norm.weight"][3] = np.nan
    del changed["blk.0.attn_v.weight"]
    changed["<script>alert(1)</script>"] = tensors["output_norm.weight"]
    a, b = (
        open_artifact(write_model(folder / f"{name}.gguf", values))
        for name, values in (("a", tensors), ("b", changed))
    )
    return diff_models(a, b, band=Band(0.0, 1.6))


class _Tags(HTMLParser):
    """Collects tags; complains about what is not closed."""

    void = ("meta", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing(document: dict[str, Any]) -> None:
    page = render_diff(document)
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert not [attrs for _, attrs in tags.seen if attrs.get("src") or "://" in str(attrs.get("href"))]
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_its_one_script_is_the_one_that_its_policy_names(document: dict[str, Any]) -> None:
    page = render_diff(document)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page


def test_names_of_a_file_are_text(document: dict[str, Any]) -> None:
    page = render_diff(document)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_the_same_diff_gives_the_same_bytes(document: dict[str, Any]) -> None:
    assert render_diff(document) == render_diff(document)


def test_what_does_not_hold_is_said_with_its_evidence(document: dict[str, Any]) -> None:
    page = render_diff(document)
    assert "✗ Does not hold" in page
    assert sentence(document) in page
    part = page.partition("What does not hold?")[2].partition("All tensors")[0]
    for name in ("L0 mlp.up_proj", "L1 mlp.down_proj", "L1 input_norm"):
        assert name in part
    assert "other-layer(1)" in part
    assert "model.layers.0.self_attn.v_proj.weight" in part


def test_every_tensor_is_a_row_and_a_cell(document: dict[str, Any]) -> None:
    page = render_diff(document)
    body = page.partition('<table id="tensors">')[2].partition("</table>")[0]
    assert body.count("<tr") == 1 + len(document["tensors"])
    (picture,) = heat_map(document["tensors"])
    in_layers = sum(".layers." in row["tensor"] for row in document["tensors"])
    assert picture.count("<rect") == in_layers


def test_a_model_without_layers_has_no_map() -> None:
    assert heat_map([]) == []


@pytest.mark.parametrize(
    ("row", "level"),
    [
        ({"holds": True, "kind": "identical"}, "same"),
        ({"holds": True, "kind": "equal-under"}, "same"),
        ({"holds": True, "kind": "downcast"}, "s2"),
        ({"holds": True, "kind": "quantized-from", "nmse_over_expected": 0.1}, "s0"),
        ({"holds": True, "kind": "quantized-from", "nmse_over_expected": 1.0}, "s3"),
        ({"holds": True, "kind": "quantized-from", "nmse_over_expected": 99.0}, "s7"),
        ({"holds": False, "kind": "different", "nmse_over_expected": 1.0}, "bad"),
        ({"holds": False, "kind": "different", "compared_count": 0}, "gone"),
    ],
)
def test_the_colour_of_a_cell(row: dict[str, Any], level: str) -> None:
    full = {"compared_count": 1, "nmse_over_expected": None, **row}
    assert level_of(full) == level
    assert level in [step["level"] for step in legend()]


def test_the_legend_has_every_step() -> None:
    assert len(legend()) == len(STEPS) + 4


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("model.layers.3.mlp.down_proj.weight", "L3 mlp.down_proj"),
        ("model.layers.12.self_attn.q_proj.bias", "L12 attn.q_proj.bias"),
        ("model.layers.0.post_attention_layernorm.weight", "L0 post_attn_norm"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("rope_freqs.weight", "rope_freqs"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


def test_relations_in_words() -> None:
    assert relation_words("equal-under:offset+1") == "the same values under offset+1"
    assert relation_words("different", 2).startswith("differ ")
    assert "quantized within" in relation_words("quantized-from")


def test_a_diff_of_equal_models_says_so(tmp_path: Path) -> None:
    model = open_artifact(write_model(tmp_path / "a.gguf"))
    document = diff_models(model, model, band=Band(0.0, 1.6))
    assert sentence(document) == "All 21 tensors have the same values."
    page = render_diff(document)
    assert "What does not hold?" not in page
    assert "✓ Holds" in page
