# Known faults in the case's models and in small random ones; not part of the main job.
FAULT_JOBS = 6


rule faultbench_part:
    input:
        teacher=TEACHER,
        candidate=CANDIDATE,
        floors=rules.floors.output,
    output:
        update(f"{RESULTS}/faultbench/part_{{job}}.json"),
    log:
        f"{RESULTS}/logs/faultbench/{{job}}.log",
    benchmark:
        f"{RESULTS}/benchmarks/faultbench/{{job}}.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=4000,
        runtime=240,
    params:
        jobs=FAULT_JOBS,
        code=code_digest("faultbench"),
    shell:
        "driftscope faultbench run --models all --floors {input.floors} --teacher {input.teacher}"
        " --candidate {input.candidate} --part {wildcards.job}/{params.jobs} --out {output}"
        " --threads {threads} 2> {log}"


rule faultbench:
    input:
        expand(f"{RESULTS}/faultbench/part_{{job}}.json", job=range(FAULT_JOBS)),
    output:
        document=update("results/faultbench_report.json"),
        page=update("results/faultbench_report.md"),
    log:
        f"{RESULTS}/logs/faultbench.log",
    benchmark:
        f"{RESULTS}/benchmarks/faultbench.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        code=code_digest("faultbench"),
    shell:
        "driftscope faultbench join {input} --out {output.document} --page {output.page} 2> {log}"
