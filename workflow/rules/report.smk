rule report:
    input:
        TEACHER,
        CANDIDATE,
        PROMPTS,
        rules.sweep.output,
        rules.weights.output,
        rules.divergence.output,
        rules.admissibility.output,
        rules.decompose.output.document,
        rules.impact.output.document,
        rules.fix_scope.output,
        rules.gates.output,
        rules.published.output,
        expand(RESULTS + "/trace/{path}.parquet", path=PATHS),
        expand(RESULTS + "/falsifiers/{falsifier}.verdict.json", falsifier=CASE.falsifiers),
    output:
        document=update(REPORT),
        page=update(REPORT.removesuffix(".json") + ".html"),
    log:
        RESULTS + "/logs/report.log",
    benchmark:
        RESULTS + "/benchmarks/report.tsv"
    params:
        title=CONFIG.title,
        config=sha256_json(CONFIG.canonical()),
        code=code_digest("report"),
    resources:
        mem_mb=1500,
        runtime=10,
    group:
        "judge"
    shell:
        "driftscope stage report --config {RESOLVED} --results {RESULTS} --out {output.document}"
        " --html {output.page} > {log} 2>&1"
