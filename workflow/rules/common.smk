import json
import os
import sys
from pathlib import Path
from shlex import quote

from driftscope.config import ENGINE_PAIRS, PAIRS, PATHS
from driftscope.evidence.digest import code_digest, sha256_json
from driftscope.stages.plan import CasePlan, plan_case


def usable(make):
    """Return what `make` returns; a user's mistake ends Snakemake with one line and exit code 2."""
    from driftscope.errors import InputError

    try:
        return make()
    except InputError as error:
        print(f"driftscope: {error}", file=sys.stderr, flush=True)
        os._exit(2)


CASE: CasePlan = usable(
    lambda: plan_case(config, workflow.configfiles, Path(workflow.basedir))
)
CONFIG = CASE.config
RESULTS = CASE.results
RESOLVED = CASE.resolved
TEACHER = f"{RESULTS}/models/{CONFIG.pair.teacher}.json"
CANDIDATE = f"{RESULTS}/models/{CONFIG.pair.candidate}.json"
PROMPTS = f"{RESULTS}/prompts.json"
REPORT = f"results/{CONFIG.name}_report.json"
ENVIRONMENT = "../envs/driftscope.yaml"
# Our own paths, and those of the engines that are asked for and installed.
ENGINE_OF = {path: engine for engine, path in CASE.engines.items()}
TRACED = [*PATHS, *ENGINE_OF]
COMPARED = [*PAIRS, *(pair for engine in CASE.engines for pair in ENGINE_PAIRS[engine])]


wildcard_constraints:
    path="|".join(PATHS).replace(".", r"\."),
    traced="|".join(TRACED).replace(".", r"\."),
    foreign="|".join(ENGINE_OF).replace(".", r"\.") or "none",
    chunk=r"\d+",
    job=r"\d+",
    shard=r"\d+",


def manifest_of(path):
    """Return the manifest of the artifact that a path runs on."""
    return TEACHER if path.startswith("teacher.") else CANDIDATE


def labelled(option, paths, files):
    """Return `--option path=file` for each path."""
    return " ".join(f"--{option} '{path}={file}'" for path, file in zip(paths, files))


def arrays_of(path):
    """Return the files of a trace that change with it: its manifest, and of our own paths the arrays."""
    chunks = [] if path in ENGINE_OF else range(CONFIG.trace.chunks)
    taps = [f"{RESULTS}/trace/{path}/taps_{chunk}.safetensors" for chunk in chunks]
    return [f"{RESULTS}/trace/{path}/trace.json", *taps]


def state_before(wildcards):
    """Return the residual stream that the chunk before left, or nothing for the first chunk."""
    chunk = int(wildcards.chunk)
    return (
        f"{RESULTS}/trace/{wildcards.path}/state_{chunk - 1}.safetensors"
        if chunk
        else []
    )
