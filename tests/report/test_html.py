from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tests.report import helpers, replays

from driftscope.report.build import build_report
from driftscope.report.heat_map import OUTLINE
from driftscope.report.html import render_html
from driftscope.report.schema import validate_report
from driftscope.report.topology import LAYER_TAPS
from driftscope.report.verdict import CLASSES

_VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}


class Page(HTMLParser):
    """Tags with their attributes, visible text, and a check that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.parts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.parts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return build_report(helpers.synthetic_evidence(layers=4))


@pytest.fixture(scope="module")
def html(report: dict[str, Any]) -> str:
    return render_html(report)


def test_the_page_asks_nothing_of_the_network(html: str) -> None:
    page = Page(html)
    assert {"script", "iframe", "object", "embed", "base"}.isdisjoint(tag for tag, _ in page.tags)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "xlink:href", "poster", "data", "action"):
                assert value is not None
                assert value.startswith(("#", "data:,")), (tag, name, value)
    for address in re.findall(r"url\(([^)]*)\)", html):
        assert address.startswith("#")
    assert "@import" not in html
    assert set(re.findall(r"https?://[^\"' >]+", html)) <= {"http://www.w3.org/2000/svg"}
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_page_leads_with_the_verdict(html: str, report: dict[str, Any]) -> None:
    text = Page(html).text
    order = [
        report["verdict"]["headline"],
        "mean KL, nats",
        "Where does it start",
        "How much does each mechanism contribute?",
        "Which hypotheses hold?",
        "published figures?",
        "Are the weights the same?",
        "Does it matter?",
        "May it ship?",
        "What was this made of?",
        "What was not run?",
    ]
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_the_page_shows_every_falsifier_gate_and_digest(html: str, report: dict[str, Any]) -> None:
    text = Page(html).text
    flat = text.replace(" ", "")
    for item in report["falsifiers"] + report["published"]:
        for key in ("id", "asked", "found", "would_change"):
            assert item[key].replace(" ", "") in flat
    for gate in report["gates"]:
        assert gate["found"] in text
    for model in report["inputs"]["models"]:
        assert model["files"][0]["sha256"] in text


def test_a_falsifier_shows_what_kept_it_honest(html: str) -> None:
    text = Page(html).text
    assert "1 of 2 controls as required (not shuffled); 2 regimes" in text
    assert "over 120 samples of the domain 96 hold, 24 do not" in text


def test_ids_are_unique_and_pictures_are_named(html: str) -> None:
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == 8
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert set(str(attributes["aria-labelledby"]).split()) <= set(ids)
    for attributes in (a for t, a in page.tags if t == "a"):
        assert str(attributes["href"])[1:] in ids


def test_untrusted_text_is_escaped() -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7 * 7 }}"
    evidence = helpers.synthetic_evidence(layers=1)
    evidence["title"] = evil
    evidence["models"] = [
        {**model, "id": evil, "source": evil, "config": {evil: evil}} for model in evidence["models"]
    ]
    evidence["falsifiers"] = [{"id": evil, "verdict": "supported", "asked": evil, "found": evil}]
    evidence["sweep_inventory"] = {**evidence["sweep_inventory"], "extra": [evil], "unmapped_b": [evil]}
    shares = evidence["decomposition"]["shares"]
    evidence["decomposition"]["shares"] = [{**share, "item": share["item"] + evil} for share in shares]
    impact = copy.deepcopy(evidence["impact"])
    for pair in impact["pairs"]:
        for flip in pair["flips"]:
            flip["sequence"] = evil
    evidence["impact"] = impact
    html = render_html(build_report(evidence))
    page = Page(html)
    assert "<script" not in html
    assert "<img" not in html
    assert {"script", "img"}.isdisjoint(tag for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "{{ 7 * 7 }}" in page.text


def test_corrupt_blocks_are_listed_with_where_and_how_that_is_seen() -> None:
    evidence = helpers.synthetic_evidence(layers=2)
    name, evil = "model.layers.1.mlp.up_proj.weight", "<script>alert(1)</script>"
    other = {**helpers.flipped_bit(name, 9), "kind": "outlying-error", "statement": evil, "corrupt": False}
    helpers.put_findings(evidence, [other, helpers.flipped_bit(name)])
    html = render_html(build_report(evidence))
    assert "<script" not in html
    text = Page(html).text
    section = text[text.index("What single blocks show") :]
    assert section.index("flipped bit") < section.index("outlying error")
    for said in (
        "123 456 blocks of",
        "2 blocks and 0 rows off",
        "columns 256 to 511",
        "byte 4 711 of the file",
    ):
        assert said in section.replace("\u202f", " ").replace("\u00a0", " ").replace(",", " "), said
    assert "corrupt block" in text[: text.index("What single blocks show")]


def test_blocks_that_were_not_looked_into_are_said_to_be_so() -> None:
    assert "Single blocks were not looked into" in Page(render_html(build_report(looked_into(None)))).text
    text = Page(render_html(build_report(looked_into([])))).text
    assert "0 blocks and 0 rows off" in text
    assert "not looked into" not in text


def looked_into(findings: list[dict[str, Any]] | None) -> Any:
    evidence = helpers.synthetic_evidence(layers=1)
    if findings is not None:
        helpers.put_findings(evidence, findings)
    return evidence


@pytest.mark.parametrize("kind", CLASSES)
def test_every_verdict_has_its_word_on_the_page(report: dict[str, Any], kind: str) -> None:
    verdict = {**report["verdict"], "class": kind, "layer": 3, "op": "ffn_out"}
    text = Page(render_html({**report, "verdict": verdict})).text
    assert kind.replace("-", " ").capitalize() in text


def test_a_report_with_nothing_run_says_so_everywhere(report: dict[str, Any]) -> None:
    html = render_html(build_report({"name": "empty"}))
    text = Page(html).text
    assert "<svg" not in html
    assert "No verdict" in text
    assert text.count("not run") > 10


@pytest.mark.parametrize(
    "part", ["sweep", "divergence", "decomposition", "impact", "sweep_summary", "traces", "admissibility"]
)
def test_any_part_may_be_absent(part: str) -> None:
    evidence = helpers.synthetic_evidence(layers=1)
    del evidence[part]
    Page(render_html(build_report(evidence)))


def test_optional_figures_may_be_absent() -> None:
    evidence = helpers.synthetic_evidence(layers=1)
    needed = ("pair", "positions", "mean_kl", "same_top1")
    evidence["impact"] = {"pairs": [{key: p[key] for key in needed} for p in evidence["impact"]["pairs"]]}
    kept = ("status", "positions", "shares", "controls")
    evidence["decomposition"] = {key: evidence["decomposition"][key] for key in kept}
    Page(render_html(build_report(evidence)))


def test_the_bytes_depend_on_the_report_alone(report: dict[str, Any], html: str, tmp_path: Path) -> None:
    """Another process, another hash order, other threads and no fonts: the same bytes."""
    (tmp_path / "r.json").write_text(json.dumps(report))
    (tmp_path / "fonts.conf").write_text("<fontconfig></fontconfig>")
    program = (
        "import json, sys; from driftscope.report.html import render_html;"
        "sys.stdout.buffer.write(render_html(json.load(open(sys.argv[1]))).encode())"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "7",
        "FONTCONFIG_FILE": str(tmp_path / "fonts.conf"),
        "LANG": "C",
        "TZ": "Asia/Tokyo",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "r.json")],
        capture_output=True,
        check=True,
        env=environment,
    )
    assert done.stdout.decode() == html


def replayed_case(**changes: Any) -> dict[str, Any]:
    """Return a report of a case with llama.cpp, whose replay is changed so."""
    evidence = helpers.synthetic_evidence(layers=3)
    divergence = evidence["divergence"]
    engine = divergence.filter(pl.col("pair") == helpers.PAIRS[2]).with_columns(
        pl.lit("teacher.f32|candidate.llama.cpp").alias("pair")
    )
    evidence["divergence"] = pl.concat([divergence, engine])
    evidence["replay"] = {**replays.replay_document(), **changes}
    random = np.random.Generator(np.random.Philox(7))
    pairs = ("teacher.f32|candidate.int8-dot", "teacher.f32|candidate.llama.cpp")
    evidence["propagation"] = replays.propagation_table(3, random, pairs)
    report = build_report(evidence)
    validate_report(report, "report")
    return report


@pytest.fixture(scope="module")
def at_fault() -> str:
    faulty = {**replays.faulty(), "fits_better": replays.guess()}
    return render_html(replayed_case(paths=[faulty, replays.NOT_INSTALLED]))


def test_the_first_divergence_is_named_outlined_and_drawn_beside_the_propagated_error(at_fault: str) -> None:
    page = Page(at_fault)
    text = page.text
    assert text.index("first divergence") < text.index("Propagated error")
    assert "layer 1, q_post_rope on candidate llama.cpp" in text
    assert "rope-pairing" in text
    assert "explains this path better: Integer products" in text
    assert "recorded − declared: the op in the arithmetic that the trace declares" in text
    strokes = [attributes.get("stroke") for tag, attributes in page.tags if tag == "path"]
    assert strokes.count(OUTLINE[0]) == 5
    assert at_fault.count(">▼ layer 1, q_post_rope</text>") == 5
    shown = [
        str(attributes["id"]) for _, attributes in page.tags if str(attributes.get("id")).endswith("-title")
    ]
    assert shown[:5] == [
        "local-engine-title",
        "local-propagated-title",
        "local-arithmetic-title",
        "local-model-title",
        "local-total-title",
    ]


def test_every_op_stands_in_the_picture_and_in_the_table(at_fault: str) -> None:
    picture = at_fault[
        at_fault.index('id="local-engine-title"') : at_fault.index('id="local-propagated-title"')
    ]
    for tap in (*LAYER_TAPS, "embedding", "final_norm", "lm_head"):
        assert f">{tap}</text>" in picture
        assert f'<td class="mono">{tap}</td>' in at_fault


def test_the_page_says_which_comparisons_were_not_run(at_fault: str) -> None:
    text = Page(at_fault).text
    assert text.count("pip install 'driftscope[transformers]'") == 3
    assert "Replay of teacher.transformers" in text


def test_a_clean_replay_says_so_and_folds_the_other_paths() -> None:
    page = Page(render_html(replayed_case()))
    assert "Every one of 240 ops on 4 paths is at its floor." in page.text
    for path in ("teacher f32", "candidate f32", "candidate int8-dot"):
        assert f"Pictures of {path}" in page.text
    assert "▼" not in page.text
    assert "Of 120 clean runs" in page.text
    assert "0.0 % had a false alarm (0.0 to 3.0 %, 95 % interval)" in page.text.replace("\u00a0", " ")


def test_vote_guess_and_capture_points_are_shown() -> None:
    point = {"layer": 0, "tap": "attn_out", "found": "after the residual", "statement": "off by the residual"}
    entry = replays.replayed("candidate.llama.cpp", capture_points=[point])
    vote = replays.vote(3, replays.odd("candidate.llama.cpp", 1, "attn_out"))
    text = Page(render_html(replayed_case(paths=[entry], vote=vote))).text
    for words in (
        "That is no divergence",
        "off by the residual",
        "Who is the odd one out?",
        "42,000 × the usual distance",
        "12.3 decades over the others",
        "Which arithmetic explains a foreign trace best?",
        "Integer products with q8_K activations",
    ):
        assert words in text


def test_growth_has_the_first_token_apart_and_a_table(at_fault: str) -> None:
    page = Page(at_fault)
    order = [
        "How does it grow?",
        "The first token left out",
        "The first token alone",
        "in figures, layer by layer",
    ]
    places = [page.text.index(words) for words in order]
    assert places == sorted(places)
    first = page.text[places[1] : places[2]]
    assert "teacher f32 → candidate llama.cpp" in first


def test_parts_of_the_replay_may_be_absent() -> None:
    bare = {"path": "x", "status": "done", "tested": 5}
    for paths in ([bare], [replays.NOT_INSTALLED], [{**replays.faulty(), "map": []}], []):
        Page(render_html(replayed_case(paths=paths, vote=None, guess=None, floors=None)))


def test_text_of_a_replay_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    entry = replays.faulty(statement=evil, tap=evil, **{"class": evil})
    entry = {**entry, "path": evil, "engine": evil, "map": [{**entry["map"][0], "layer": 1, "tap": evil}]}
    vote = {"sources": [evil], "odd": [replays.odd(evil, 0, evil)], "conclusion": evil}
    guess = [{"path": evil, "statement": evil, "products": {"winner": evil}}]
    html = render_html(replayed_case(paths=[entry], vote=vote, guess=guess))
    assert "<script" not in html
    Page(html)
