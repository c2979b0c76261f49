from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from tests.report import helpers

from driftscope.errors import InputError
from driftscope.report.build import build_report
from driftscope.report.schema import report_schema, validate_report
from driftscope.report.verdict import CLASSES
from driftscope.report.weights import RELATIONS


def test_the_schema_is_valid_and_names_what_the_code_names() -> None:
    schema = report_schema()
    Draft202012Validator.check_schema(schema)
    assert schema["properties"]["verdict"]["properties"]["class"]["enum"] == list(CLASSES)
    assert schema["$defs"]["relation"]["enum"] == list(RELATIONS)


def test_findings_in_blocks_are_part_of_the_schema() -> None:
    evidence = helpers.synthetic_evidence(layers=1)
    finding = helpers.flipped_bit("model.layers.0.mlp.up_proj.weight")
    helpers.put_findings(evidence, [finding])
    report = build_report(evidence)
    validate_report(report, "report")
    (listed,) = report["weights"]["blocks"]["findings"]
    assert {key: listed[key] for key in finding} == finding
    listed["kind"] = "odd"
    with pytest.raises(InputError, match=r"findings\[0\].*'odd'"):
        validate_report(report, "report")


def change_class(report: Any) -> None:
    report["verdict"]["class"] = "fine"


def add_key(report: Any) -> None:
    report["extra"] = 1


def drop_key(report: Any) -> None:
    del report["gates"]


def empty_falsifiers(report: Any) -> None:
    report["falsifiers"] = []


def unknown_outcome(report: Any) -> None:
    report["falsifiers"][0]["verdict"] = "passed"


def share_as_text(report: Any) -> None:
    report["decomposition"]["shares"][0]["share"] = "93 %"


def share_without_interval(report: Any) -> None:
    del report["decomposition"]["shares"][0]["low"]


def not_run_without_reason(report: Any) -> None:
    report["impact"] = {"status": "not-run"}


def short_digest(report: Any) -> None:
    report["inputs"]["models"][0]["files"][0]["sha256"] = "abc"


def top1_over_one(report: Any) -> None:
    report["impact"]["pairs"][0]["same_top1"] = 91.4


@pytest.mark.parametrize(
    "spoil",
    [
        change_class,
        add_key,
        drop_key,
        empty_falsifiers,
        unknown_outcome,
        share_as_text,
        share_without_interval,
        not_run_without_reason,
        short_digest,
        top1_over_one,
    ],
)
def test_a_spoilt_report_is_refused_in_one_line(spoil: Callable[[Any], None]) -> None:
    report = copy.deepcopy(build_report(helpers.synthetic_evidence(layers=1)))
    validate_report(report, "r.json")
    spoil(report)
    with pytest.raises(InputError, match=r"^r\.json: breaks the report's schema at \$") as caught:
        validate_report(report, "r.json")
    assert "\n" not in str(caught.value)
