"""What the Slurm profile says, checked without a Slurm."""

from __future__ import annotations

import re
from typing import Any

import yaml
from tests.workflow.case import ROOT

PROFILE: dict[str, Any] = yaml.safe_load((ROOT / "workflow/profiles/slurm/config.yaml").read_text())
RULES = "\n".join(path.read_text() for path in sorted((ROOT / "workflow/rules").glob("*.smk")))


def test_every_rule_it_names_exists() -> None:
    rules = set(re.findall(r"^\s*rule (\w+):", RULES, re.MULTILINE))
    assert set(PROFILE["set-resources"]) <= rules


def test_no_gpu_is_reserved_by_default() -> None:
    assert {resources["gpu"] for resources in PROFILE["set-resources"].values()} == {0}
    assert set(re.findall(r"\bgpu=(\d+)", RULES)) == {"0"}


def test_every_job_states_its_memory_and_time() -> None:
    for rule in re.split(r"^\s*rule (?=\w+:)", RULES, flags=re.MULTILINE)[1:]:
        name = rule.split(":", 1)[0]
        assert re.search(r"\bmem_mb=", rule), name
        assert re.search(r"\bruntime=", rule), name
