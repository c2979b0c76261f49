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

import pytest
from tests.report import helpers

from driftscope.report.build import build_report
from driftscope.report.html import render_html
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
