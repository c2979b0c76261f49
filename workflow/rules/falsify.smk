# A measurement depends on what it is told to measure, not on the contract file: a threshold edited there
# re-judges and measures nothing.
rule measure:
    input:
        lambda wildcards: CASE.measurement_inputs(wildcards.falsifier),
    output:
        update(RESULTS + "/falsifiers/{falsifier}.measurement.json"),
    log:
        RESULTS + "/logs/falsify/{falsifier}.measure.log",
    benchmark:
        RESULTS + "/benchmarks/falsify/{falsifier}.measure.tsv"
    wildcard_constraints:
        falsifier="|".join(CASE.falsifiers),
    params:
        contract=lambda wildcards: CASE.contract_file(wildcards.falsifier),
        measurement=lambda wildcards: CASE.measurement_digest(wildcards.falsifier),
        code=code_digest("measure"),
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        "driftscope falsify {params.contract} {wildcards.falsifier} --results {RESULTS}"
        " --out {output} 2> {log}"


rule judge:
    input:
        measurement=RESULTS + "/falsifiers/{falsifier}.measurement.json",
    output:
        update(RESULTS + "/falsifiers/{falsifier}.verdict.json"),
    log:
        RESULTS + "/logs/falsify/{falsifier}.judge.log",
    benchmark:
        RESULTS + "/benchmarks/falsify/{falsifier}.judge.tsv"
    wildcard_constraints:
        falsifier="|".join(CASE.falsifiers),
    params:
        contract=lambda wildcards: CASE.contract_file(wildcards.falsifier),
        clause=lambda wildcards: CASE.judgement_digest(wildcards.falsifier),
        code=code_digest("judge"),
    resources:
        mem_mb=500,
        runtime=5,
    group:
        "judge"
    shell:
        "driftscope judge {params.contract} {wildcards.falsifier} --measurement {input.measurement}"
        " --out {output} > {log} 2>&1"


rule gates:
    input:
        RESULTS + "/admissibility.json",
        RESULTS + "/weights.json",
        RESULTS + "/sweep.json",
        RESULTS + "/decomposition.json",
        RESULTS + "/impact.json",
        expand(RESULTS + "/falsifiers/{falsifier}.verdict.json", falsifier=CASE.falsifiers),
    output:
        update(RESULTS + "/gates.json"),
    log:
        RESULTS + "/logs/gates.log",
    benchmark:
        RESULTS + "/benchmarks/gates.tsv"
    params:
        contracts=CASE.contracts,
        clauses=CASE.gates_digest,
        code=code_digest("judge"),
    resources:
        mem_mb=500,
        runtime=5,
    group:
        "judge"
    shell:
        "driftscope stage gates {params.contracts} --results {RESULTS} --out {output} > {log} 2>&1"


rule published:
    input:
        expand(RESULTS + "/falsifiers/{falsifier}.measurement.json", falsifier=CASE.falsifiers),
    output:
        update(RESULTS + "/published.json"),
    log:
        RESULTS + "/logs/published.log",
    benchmark:
        RESULTS + "/benchmarks/published.tsv"
    params:
        contracts=CASE.contracts,
        figures=CASE.published_digest,
        code=code_digest("measure"),
    resources:
        mem_mb=500,
        runtime=5,
    group:
        "judge"
    shell:
        "driftscope stage published {params.contracts}/published --results {RESULTS}"
        " --out {output} > {log} 2>&1"
