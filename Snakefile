"""From two artifacts to a report: fetch, derive, sweep, trace, replay, falsify, judge, decompose, report."""

from snakemake.utils import min_version

min_version("9.0")


# Without --configfile, the embedded default. A configuration given on the command line stands alone: it is
# not laid over the default.
if not workflow.overwrite_configfiles:

    configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/sweep.smk"
include: "workflow/rules/trace.smk"
include: "workflow/rules/replay.smk"
include: "workflow/rules/decompose.smk"
include: "workflow/rules/falsify.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/faultbench.smk"


rule all:
    default_target: True
    input:
        REPORT,
    localrule: True
