JOBS = CONFIG.decomposition.jobs


rule base_pass:
    input:
        teacher=TEACHER,
        candidate=CANDIDATE,
        prompts=PROMPTS,
    output:
        update(RESULTS + "/decomposition/base_{path}.safetensors"),
    log:
        RESULTS + "/logs/decompose/base_{path}.log",
    benchmark:
        RESULTS + "/benchmarks/decompose/base_{path}.tsv"
    params:
        minimum=CONFIG.decomposition.minimum_positions,
        code=code_digest("decompose"),
    resources:
        mem_mb=4000,
        runtime=60,
    shell:
        "driftscope stage base {wildcards.path} --teacher {input.teacher} --candidate {input.candidate}"
        " --prompts {input.prompts} --minimum {params.minimum} --out {output} --threads {threads} 2> {log}"


rule counterfactuals:
    input:
        teacher=TEACHER,
        candidate=CANDIDATE,
        prompts=PROMPTS,
        bases=expand(RESULTS + "/decomposition/base_{path}.safetensors", path=PATHS),
    output:
        update(RESULTS + "/decomposition/energies_{job}.parquet"),
    log:
        RESULTS + "/logs/decompose/{job}.log",
    benchmark:
        RESULTS + "/benchmarks/decompose/{job}.tsv"
    params:
        jobs=JOBS,
        bases=lambda wildcards, input: labelled("base", PATHS, input.bases),
        code=code_digest("decompose"),
    resources:
        mem_mb=4000,
        runtime=240,
    shell:
        "driftscope stage counterfactuals --teacher {input.teacher} --candidate {input.candidate}"
        " --prompts {input.prompts} {params.bases} --part {wildcards.job}/{params.jobs}"
        " --out {output} --threads {threads} 2> {log}"


rule decompose:
    input:
        expand(RESULTS + "/decomposition/energies_{job}.parquet", job=range(JOBS)),
    output:
        table=update(RESULTS + "/decomposition/energies.parquet"),
        document=update(RESULTS + "/decomposition.json"),
    log:
        RESULTS + "/logs/decompose.log",
    benchmark:
        RESULTS + "/benchmarks/decompose.tsv"
    params:
        resampling=CASE.resampling,
        code=code_digest("decompose"),
    resources:
        mem_mb=1000,
        runtime=10,
    group:
        "decompose"
    shell:
        "driftscope stage shares {input} --config {RESOLVED} --table {output.table}"
        " --out {output.document} 2> {log}"


rule impact:
    input:
        prompts=PROMPTS,
        bases=expand(RESULTS + "/decomposition/base_{path}.safetensors", path=PATHS),
    output:
        table=update(RESULTS + "/impact.parquet"),
        document=update(RESULTS + "/impact.json"),
    log:
        RESULTS + "/logs/impact.log",
    benchmark:
        RESULTS + "/benchmarks/impact.tsv"
    params:
        bases=lambda wildcards, input: labelled("base", PATHS, input.bases),
        resampling=CASE.resampling,
        code=code_digest("decompose"),
    resources:
        mem_mb=3000,
        runtime=30,
    shell:
        "driftscope stage impact --prompts {input.prompts} {params.bases} --config {RESOLVED}"
        " --table {output.table} --out {output.document} 2> {log}"


rule fix_scope:
    input:
        decomposition=rules.decompose.output.document,
        impact=rules.impact.output.document,
    output:
        update(RESULTS + "/fix_scope.json"),
    log:
        RESULTS + "/logs/fix_scope.log",
    benchmark:
        RESULTS + "/benchmarks/fix_scope.tsv"
    params:
        code=code_digest("decompose"),
    resources:
        mem_mb=500,
        runtime=5,
    group:
        "decompose"
    shell:
        "driftscope stage fix-scope {input.decomposition} --impact {input.impact} --out {output} 2> {log}"
