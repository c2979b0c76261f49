"""What the Slurm profile says, checked without a Slurm."""

from __future__ import annotations

import re
from typing import Any

import yaml
from tests.workflow.case import ROOT

TEXT = (ROOT / "workflow/profiles/slurm/config.yaml").read_text()
PROFILE: dict[str, Any] = yaml.safe_load(TEXT)
# What its comments show of the stages that a GPU can speed up.
COMMENTS = TEXT[TEXT.index("# set-resources:") :]
EXAMPLE: dict[str, Any] = yaml.safe_load(re.sub(r"^# ?", "", COMMENTS, flags=re.MULTILINE))
RULES = "\n".join(path.read_text() for path in sorted((ROOT / "workflow/rules").glob("*.smk")))


def test_every_rule_it_names_exists() -> None:
    rules = set(re.findall(r"^\s*rule (\w+):", RULES, re.MULTILINE))
    assert set(EXAMPLE["set-resources"]) <= rules


def test_a_gpu_is_asked_for_by_the_rules_that_take_a_device_and_by_no_profile() -> None:
    assert "set-resources" not in PROFILE
    for rule in re.split(r"^\s*rule (?=\w+:)", RULES, flags=re.MULTILINE)[1:]:
        name = rule.split(":", 1)[0]
        assert bool(re.search(r"gpu=(lambda wildcards: )?CASE\.", rule)) == ("--device" in rule), name
        assert ("gpu=" in rule) == (name in EXAMPLE["set-resources"]), name


def test_every_job_states_its_memory_and_time() -> None:
    for rule in re.split(r"^\s*rule (?=\w+:)", RULES, flags=re.MULTILINE)[1:]:
        name = rule.split(":", 1)[0]
        assert re.search(r"\bmem_mb=", rule), name
        assert re.search(r"\bruntime=", rule), name
