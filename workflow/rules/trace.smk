CHUNKS = CONFIG.trace.chunks


def state_before(wildcards):
    """Return the residual stream that the chunk before left, or nothing for the first chunk."""
    chunk = int(wildcards.chunk)
    return f"{RESULTS}/trace/{wildcards.path}/state_{chunk - 1}.safetensors" if chunk else []


rule trace_chunk:
    input:
        model=lambda wildcards: manifest_of(wildcards.path),
        prompts=PROMPTS,
        state=state_before,
    output:
        table=update(RESULTS + "/trace/{path}/chunk_{chunk}.parquet"),
        taps=update(RESULTS + "/trace/{path}/taps_{chunk}.safetensors"),
        state=update(RESULTS + "/trace/{path}/state_{chunk}.safetensors"),
    log:
        RESULTS + "/logs/trace/{path}_{chunk}.log",
    benchmark:
        RESULTS + "/benchmarks/trace/{path}_{chunk}.tsv"
    params:
        chunks=CHUNKS,
        keep=" ".join(f"--keep '{pattern}'" for pattern in CONFIG.trace.keep),
        state_in=lambda wildcards, input: f"--state-in {input.state}" if input.state else "",
        code=code_digest("trace"),
    resources:
        mem_mb=3000,
        runtime=60,
    shell:
        "driftscope stage trace {wildcards.path} --model {input.model} --prompts {input.prompts}"
        " --part {wildcards.chunk}/{params.chunks} {params.state_in} {params.keep} --out {output.table}"
        " --taps {output.taps} --state {output.state} --threads {threads} 2> {log}"


rule trace:
    input:
        model=lambda wildcards: manifest_of(wildcards.path),
        prompts=PROMPTS,
        chunks=expand(RESULTS + "/trace/{{path}}/chunk_{chunk}.parquet", chunk=range(CHUNKS)),
    output:
        update(RESULTS + "/trace/{path}.parquet"),
    log:
        RESULTS + "/logs/trace/{path}.log",
    benchmark:
        RESULTS + "/benchmarks/trace/{path}.tsv"
    params:
        code=code_digest("trace"),
    resources:
        mem_mb=1000,
        runtime=10,
    group:
        "collect"
    shell:
        "driftscope stage trace-join {wildcards.path} {input.chunks} --model {input.model}"
        " --prompts {input.prompts} --out {output} 2> {log}"


rule divergence_chunk:
    input:
        prompts=PROMPTS,
        taps=expand(RESULTS + "/trace/{path}/taps_{{chunk}}.safetensors", path=PATHS),
    output:
        update(RESULTS + "/divergence/chunk_{chunk}.parquet"),
    log:
        RESULTS + "/logs/divergence/{chunk}.log",
    benchmark:
        RESULTS + "/benchmarks/divergence/{chunk}.tsv"
    params:
        taps=lambda wildcards, input: labelled("taps", PATHS, input.taps),
        pairs=" ".join(f"--pair '{pair}'" for pair in PAIRS),
        code=code_digest("divergence"),
    resources:
        mem_mb=2000,
        runtime=30,
    shell:
        "driftscope stage divergence --prompts {input.prompts} {params.taps} {params.pairs}"
        " --out {output} 2> {log}"


rule divergence:
    input:
        expand(RESULTS + "/divergence/chunk_{chunk}.parquet", chunk=range(CHUNKS)),
    output:
        update(RESULTS + "/divergence.parquet"),
    log:
        RESULTS + "/logs/divergence.log",
    benchmark:
        RESULTS + "/benchmarks/divergence.tsv"
    params:
        code=code_digest("divergence"),
    resources:
        mem_mb=1000,
        runtime=10,
    group:
        "collect"
    shell:
        "driftscope stage divergence-join {input} --out {output} 2> {log}"


rule admissibility:
    input:
        prompts=PROMPTS,
        teacher=TEACHER,
        candidate=CANDIDATE,
        traces=expand(RESULTS + "/trace/{path}.parquet", path=PATHS),
    output:
        update(RESULTS + "/admissibility.json"),
    log:
        RESULTS + "/logs/admissibility.log",
    benchmark:
        RESULTS + "/benchmarks/admissibility.tsv"
    params:
        traces=lambda wildcards, input: labelled("trace", PATHS, input.traces),
        code=code_digest("divergence"),
    resources:
        mem_mb=1000,
        runtime=10,
    group:
        "collect"
    shell:
        "driftscope stage admissibility --prompts {input.prompts} --teacher {input.teacher}"
        " --candidate {input.candidate} {params.traces} --out {output} 2> {log}"
