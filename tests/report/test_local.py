from __future__ import annotations

from typing import Any

import pytest
from tests.report import helpers, replays

from driftscope.errors import InputError
from driftscope.report.build import build_report
from driftscope.report.local import FAULTS, local_section
from driftscope.report.names import divergence_line
from driftscope.report.schema import validate_report

PAIRS = [{"pair": "candidate.int8-dot|candidate.llama.cpp"}, {"pair": "teacher.f32|candidate.llama.cpp"}]


def of_paths(*paths: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return local_section({"paths": list(paths), **changes}, PAIRS)


def test_an_absent_replay_is_not_run() -> None:
    assert local_section(None, [])["status"] == "not-run"
    assert "Local errors: not-run" in divergence_line(local_section(None, []))


def test_paths_that_were_not_run_say_why_and_how_to_install() -> None:
    section = of_paths(replays.NOT_INSTALLED)
    assert section["status"] == "not-run"
    assert "no module torch" in section["reason"]
    assert section["paths"][0]["install"] == "pip install 'driftscope[transformers]'"
    assert of_paths({"path": "x", "status": "inadmissible", "reason": "r"})["status"] == "inadmissible"


@pytest.mark.parametrize("installed", [True, False])
def test_a_section_fits_the_schema_with_and_without_engines(installed: bool) -> None:
    evidence = helpers.synthetic_evidence(layers=3)
    evidence["replay"] = replays.replay_document() if installed else {"paths": [replays.NOT_INSTALLED]}
    validate_report(build_report(evidence), "report")


def test_counts_add_up_and_flags_are_listed_in_topological_order() -> None:
    flags = [
        replays.flag(2, "ffn_out", "engine"),
        replays.flag(0, "attn_norm", "arithmetic", prompt="a", p_value=1e-5),
        replays.flag(0, "attn_norm", "arithmetic", prompt="b", p_value=1e-9),
    ]
    section = of_paths(replays.replayed("candidate.f32", flagged=flags), replays.replayed("teacher.f32"))
    path = section["paths"][0]
    assert section["tested"] == 2 * path["tested"]
    assert section["flagged"] == path["flagged_ops"] == 2
    assert [(flag["tap"], flag["prompt"]) for flag in path["flagged"]] == [
        ("attn_norm", "b"),
        ("ffn_out", "story"),
    ]


def test_many_flags_do_not_hide_a_fault() -> None:
    flags = [replays.flag(layer, "ffn_up", "arithmetic") for layer in range(40)]
    section = of_paths(
        replays.replayed("candidate.f32", flagged=[*flags, replays.flag(40, "ffn_up", "engine")])
    )
    assert section["paths"][0]["flagged_ops"] == 41
    assert len(section["paths"][0]["flagged"]) < 41
    assert section["fault"]["layer"] == 40


def test_the_path_at_fault_is_drawn_else_an_engine_on_the_candidate() -> None:
    clean = [replays.replayed(path) for path in replays.PATHS]
    assert of_paths(*clean)["main"] == "candidate.llama.cpp"
    assert of_paths(*clean[:3])["main"] == "candidate.int8-dot"
    assert of_paths(*clean, main="candidate.f32")["main"] == "candidate.f32"
    at_fault = of_paths(replays.faulty("candidate.f32"), *clean[2:], main="candidate.int8-dot")
    assert at_fault["main"] == at_fault["fault"]["path"] == "candidate.f32"


def test_a_path_is_drawn_beside_its_distance_from_the_teacher() -> None:
    section = of_paths(*(replays.replayed(path) for path in replays.PATHS))
    pairs = {path["path"]: path["pair"] for path in section["paths"]}
    assert pairs["candidate.llama.cpp"] == "teacher.f32|candidate.llama.cpp"
    assert pairs["candidate.f32"] is None


def test_a_map_holds_the_worst_part_of_each_tap_in_topological_order() -> None:
    parts = [{"layer": 0, "tap": "qkv_matmul", "engine": value} for value in (1e-13, 0.5, None)]
    cells = [{"layer": -1, "tap": "lm_head", "engine": 0.0}, *parts, {"layer": -1, "tap": "embedding"}]
    found = of_paths(replays.replayed("x", map=cells))["paths"][0]["map"]
    assert [(cell["tap"], cell["engine"]) for cell in found] == [
        ("embedding", None),
        ("qkv_matmul", 0.5),
        ("lm_head", 0.0),
    ]


def test_vote_and_guess_may_be_absent() -> None:
    section = of_paths(replays.replayed("candidate.f32"))
    assert section["vote"]["status"] == section["guess"]["status"] == "not-run"
    assert section["vote"]["reason"]


@pytest.mark.parametrize(
    "document",
    [
        {"paths": 3},
        {"paths": [3]},
        {"paths": [{"path": "x"}]},
        {"paths": [replays.replayed("x", flagged=[{"layer": 0}])]},
        {"paths": [replays.replayed("x", map="no")]},
        {"paths": [], "vote": [1]},
        {"paths": [], "guess": {"path": "x"}},
    ],
)
def test_what_has_not_the_form_of_a_replay_is_refused_in_one_line(document: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^replay\.json: ") as caught:
        local_section(document, [])
    assert "\n" not in str(caught.value)


def test_engine_and_arithmetic_are_put_in_words() -> None:
    arithmetic = {"path": "int8-dot", "activation": "q8_0", "kv_type": "f16", "dtype": "bf16"}
    path = of_paths(replays.replayed("candidate.llama.cpp", arithmetic=arithmetic))["paths"][0]
    assert path["engine"] == "llama.cpp 1.2"
    built = {"name": "llama.cpp", "version": {"llama-cpp-python": "0.3.36", "system": "CPU : " + "AVX " * 9}}
    path = of_paths(replays.replayed("candidate.llama.cpp", engine=built))["paths"][0]
    assert path["engine"] == "llama.cpp (llama-cpp-python 0.3.36)"
    path = of_paths(replays.replayed("candidate.llama.cpp", arithmetic=arithmetic))["paths"][0]
    assert path["arithmetic"] == "int8-dot, activations q8_0, keys and values f16, every output bf16"


def test_a_vote_keeps_who_is_odd_and_counts_the_ops() -> None:
    document = replays.vote(2, replays.odd("a", 1, "ffn_up"), replays.odd("b", 0, "ffn_up"))
    vote = of_paths(replays.replayed("candidate.f32"), vote=document)["vote"]
    assert [item["source"] for item in vote["odd"]] == ["b", "a"]
    assert vote["counts"] == {"odd": len(document["ops"])}
    assert "ops" not in vote
    few = of_paths(replays.replayed("candidate.f32"), vote={"status": "not-run", "reason": "two traces"})
    assert few["vote"] == {"status": "not-run", "reason": "two traces"}


def test_a_guess_keeps_what_wins_and_by_how_much() -> None:
    guess = of_paths(replays.replayed("candidate.f32"), guess=[replays.guess()])["guess"]
    products = guess["paths"][0]["products"]
    assert products == {"status": "decided", "winner": "int8-dot", "residual": 4.7e-13, "margin": 5.1}


def test_one_line_names_the_first_divergence() -> None:
    line = divergence_line(of_paths(replays.faulty()))
    assert line.startswith(
        "First divergence: candidate.llama.cpp, layer 1, q_post_rope (engine): rope-pairing. Turning"
    )
    clean = divergence_line(of_paths(replays.replayed("candidate.f32")))
    assert clean == "First divergence: none; 60 ops of 1 path at their floor"


def test_every_class_has_words() -> None:
    assert all(words and words != kind for kind, words in FAULTS.items())
    assert {"rope-pairing", "capture-point", "non-finite", "corrupt-block", "unexplained"} <= set(FAULTS)
