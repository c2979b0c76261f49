"""Evidence is pinned where a verdict holds, and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.contracts.examples import CONTRACT_YAML, coin_measurement, share, write_contract

from driftscope.contracts.discharge import NotDischargedError, discharge
from driftscope.contracts.loading import load_contract
from driftscope.contracts.model import judgement_sha256, measurement_sha256


def results_with(folder: Path, document: object) -> Path:
    (folder / "falsifiers").mkdir(parents=True, exist_ok=True)
    file = folder / "falsifiers" / "loaded-coin.measurement.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    return folder


def test_the_block_is_written_and_the_rest_of_the_file_kept(tmp_path: Path) -> None:
    file = write_contract(tmp_path, "# A comment.\n" + CONTRACT_YAML)
    header = {"code": "abc", "inputs": {"trace.parquet": "5" * 64}}
    discharge(file, results_with(tmp_path / "r", {**coin_measurement(), "evidence": header}))
    assert file.read_text(encoding="utf-8").startswith("# A comment.\n" + CONTRACT_YAML)
    contract = load_contract(file)
    pinned = contract.evidence["loaded-coin"]
    assert (pinned.verdict, pinned.code, pinned.inputs) == ("supported", "abc", header["inputs"])
    assert pinned.figures == {"left": 0.8, "left_low": 0.75, "left_high": 0.85}
    falsifier = contract.falsifiers[0]
    assert pinned.measurement_sha256 == measurement_sha256(falsifier)
    assert pinned.judgement_sha256 == judgement_sha256(falsifier)


def test_discharging_again_gives_the_same_file(tmp_path: Path) -> None:
    # The block may stand before other keys; it goes to the end once and stays there.
    file = write_contract(tmp_path, CONTRACT_YAML.replace("status_history:", "evidence: {}\nstatus_history:"))
    results = results_with(tmp_path / "r", coin_measurement())
    discharge(file, results)
    once = file.read_bytes()
    discharge(file, results)
    assert file.read_bytes() == once
    assert once.count(b"\nevidence:") == 1


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({"status": "not-run", "reason": "no model"}, "is not-run: no model"),
        (coin_measurement(left=share(0.6, 0.5, 0.7)), "is inconclusive: the interval straddles"),
        ({**coin_measurement(), "samples": 0}, "is inadmissible: nothing was measured"),
        ({**coin_measurement(), "domain": [share(0.9), share(0.9)]}, "is vacuous"),
        ({**coin_measurement(), "controls": {"two-headed": share(0.1), "fair": share(0.1)}}, "did not fire"),
    ],
)
def test_a_verdict_that_does_not_hold_is_refused(tmp_path: Path, document: object, reason: str) -> None:
    file = write_contract(tmp_path)
    with pytest.raises(NotDischargedError, match=reason):
        discharge(file, results_with(tmp_path / "r", document))
    assert file.read_text(encoding="utf-8") == CONTRACT_YAML


def test_what_was_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotDischargedError, match="was not measured in"):
        discharge(write_contract(tmp_path), tmp_path)
