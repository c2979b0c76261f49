# Manifests are the outputs; the model files lie beside them. As outputs, Snakemake would delete them before
# each run of their rule, and with them a download's resumable part.
if CASE.fetched:

    rule fetch:
        input:
            lambda wildcards: CASE.local_files(wildcards.model),
        output:
            update(f"{RESULTS}/models/{{model}}.json"),
        log:
            f"{RESULTS}/logs/fetch/{{model}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/fetch/{{model}}.tsv"
        wildcard_constraints:
            model="|".join(CASE.fetched),
        # Compute nodes often have no route out; the machine that Snakemake runs on has.
        localrule: True
        conda:
            ENVIRONMENT
        resources:
            mem_mb=1000,
            runtime=240,
        params:
            config=RESOLVED,
            pin=lambda wildcards: CASE.pin(wildcards.model),
            code=code_digest("fetch"),
        shell:
            "driftscope stage fetch {wildcards.model} --config {params.config} --out {output} 2> {log}"


if CASE.derived:

    rule derive:
        input:
            lambda wildcards: f"{RESULTS}/models/{CONFIG.models[wildcards.model].from_}.json",
        output:
            update(f"{RESULTS}/models/{{model}}.json"),
        log:
            f"{RESULTS}/logs/derive/{{model}}.log",
        benchmark:
            f"{RESULTS}/benchmarks/derive/{{model}}.tsv"
        wildcard_constraints:
            model="|".join(CASE.derived),
        conda:
            ENVIRONMENT
        threads: 2
        resources:
            mem_mb=3000,
            runtime=120,
        params:
            config=RESOLVED,
            spec=lambda wildcards: CASE.derivation(wildcards.model),
            code=code_digest("derive"),
        shell:
            "driftscope stage derive {wildcards.model} --config {params.config} --from {input}"
            " --out {output} --threads {threads} 2> {log}"


rule prompts:
    input:
        model=TEACHER,
        files=CASE.prompt_files,
    output:
        update(PROMPTS),
    log:
        f"{RESULTS}/logs/prompts.log",
    benchmark:
        f"{RESULTS}/benchmarks/prompts.tsv"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        config=RESOLVED,
        specs=CASE.prompt_specs,
        code=code_digest("prompts"),
    shell:
        "driftscope stage prompts --config {params.config} --model {input.model} --out {output} 2> {log}"
