CHUNKS = CONFIG.trace.chunks


rule trace_chunk:
    input:
        model=lambda wildcards: manifest_of(wildcards.path),
        prompts=PROMPTS,
        state=state_before,
    output:
        table=update(f"{RESULTS}/trace/{{path}}/chunk_{{chunk}}.parquet"),
        taps=update(f"{RESULTS}/trace/{{path}}/taps_{{chunk}}.safetensors"),
        state=update(f"{RESULTS}/trace/{{path}}/state_{{chunk}}.safetensors"),
    log:
        f"{RESULTS}/logs/trace/{{path}}_{{chunk}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/trace/{{path}}_{{chunk}}.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=3000,
        runtime=60,
        gpu=CASE.gpus,
    params:
        device=CONFIG.device,
        chunks=CHUNKS,
        keep=" ".join(f"--keep {quote(pattern)}" for pattern in CONFIG.trace.keep),
        state_in=lambda wildcards, input: (
            f"--state-in {input.state}" if input.state else ""
        ),
        code=code_digest("trace"),
    shell:
        "driftscope stage trace {wildcards.path} --model {input.model} --prompts {input.prompts}"
        " --part {wildcards.chunk}/{params.chunks} {params.state_in} {params.keep} --out {output.table}"
        " --taps {output.taps} --state {output.state} --threads {threads}"
        " --device {params.device} 2> {log}"


rule trace:
    input:
        model=lambda wildcards: manifest_of(wildcards.path),
        prompts=PROMPTS,
        chunks=expand(
            f"{RESULTS}/trace/{{{{path}}}}/chunk_{{chunk}}.parquet",
            chunk=range(CHUNKS),
        ),
    output:
        table=update(f"{RESULTS}/trace/{{path}}.parquet"),
        manifest=update(f"{RESULTS}/trace/{{path}}/trace.json"),
    log:
        f"{RESULTS}/logs/trace/{{path}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/trace/{{path}}.tsv"
    group:
        "collect"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        code=code_digest("trace"),
    shell:
        "driftscope stage trace-join {wildcards.path} {input.chunks} --model {input.model}"
        " --prompts {input.prompts} --out {output.table} --manifest {output.manifest} 2> {log}"


rule engine_trace:
    input:
        model=lambda wildcards: manifest_of(wildcards.foreign),
        prompts=PROMPTS,
    output:
        update(f"{RESULTS}/trace/{{foreign}}/trace.json"),
    log:
        f"{RESULTS}/logs/trace/{{foreign}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/trace/{{foreign}}.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=4000,
        runtime=60,
    params:
        engine=lambda wildcards: ENGINE_OF[wildcards.foreign],
        versions=lambda wildcards: CASE.engine_versions(ENGINE_OF[wildcards.foreign]),
        code=code_digest("engine"),
    shell:
        "driftscope stage engine-trace {params.engine} --model {input.model}"
        " --prompts {input.prompts} --out {output} 2> {log}"


rule divergence_chunk:
    input:
        *(file for path in TRACED for file in arrays_of(path)),
        teacher=TEACHER,
    output:
        update(f"{RESULTS}/divergence/chunk_{{chunk}}.parquet"),
    log:
        f"{RESULTS}/logs/divergence/{{chunk}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/divergence/{{chunk}}.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        traces=labelled(
            "trace", TRACED, [f"{RESULTS}/trace/{path}/trace.json" for path in TRACED]
        ),
        pairs=" ".join(f"--pair '{reference}|{other}'" for reference, other in COMPARED),
        chunks=CHUNKS,
        code=code_digest("divergence"),
    shell:
        "driftscope stage divergence --teacher {input.teacher} {params.traces} {params.pairs}"
        " --part {wildcards.chunk}/{params.chunks} --out {output} 2> {log}"


rule divergence:
    input:
        expand(f"{RESULTS}/divergence/chunk_{{chunk}}.parquet", chunk=range(CHUNKS)),
    output:
        update(f"{RESULTS}/divergence.parquet"),
    log:
        f"{RESULTS}/logs/divergence.log",
    benchmark:
        f"{RESULTS}/benchmarks/divergence.tsv"
    group:
        "collect"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        code=code_digest("divergence"),
    shell:
        "driftscope stage divergence-join {input} --out {output} 2> {log}"


rule admissibility:
    input:
        prompts=PROMPTS,
        teacher=TEACHER,
        candidate=CANDIDATE,
        traces=expand(f"{RESULTS}/trace/{{path}}.parquet", path=PATHS),
    output:
        update(f"{RESULTS}/admissibility.json"),
    log:
        f"{RESULTS}/logs/admissibility.log",
    benchmark:
        f"{RESULTS}/benchmarks/admissibility.tsv"
    group:
        "collect"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        traces=lambda wildcards, input: labelled("trace", PATHS, input.traces),
        code=code_digest("divergence"),
    shell:
        "driftscope stage admissibility --prompts {input.prompts} --teacher {input.teacher}"
        " --candidate {input.candidate} {params.traces} --out {output} 2> {log}"
