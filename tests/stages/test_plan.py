"""What the workflow lays out before it runs."""

from __future__ import annotations

from typing import Any

import pytest
from tests.workflow.case import CONFIG, ROOT

from driftscope.config import parse_config
from driftscope.engines import available
from driftscope.stages import plan
from driftscope.stages.plan import CasePlan


def case_of(**sections: Any) -> CasePlan:
    config = parse_config({**CONFIG, **sections}, "config.yaml")
    return CasePlan(config, "results/tiny", "results/tiny/config.json", str(ROOT / "contracts"), ())


def traced(*engines: str) -> dict[str, Any]:
    return {**CONFIG["trace"], "engines": list(engines)}


def test_an_engine_that_is_installed_is_traced_on_the_model_that_it_reads() -> None:
    case = case_of(trace=traced("llama.cpp", "transformers"))
    assert case.engines == {"llama.cpp": "candidate.llama.cpp", "transformers": "teacher.transformers"}
    assert case.engines_not_run == []
    assert len({case.engine_versions(engine) for engine in case.engines}) == 2


def test_no_engine_is_traced_that_is_not_asked_for() -> None:
    case = case_of(trace=traced())
    assert case.engines == {}
    assert case.engines_not_run == []


def test_an_engine_that_is_not_installed_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "missing_module", lambda engine: "llama_cpp" if engine == "llama.cpp" else "")
    case = case_of(trace=traced("llama.cpp", "transformers"))
    assert list(case.engines) == ["transformers"]
    assert case.engines_not_run == [
        {
            "path": "candidate.llama.cpp",
            "engine": "llama.cpp",
            "reason": "llama.cpp is not installed (no module llama_cpp)",
            "install": "pip install 'driftscope[llama-cpp]'",
        }
    ]


def test_an_engine_that_cannot_read_the_model_is_named() -> None:
    models = {**CONFIG["models"], "candidate": {"derive": "teacher", "from": "source", "dtype": "BF16"}}
    case = case_of(models=models, trace=traced("llama.cpp"))
    assert case.engines == {}
    (absent,) = case.engines_not_run
    assert absent["reason"] == "llama.cpp reads a GGUF file, and the candidate `candidate` is none"


@pytest.mark.parametrize(
    ("role", "engine", "wanted"),
    [("candidate", "llama.cpp", "a GGUF file"), ("teacher", "transformers", "a safetensors folder")],
)
def test_no_other_engine_reads_an_apr_file(role: str, engine: str, wanted: str) -> None:
    models = {**CONFIG["models"], role: {"source": "file:model.apr"}}
    case = case_of(models=models, trace=traced(engine))
    assert case.engines == {}
    (absent,) = case.engines_not_run
    assert absent["reason"] == f"{engine} reads {wanted}, and the {role} `{role}` is none"


def test_a_missing_module_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {engine: available.missing_module(engine) for engine in available.EXTRAS} == {
        "llama.cpp": "",
        "transformers": "",
    }
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: None if name == "torch" else name)
    assert available.missing_module("transformers") == "torch"
