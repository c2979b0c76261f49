REFERENCE = PATHS[0]


# Clean runs of small random models, made on the spot: they depend on nothing but the code.
rule floors:
    output:
        update(f"{RESULTS}/replay/floors.json"),
    log:
        f"{RESULTS}/logs/replay/floors.log",
    benchmark:
        f"{RESULTS}/benchmarks/replay/floors.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        code=code_digest("floors"),
    shell:
        "driftscope stage floors --out {output} 2> {log}"


rule replay_chunk:
    input:
        lambda wildcards: arrays_of(wildcards.traced),
        own=lambda wildcards: manifest_of(wildcards.traced),
        teacher=TEACHER,
    output:
        update(f"{RESULTS}/replay/{{traced}}/chunk_{{chunk}}.parquet"),
    log:
        f"{RESULTS}/logs/replay/{{traced}}_{{chunk}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/replay/{{traced}}_{{chunk}}.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=3000,
        runtime=120,
    params:
        trace=lambda wildcards: f"{RESULTS}/trace/{wildcards.traced}/trace.json",
        chunks=CHUNKS,
        code=code_digest("replay"),
    shell:
        "driftscope stage replay {wildcards.traced} --trace {params.trace} --own {input.own}"
        " --teacher {input.teacher} --part {wildcards.chunk}/{params.chunks} --out {output}"
        " --threads {threads} 2> {log}"


rule diagnose:
    input:
        lambda wildcards: arrays_of(wildcards.traced),
        tables=expand(
            f"{RESULTS}/replay/{{{{traced}}}}/chunk_{{chunk}}.parquet",
            chunk=range(CHUNKS),
        ),
        own=lambda wildcards: manifest_of(wildcards.traced),
        teacher=TEACHER,
        floors=rules.floors.output,
    output:
        table=update(f"{RESULTS}/replay/{{traced}}.parquet"),
        document=update(f"{RESULTS}/replay/{{traced}}.json"),
    log:
        f"{RESULTS}/logs/replay/{{traced}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/replay/{{traced}}.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=3000,
        runtime=60,
    params:
        trace=lambda wildcards: f"{RESULTS}/trace/{wildcards.traced}/trace.json",
        false_alarm=CONFIG.replay.false_alarm,
        code=code_digest("replay"),
    shell:
        "driftscope stage diagnose {wildcards.traced} {input.tables} --trace {params.trace}"
        " --own {input.own} --teacher {input.teacher} --floors {input.floors}"
        " --false-alarm {params.false_alarm} --table {output.table} --out {output.document}"
        " --threads {threads} 2> {log}"


rule propagation_pair:
    input:
        *arrays_of(REFERENCE),
        lambda wildcards: arrays_of(wildcards.traced),
        teacher=TEACHER,
    output:
        update(f"{RESULTS}/propagation/{{traced}}.parquet"),
    log:
        f"{RESULTS}/logs/propagation/{{traced}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/propagation/{{traced}}.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=3000,
        runtime=60,
    params:
        traces=lambda wildcards: labelled(
            "trace",
            (REFERENCE, wildcards.traced),
            [
                f"{RESULTS}/trace/{path}/trace.json"
                for path in (REFERENCE, wildcards.traced)
            ],
        ),
        code=code_digest("propagation"),
    shell:
        "driftscope stage propagation --teacher {input.teacher} {params.traces} --out {output}"
        " --threads {threads} 2> {log}"


rule propagation:
    input:
        expand(
            f"{RESULTS}/propagation/{{traced}}.parquet",
            traced=[path for path in TRACED if path != REFERENCE],
        ),
    output:
        update(f"{RESULTS}/propagation.parquet"),
    log:
        f"{RESULTS}/logs/propagation.log",
    benchmark:
        f"{RESULTS}/benchmarks/propagation.tsv"
    group:
        "collect"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        code=code_digest("propagation"),
    shell:
        "driftscope stage propagation-join {input} --out {output} 2> {log}"


rule replay:
    input:
        *(file for path in TRACED for file in arrays_of(path)),
        documents=expand(f"{RESULTS}/replay/{{traced}}.json", traced=TRACED),
        candidate=CANDIDATE,
        teacher=TEACHER,
        floors=rules.floors.output,
    output:
        update(f"{RESULTS}/replay.json"),
    log:
        f"{RESULTS}/logs/replay.log",
    benchmark:
        f"{RESULTS}/benchmarks/replay.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=3000,
        runtime=30,
    params:
        config=RESOLVED,
        not_run=json.dumps(CASE.engines_not_run),
        traces=labelled(
            "trace", TRACED, [f"{RESULTS}/trace/{path}/trace.json" for path in TRACED]
        ),
        code=code_digest("replay"),
    shell:
        "driftscope stage replay-join {input.documents} {params.traces} --teacher {input.teacher}"
        " --candidate {input.candidate} --floors {input.floors} --not-run {params.not_run:q}"
        " --out {output} --threads {threads} 2> {log}"
