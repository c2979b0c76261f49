JOBS = CONFIG.decomposition.jobs
ENGINES = CONFIG.decomposition.engines
BASES = [*PATHS, *(f"candidate.{engine}" for engine in ENGINES)]


rule base_pass:
    input:
        teacher=TEACHER,
        candidate=CANDIDATE,
        prompts=PROMPTS,
    output:
        update(f"{RESULTS}/decomposition/base_{{path}}.safetensors"),
    log:
        f"{RESULTS}/logs/decompose/base_{{path}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/decompose/base_{{path}}.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=4000,
        runtime=60,
        gpu=CASE.gpus,
    params:
        device=CONFIG.device,
        minimum=CONFIG.decomposition.minimum_positions,
        code=code_digest("decompose"),
    shell:
        "driftscope stage base {wildcards.path} --teacher {input.teacher} --candidate {input.candidate}"
        " --prompts {input.prompts} --minimum {params.minimum} --out {output} --threads {threads}"
        " --device {params.device} 2> {log}"


rule engine:
    input:
        candidate=CANDIDATE,
        prompts=PROMPTS,
    output:
        update(f"{RESULTS}/decomposition/base_candidate.{{engine}}.safetensors"),
    log:
        f"{RESULTS}/logs/decompose/engine_{{engine}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/decompose/engine_{{engine}}.tsv"
    wildcard_constraints:
        engine=r"llama\.cpp",
    conda:
        ENVIRONMENT
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        code=code_digest("decompose"),
    shell:
        "driftscope stage engine {wildcards.engine} --candidate {input.candidate}"
        " --prompts {input.prompts} --out {output} 2> {log}"


rule counterfactuals:
    input:
        teacher=TEACHER,
        candidate=CANDIDATE,
        prompts=PROMPTS,
        bases=expand(f"{RESULTS}/decomposition/base_{{path}}.safetensors", path=PATHS),
    output:
        update(f"{RESULTS}/decomposition/energies_{{job}}.parquet"),
    log:
        f"{RESULTS}/logs/decompose/{{job}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/decompose/{{job}}.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=4000,
        runtime=240,
        gpu=CASE.gpus,
    params:
        device=CONFIG.device,
        jobs=JOBS,
        bases=lambda wildcards, input: labelled("base", PATHS, input.bases),
        code=code_digest("decompose"),
    shell:
        "driftscope stage counterfactuals --teacher {input.teacher} --candidate {input.candidate}"
        " --prompts {input.prompts} {params.bases} --part {wildcards.job}/{params.jobs}"
        " --out {output} --threads {threads} --device {params.device} 2> {log}"


rule decompose:
    input:
        expand(f"{RESULTS}/decomposition/energies_{{job}}.parquet", job=range(JOBS)),
    output:
        table=update(f"{RESULTS}/decomposition/energies.parquet"),
        document=update(f"{RESULTS}/decomposition.json"),
    log:
        f"{RESULTS}/logs/decompose.log",
    benchmark:
        f"{RESULTS}/benchmarks/decompose.tsv"
    group:
        "decompose"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        config=RESOLVED,
        resampling=CASE.resampling,
        code=code_digest("decompose"),
    shell:
        "driftscope stage shares {input} --config {params.config} --table {output.table}"
        " --out {output.document} 2> {log}"


rule impact:
    input:
        prompts=PROMPTS,
        bases=expand(f"{RESULTS}/decomposition/base_{{path}}.safetensors", path=BASES),
    output:
        table=update(f"{RESULTS}/impact.parquet"),
        document=update(f"{RESULTS}/impact.json"),
    log:
        f"{RESULTS}/logs/impact.log",
    benchmark:
        f"{RESULTS}/benchmarks/impact.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=3000,
        runtime=30,
    params:
        config=RESOLVED,
        bases=lambda wildcards, input: labelled("base", BASES, input.bases),
        resampling=CASE.resampling,
        code=code_digest("decompose"),
    shell:
        "driftscope stage impact --prompts {input.prompts} {params.bases} --config {params.config}"
        " --table {output.table} --out {output.document} 2> {log}"


rule fix_scope:
    input:
        table=rules.impact.output.table,
        impact=rules.impact.output.document,
    output:
        update(f"{RESULTS}/fix_scope.json"),
    log:
        f"{RESULTS}/logs/fix_scope.log",
    benchmark:
        f"{RESULTS}/benchmarks/fix_scope.tsv"
    group:
        "decompose"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=500,
        runtime=5,
    params:
        config=RESOLVED,
        resampling=CASE.resampling,
        code=code_digest("decompose"),
    shell:
        "driftscope stage fix-scope --table {input.table} --impact {input.impact}"
        " --config {params.config} --out {output} 2> {log}"
