# Manifests are the outputs; the model files lie beside them. As outputs, Snakemake would delete them before
# each run of their rule, and with them a download's resumable part.
if CASE.fetched:

    rule fetch:
        input:
            lambda wildcards: CASE.local_files(wildcards.model),
        output:
            update(RESULTS + "/models/{model}.json"),
        log:
            RESULTS + "/logs/fetch/{model}.log",
        benchmark:
            RESULTS + "/benchmarks/fetch/{model}.tsv"
        wildcard_constraints:
            model="|".join(CASE.fetched),
        params:
            pin=lambda wildcards: CASE.pin(wildcards.model),
            code=code_digest("fetch"),
        resources:
            mem_mb=1000,
            runtime=240,
        retries: 1
        shell:
            "driftscope stage fetch {wildcards.model} --config {RESOLVED} --out {output} 2> {log}"


if CASE.derived:

    rule derive:
        input:
            lambda wildcards: f"{RESULTS}/models/{CONFIG.models[wildcards.model].from_}.json",
        output:
            update(RESULTS + "/models/{model}.json"),
        log:
            RESULTS + "/logs/derive/{model}.log",
        benchmark:
            RESULTS + "/benchmarks/derive/{model}.tsv"
        wildcard_constraints:
            model="|".join(CASE.derived),
        params:
            spec=lambda wildcards: CASE.derivation(wildcards.model),
            code=code_digest("derive"),
        threads: 2
        resources:
            mem_mb=3000,
            runtime=120,
        shell:
            "driftscope stage derive {wildcards.model} --config {RESOLVED} --from {input}"
            " --out {output} --threads {threads} 2> {log}"


rule prompts:
    input:
        model=TEACHER,
        files=CASE.prompt_files,
    output:
        update(PROMPTS),
    log:
        RESULTS + "/logs/prompts.log",
    benchmark:
        RESULTS + "/benchmarks/prompts.tsv"
    params:
        specs=CASE.prompt_specs,
        code=code_digest("prompts"),
    resources:
        mem_mb=1000,
        runtime=10,
    shell:
        "driftscope stage prompts --config {RESOLVED} --model {input.model} --out {output} 2> {log}"
