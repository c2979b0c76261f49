"""What runs again after an edit, and what does not."""

from __future__ import annotations

import hashlib

import pytest
from tests.workflow.case import MODEL, Case, jobs_planned, jobs_run, one_line, tiny_model_tensors, write_model

from driftscope.contracts.loading import load_contracts
from driftscope.falsifiers.registry import measurement_module

pytestmark = pytest.mark.slow

JUDGED_AGAIN = {
    "results/tiny/falsifiers/chain-superlinear.verdict.json",
    "results/tiny/gates.json",
    "results/tiny/published.json",
    "results/tiny/falsifiers/chain-superlinear.measurement.json",
    "results/tiny_report.json",
    "results/tiny_report.html",
}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    """The files whose bytes are other ones; both sides must list the same files."""
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_nothing_changed_runs_nothing(case: Case) -> None:
    before = case.evidence()
    for done in (case.snakemake(), case.run(), case.snakemake(cores=1)):
        assert done.returncode == 0, done.stderr
        assert jobs_run(done) == {}
        assert "Nothing to be done" in done.stdout + done.stderr
    assert case.evidence() == before


def test_a_threshold_judges_again_and_measures_nothing(case: Case) -> None:
    before = case.evidence()
    case.edit("contracts/chain.yaml", "threshold: 1.0", "threshold: 0.25")
    done = case.snakemake()
    assert done.returncode == 0, done.stderr
    assert jobs_run(done) == {"judge": 1, "gates": 1, "report": 1}
    again = changed(before, case.evidence())
    assert "results/tiny/falsifiers/chain-superlinear.verdict.json" in again
    assert "results/tiny_report.json" in again
    assert not any(name.endswith(".measurement.json") for name in again)
    assert again <= JUDGED_AGAIN


def test_a_measurement_parameter_measures_that_one_again(case: Case) -> None:
    before = case.evidence()
    case.edit("contracts/chain.yaml", "activations: 4", "activations: 3")
    done = case.snakemake()
    assert done.returncode == 0, done.stderr
    assert jobs_run(done) == {"measure": 1, "judge": 1, "gates": 1, "published": 1, "report": 1}
    again = changed(before, case.evidence())
    assert "results/tiny/falsifiers/chain-superlinear.measurement.json" in again
    assert again <= JUDGED_AGAIN


def test_the_band_of_the_sweep_compares_nothing_anew(case: Case) -> None:
    case.configure(sweep={"shards": 2, "band": [0.0, 1.7]})
    done = case.snakemake("--dry-run")
    assert done.returncode == 0, done.stderr
    assert jobs_planned(done) == {"weights": 1, "gates": 1, "report": 1}


def test_a_changed_model_stops_until_it_is_locked_and_then_runs_all_that_reads_it(case: Case) -> None:
    before = case.evidence()
    old = hashlib.sha256((case.folder / MODEL).read_bytes()).hexdigest()
    write_model(case.folder / MODEL, tiny_model_tensors(seed=1))
    new = hashlib.sha256((case.folder / MODEL).read_bytes()).hexdigest()

    line = one_line(case.run())
    assert old in line
    assert new in line
    assert case.evidence() == before

    case.lock()
    done = case.snakemake("--dry-run")
    assert done.returncode == 0, done.stderr
    models = {"fetch": 1, "derive": 2, "prompts": 1, "sweep_shard": 2, "sweep": 1, "weights": 1}
    traces = {"trace_chunk": 6, "trace": 3, "divergence_chunk": 2, "divergence": 1, "admissibility": 1}
    replays = {"engine_trace": 2, "replay_chunk": 10, "diagnose": 5, "replay": 1}
    replays |= {"propagation_pair": 4, "propagation": 1}
    energies = {"base_pass": 3, "counterfactuals": 2, "decompose": 1, "impact": 1, "fix_scope": 1}
    # A measurement that draws all it measures reads no model.
    affected = _measurements_that_read_evidence(case)
    judged = {"measure": affected, "judge": affected, "gates": 1, "published": 1, "report": 1}
    assert jobs_planned(done) == models | traces | replays | energies | judged
    assert case.evidence() == before


def _measurements_that_read_evidence(case: Case) -> int:
    asked = [
        falsifier.measurement
        for item in load_contracts([case.folder / "contracts"])
        for falsifier in item.contract.falsifiers
    ]
    return sum(bool(measurement_module(item.name).inputs(item.parameters)) for item in asked)
