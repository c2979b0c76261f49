"""The Slurm profile against a real Slurm of one node: its jobs, its GPUs, and the evidence they leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.slurm.one_node import OneNode
from tests.workflow.case import ROOT, Case

PROFILE = "workflow/profiles/slurm"
# What docs/howto/cluster.md has a user set: this cluster has two partitions, no accounting database, and as
# many cores as this machine.
SETTINGS = (
    *("--workflow-profile", PROFILE),
    *("--slurm-status-command", "squeue"),
    *("--slurm-init-seconds-before-status-checks", "2"),
    *("--default-resources", "slurm_partition=cpu", "mem_mb=1000", "runtime=10"),
)

DEVICES = """
rule all:
    input: "with", "without"
    localrule: True
rule with_gpu:
    output: "with"
    resources: gpu=1, gpu_model="h100", slurm_partition="gpu", mem_mb=200, runtime=5
    shell: "echo $SLURM_JOB_PARTITION ${{CUDA_VISIBLE_DEVICES-none}} > {output}"
rule without_gpu:
    output: "without"
    resources: gpu=0, mem_mb=200, runtime=5
    shell: "echo $SLURM_JOB_PARTITION ${{CUDA_VISIBLE_DEVICES-none}} > {output}"
"""


def snakemake(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", *SETTINGS, "--cores", str(os.cpu_count()), *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=Case(folder).environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )


@pytest.mark.slurm
def test_a_job_sees_a_gpu_only_where_one_is_asked_for(cluster: OneNode, tmp_path: Path) -> None:
    (tmp_path / PROFILE).mkdir(parents=True)
    (tmp_path / PROFILE / "config.yaml").write_bytes((ROOT / PROFILE / "config.yaml").read_bytes())
    (tmp_path / "Snakefile").write_text(DEVICES, encoding="utf-8")
    # The profile's set-resources name driftscope's rules, which this workflow has not.
    done = snakemake(tmp_path, "--set-resources", "with_gpu:gpu=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "with").read_text().split() == ["gpu", "0"]
    assert (tmp_path / "without").read_text().split() == ["cpu", "none"]


@pytest.mark.slurm
def test_a_case_leaves_the_same_bytes_as_on_one_machine(cluster: OneNode, tmp_path: Path) -> None:
    case = Case.create(tmp_path / "local")
    on_nodes = case.copy(tmp_path / "cluster")
    done = case.run()
    assert done.returncode == 0, done.stdout + done.stderr

    before = len(cluster.completed())
    # One rule takes a GPU by the option that the profile documents.
    done = snakemake(
        on_nodes.folder,
        on_nodes.report.relative_to(on_nodes.folder).as_posix(),
        *("--set-resources", "base_pass:gpu=1", "base_pass:slurm_partition=gpu"),
    )
    assert done.returncode == 0, done.stdout + done.stderr

    assert on_nodes.evidence() == case.evidence()
    jobs = cluster.completed()[before:]
    assert {job["JobState"] for job in jobs} == {"COMPLETED"}
    assert sum(job["Partition"] == "gpu" for job in jobs) == 3
    assert "localrule fetch:" in done.stderr, "a node without a route out cannot download"


@pytest.mark.slurm
def test_a_users_mistake_is_one_line_before_anything_is_submitted(cluster: OneNode, tmp_path: Path) -> None:
    case = Case.create(tmp_path / "case")
    case.configure(swep={"shards": 2})
    before = len(cluster.completed())
    done = snakemake(case.folder)
    assert done.returncode == 2
    assert "swep" in done.stderr
    assert len(cluster.completed()) == before
