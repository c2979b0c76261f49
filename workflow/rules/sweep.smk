SHARDS = CONFIG.sweep.shards


rule sweep_shard:
    input:
        teacher=TEACHER,
        candidate=CANDIDATE,
    output:
        update(RESULTS + "/sweep/shard_{shard}.parquet"),
    log:
        RESULTS + "/logs/sweep/{shard}.log",
    benchmark:
        RESULTS + "/benchmarks/sweep/{shard}.tsv"
    params:
        shards=SHARDS,
        code=code_digest("sweep"),
    resources:
        mem_mb=2000,
        runtime=60,
    shell:
        "driftscope stage sweep --teacher {input.teacher} --candidate {input.candidate}"
        " --part {wildcards.shard}/{params.shards} --out {output} --threads {threads} 2> {log}"


rule sweep:
    input:
        teacher=TEACHER,
        candidate=CANDIDATE,
        shards=expand(RESULTS + "/sweep/shard_{shard}.parquet", shard=range(SHARDS)),
    output:
        table=update(RESULTS + "/sweep.parquet"),
        inventory=update(RESULTS + "/sweep.json"),
    log:
        RESULTS + "/logs/sweep.log",
    benchmark:
        RESULTS + "/benchmarks/sweep.tsv"
    params:
        code=code_digest("sweep"),
    resources:
        mem_mb=1000,
        runtime=10,
    group:
        "sweep"
    shell:
        "driftscope stage sweep-join {input.shards} --teacher {input.teacher} --candidate {input.candidate}"
        " --out {output.table} --inventory {output.inventory} 2> {log}"


rule weights:
    input:
        table=rules.sweep.output.table,
        inventory=rules.sweep.output.inventory,
    output:
        update(RESULTS + "/weights.json"),
    log:
        RESULTS + "/logs/weights.log",
    benchmark:
        RESULTS + "/benchmarks/weights.tsv"
    params:
        low=CONFIG.sweep.band[0],
        high=CONFIG.sweep.band[1],
        code=code_digest("sweep"),
    resources:
        mem_mb=1000,
        runtime=10,
    group:
        "sweep"
    shell:
        "driftscope stage weights {input.table} --inventory {input.inventory}"
        " --low {params.low} --high {params.high} --out {output} 2> {log}"
