rule report:
    input:
        TEACHER,
        CANDIDATE,
        PROMPTS,
        rules.sweep.output,
        rules.weights.output,
        rules.divergence.output,
        rules.admissibility.output,
        rules.replay.output,
        rules.propagation.output,
        rules.decompose.output.document,
        rules.impact.output.document,
        rules.fix_scope.output,
        rules.gates.output,
        rules.published.output,
        expand(f"{RESULTS}/trace/{{path}}.parquet", path=PATHS),
        expand(
            f"{RESULTS}/falsifiers/{{falsifier}}.verdict.json",
            falsifier=CASE.falsifiers,
        ),
    output:
        document=update(REPORT),
        page=report(
            update(REPORT.removesuffix(".json") + ".html"),
            caption="../report/page.rst",
            category="Report",
        ),
    log:
        f"{RESULTS}/logs/report.log",
    benchmark:
        f"{RESULTS}/benchmarks/report.tsv"
    group:
        "judge"
    conda:
        ENVIRONMENT
    resources:
        mem_mb=1500,
        runtime=10,
    params:
        config=RESOLVED,
        results=lambda wildcards: RESULTS,
        title=CONFIG.title,
        settings=sha256_json(CONFIG.canonical()),
        code=code_digest("report"),
    shell:
        "driftscope stage report --config {params.config} --results {params.results} --out {output.document}"
        " --html {output.page} > {log} 2>&1"
