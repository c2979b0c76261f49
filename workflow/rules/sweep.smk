SHARDS = CONFIG.sweep.shards


rule sweep_shard:
    input:
        teacher=TEACHER,
        candidate=CANDIDATE,
    output:
        table=update(f"{RESULTS}/sweep/shard_{{shard}}.parquet"),
        blocks=update(f"{RESULTS}/sweep/blocks_{{shard}}.json"),
    log:
        f"{RESULTS}/logs/sweep/{{shard}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/sweep/{{shard}}.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=2000,
        runtime=60,
        gpu=CASE.gpus,
    params:
        device=CONFIG.device,
        shards=SHARDS,
        code=code_digest("sweep"),
    shell:
        "driftscope stage sweep --teacher {input.teacher} --candidate {input.candidate}"
        " --part {wildcards.shard}/{params.shards} --out {output.table} --blocks {output.blocks}"
        " --threads {threads} --device {params.device} 2> {log}"


rule sweep:
    input:
        teacher=TEACHER,
        candidate=CANDIDATE,
        shards=expand(f"{RESULTS}/sweep/shard_{{shard}}.parquet", shard=range(SHARDS)),
        blocks=expand(f"{RESULTS}/sweep/blocks_{{shard}}.json", shard=range(SHARDS)),
    output:
        table=update(f"{RESULTS}/sweep.parquet"),
        inventory=update(f"{RESULTS}/sweep.json"),
        blocks=update(f"{RESULTS}/blocks.json"),
    log:
        f"{RESULTS}/logs/sweep.log",
    benchmark:
        f"{RESULTS}/benchmarks/sweep.tsv"
    group:
        "sweep"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        found=lambda wildcards, input: [f"--found={file}" for file in input.blocks],
        code=code_digest("sweep"),
    shell:
        "driftscope stage sweep-join {input.shards} {params.found} --teacher {input.teacher}"
        " --candidate {input.candidate} --out {output.table} --inventory {output.inventory}"
        " --blocks {output.blocks} 2> {log}"


rule weights:
    input:
        teacher=TEACHER,
        candidate=CANDIDATE,
        table=rules.sweep.output.table,
        inventory=rules.sweep.output.inventory,
        blocks=rules.sweep.output.blocks,
    output:
        update(f"{RESULTS}/weights.json"),
    log:
        f"{RESULTS}/logs/weights.log",
    benchmark:
        f"{RESULTS}/benchmarks/weights.tsv"
    group:
        "sweep"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        low=CONFIG.sweep.band[0],
        high=CONFIG.sweep.band[1],
        code=code_digest("sweep"),
    shell:
        "driftscope stage weights {input.table} --inventory {input.inventory} --blocks {input.blocks}"
        " --teacher {input.teacher} --candidate {input.candidate}"
        " --low {params.low} --high {params.high} --out {output} --threads {threads} 2> {log}"
