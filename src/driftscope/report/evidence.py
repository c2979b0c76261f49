"""What a report is made of: the evidence documents and tables, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from driftscope.errors import InputError

if TYPE_CHECKING:
    import polars as pl

Document = Mapping[str, Any]


class ReportEvidence(TypedDict, total=False):
    """The evidence of one case. Everything but `name` may be absent: the report then says so.

    Attributes:
        name: the case's name, `results/<name>_report.json`.
        title: one line for people.
        models: teacher and candidate: id, role, source, container, files (path, bytes, sha256), config.
        prompts: id, sha256 of the token ids, number of tokens (`count` or `tokens`).
        texts: the same of the texts whose token positions the decomposition and the impact are over.
        paths: the forward paths: id, artifact, arithmetic, activation formats.
        code: digest of the sources.
        config: digest of the configuration.
        headers: evidence file to the header it carries (inputs, code, parameters, clause).
        admissibility: the checks of the traces' populations.
        sweep: the ``sweep`` table.
        sweep_inventory: missing, extra and unmapped tensors, metadata differences, coverage.
        sweep_summary: the judged sweep: `relations` (tensor to relation) and the `band` they rest on.
        traces: path to its ``trace`` table.
        divergence: the ``divergence`` table.
        replay: every op of each trace recomputed from its own inputs (`replay.json`).
        propagation: the ``propagation`` table.
        decomposition: shares, controls, population.
        falsifiers: the verdict of each registered falsifier.
        published: the verdict on each published figure.
        fix_scope: what a fix would change.
        impact: KL, same-top-1, perplexity and flips of each pair.
        gates: each ship gate.
    """

    name: str
    title: str
    models: Sequence[Document]
    prompts: Sequence[Document]
    texts: Sequence[Document]
    paths: Sequence[Document | str]
    code: str
    config: str
    headers: Mapping[str, Document]
    admissibility: Document
    sweep: pl.DataFrame
    sweep_inventory: Document
    sweep_summary: Document
    traces: Mapping[str, pl.DataFrame]
    divergence: pl.DataFrame
    replay: Document
    propagation: pl.DataFrame
    decomposition: Document
    falsifiers: Sequence[Document]
    published: Sequence[Document]
    fix_scope: Document
    impact: Document
    gates: Sequence[Document]


def not_run(reason: str) -> dict[str, Any]:
    """Return what stands in the report for a part that was not measured; it is never a pass."""
    return {"status": "not-run", "reason": reason}


def plain(document: Document) -> dict[str, Any]:
    """Return a document without its evidence header, which the report lists once for all files."""
    if not isinstance(document, Mapping):
        raise InputError(f"report: an evidence document is a {type(document).__name__}, expected an object")
    return {key: value for key, value in document.items() if key != "evidence"}
