# A measurement depends on what it is told to measure, not on the contract file: a threshold edited there
# re-judges and measures nothing.
rule measure:
    input:
        lambda wildcards: CASE.measurement_inputs(wildcards.falsifier),
    output:
        update(f"{RESULTS}/falsifiers/{{falsifier}}.measurement.json"),
    log:
        f"{RESULTS}/logs/falsify/{{falsifier}}.measure.log",
    benchmark:
        f"{RESULTS}/benchmarks/falsify/{{falsifier}}.measure.tsv"
    wildcard_constraints:
        falsifier="|".join(CASE.falsifiers),
    conda:
        ENVIRONMENT
    resources:
        mem_mb=2000,
        runtime=30,
        gpu=lambda wildcards: CASE.measurement_gpus(wildcards.falsifier),
    params:
        results=lambda wildcards: RESULTS,
        contract=lambda wildcards: CASE.contract_file(wildcards.falsifier),
        measurement=lambda wildcards: CASE.measurement_digest(wildcards.falsifier),
        device=lambda wildcards: CASE.measurement_device(wildcards.falsifier),
        code=code_digest("measure"),
    shell:
        "driftscope falsify {params.contract:q} {wildcards.falsifier} --results {params.results}"
        " --out {output} --device {params.device} 2> {log}"


rule judge:
    input:
        measurement=f"{RESULTS}/falsifiers/{{falsifier}}.measurement.json",
    output:
        update(f"{RESULTS}/falsifiers/{{falsifier}}.verdict.json"),
    log:
        f"{RESULTS}/logs/falsify/{{falsifier}}.judge.log",
    benchmark:
        f"{RESULTS}/benchmarks/falsify/{{falsifier}}.judge.tsv"
    wildcard_constraints:
        falsifier="|".join(CASE.falsifiers),
    group:
        "judge"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=500,
        runtime=5,
    params:
        contract=lambda wildcards: CASE.contract_file(wildcards.falsifier),
        clause=lambda wildcards: CASE.judgement_digest(wildcards.falsifier),
        code=code_digest("judge"),
    shell:
        "driftscope judge {params.contract:q} {wildcards.falsifier} --measurement {input.measurement}"
        " --out {output} > {log} 2>&1"


rule gates:
    input:
        f"{RESULTS}/admissibility.json",
        f"{RESULTS}/weights.json",
        f"{RESULTS}/sweep.json",
        f"{RESULTS}/sweep.parquet",
        f"{RESULTS}/decomposition.json",
        f"{RESULTS}/impact.json",
        expand(
            f"{RESULTS}/falsifiers/{{falsifier}}.verdict.json",
            falsifier=CASE.falsifiers,
        ),
    output:
        update(f"{RESULTS}/gates.json"),
    log:
        f"{RESULTS}/logs/gates.log",
    benchmark:
        f"{RESULTS}/benchmarks/gates.tsv"
    group:
        "judge"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=500,
        runtime=5,
    params:
        results=lambda wildcards: RESULTS,
        contracts=CASE.contracts,
        clauses=CASE.gates_digest,
        code=code_digest("judge"),
    shell:
        "driftscope stage gates {params.contracts:q} --results {params.results} --out {output} > {log} 2>&1"


rule published:
    input:
        expand(
            f"{RESULTS}/falsifiers/{{falsifier}}.measurement.json",
            falsifier=CASE.falsifiers,
        ),
        TEACHER,
        CANDIDATE,
    output:
        update(f"{RESULTS}/published.json"),
    log:
        f"{RESULTS}/logs/published.log",
    benchmark:
        f"{RESULTS}/benchmarks/published.tsv"
    group:
        "judge"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=500,
        runtime=5,
    params:
        results=lambda wildcards: RESULTS,
        contracts=CASE.contracts,
        figures=CASE.published_digest,
        code=code_digest("judge"),
    shell:
        "driftscope stage published {params.contracts:q}/published --results {params.results}"
        " --out {output} > {log} 2>&1"
