"""Synthetic evidence of a whole case: seeded, shaped like a 30-layer model's, with nothing measured."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import numpy as np
import polars as pl

from driftscope.analysis.admissibility import TraceMetadata, admissibility
from driftscope.evidence.schemas import frame_of
from driftscope.report.evidence import ReportEvidence
from driftscope.report.topology import LAYER_TAPS, SITES

PATHS = ("teacher.f32", "candidate.f32", "candidate.int8-dot")
PAIRS = ("teacher.f32|candidate.f32", "candidate.f32|candidate.int8-dot", "teacher.f32|candidate.int8-dot")
PROMPTS = {"arithmetic": 7, "story": 12}
_LAYER_TENSORS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def tensor_names(layers: int) -> list[str]:
    names = ["model.embed_tokens.weight"]
    names += [f"model.layers.{layer}.{name}.weight" for layer in range(layers) for name in _LAYER_TENSORS]
    return [*names, "model.norm.weight"]


def sweep_row(tensor: str, random: np.random.Generator, **changes: Any) -> dict[str, Any]:
    norm = tensor.endswith("norm.weight")
    elements = 576 if norm else 576 * 1536
    nmse = 0.0 if norm else float(random.uniform(0.004, 0.006))
    row = {
        "tensor": tensor,
        "shape_a": "576" if norm else "576x1536",
        "shape_b": "576" if norm else "576x1536",
        "dtype_a": "F32",
        "dtype_b": "F32" if norm else "Q4_K",
        "decoder_a": "native",
        "decoder_b": "native",
        "transforms_a": "",
        "transforms_b": "",
        "element_count": elements,
        "compared_count": elements,
        "mean_diff": nmse * 0.1,
        "max_diff": nmse * 3,
        "max_index": "3,17",
        "max_value_a": 0.125,
        "max_value_b": 0.125 - nmse * 3,
        "rmse": nmse * 0.2,
        "nmse": nmse,
        "relative_l2": nmse**0.5,
        "cosine_similarity": 1.0 - nmse / 2,
        "scale": 1.0 - nmse / 2,
        "mean_error": 0.0,
        "std_a": 0.04,
        "std_b": 0.04,
        "std_ratio": 1.0,
        "identical_count": elements if norm else 100,
        "small_count": 0,
        "medium_count": 0 if norm else elements - 100,
        "large_count": 0,
        "nan_a": 0,
        "nan_b": 0,
        "inf_a": 0,
        "inf_b": 0,
        "bit_identical": norm,
        "same_bytes": norm,
        "rounded_copy": False,
        "expected_nmse": None if norm else 0.005,
        "outside_count": 0,
        "cell_count": 0 if norm else 30000,
        "status": "Identical" if norm else "MediumDiff",
    }
    return {**row, **changes}


def sweep_table(layers: int, random: np.random.Generator) -> pl.DataFrame:
    return frame_of([sweep_row(name, random) for name in tensor_names(layers)], "sweep")


def taps(layers: int) -> Iterator[tuple[int, str]]:
    yield -1, "embedding"
    for layer in range(layers):
        for tap in LAYER_TAPS:
            yield layer, tap
    yield -1, "final_norm"
    yield -1, "lm_head"


def trace_table(path: str, layers: int) -> pl.DataFrame:
    rows = []
    for prompt, tokens in PROMPTS.items():
        for layer, tap in taps(layers):
            for scope, kept in (("all", tokens), ("last", 1), ("all-but-first", tokens - 1)):
                rows.append(
                    {
                        "prompt": prompt,
                        "layer": layer,
                        "tap": tap,
                        "scope": scope,
                        "position": -1,
                        "token_count": kept,
                        "count": kept * 576,
                        "capture_point": "after-op",
                        "path": path,
                        "artifact": path.split(".")[0],
                        "activation_format": "q8_K" if path.endswith("int8-dot") else "none",
                        "min": -1.0,
                        "max": 1.0,
                        "mean": 0.0,
                        "std": 0.5,
                        "rms": 0.5,
                        "nan_count": 0,
                        "inf_count": 0,
                        "zero_count": 0,
                        "argmax_channel": 3,
                        "argmax_position": 0,
                    }
                )
    return frame_of(rows, "trace")


def admissibility_document(traces: dict[str, pl.DataFrame], **digests: str) -> dict[str, Any]:
    """Check traces as the analysis does; `digests` gives a path (dots as underscores) other token ids."""
    return admissibility(
        [
            TraceMetadata.of_rows(
                path,
                {name: digests.get(path.replace(".", "_"), digest(name)) for name in PROMPTS},
                frame.iter_rows(named=True),
            )
            for path, frame in traces.items()
        ]
    )


def divergence_table(layers: int, random: np.random.Generator, scale: dict[str, float]) -> pl.DataFrame:
    rows = []
    for pair in PAIRS:
        for prompt, tokens in PROMPTS.items():
            for layer, tap in taps(layers):
                depth = layers if tap in ("final_norm", "lm_head") else max(layer, 0)
                factor = {"ffn_swiglu": 6.0, "attn_softmax": 0.4, "post_ffn_residual": 0.7}.get(tap, 1.0)
                nmse = scale[pair] * factor * (1 + depth / 6) * float(random.lognormal(0, 0.35))
                if (layer < 0 and tap == "embedding") or tap == "qkv_bias":
                    nmse = 0.0
                for scope, kept in (("all", tokens), ("last", 1), ("all-but-first", tokens - 1)):
                    rows.append(
                        {
                            "pair": pair,
                            "prompt": prompt,
                            "layer": layer,
                            "tap": tap,
                            "kind": "propagated",
                            "scope": scope,
                            "position": -1,
                            "token_count": kept,
                            "count": kept * 576,
                            "compared_count": kept * 576,
                            "nmse": nmse,
                            "relative_l2": nmse**0.5,
                            "cosine_similarity": 1 - nmse / 2,
                            "max_abs_diff": nmse,
                            "std_ratio": 1.0,
                        }
                    )
    return frame_of(rows, "divergence")


def decomposition_document(layers: int, random: np.random.Generator) -> dict[str, Any]:
    shares = []

    def add(by: str, item: str, mechanism: str, share: float) -> None:
        half = 0.12 * abs(share) + 0.002
        bounds = {"low": share - half, "high": share + half}
        shares.append({"by": by, "item": item, "mechanism": mechanism, "share": share, **bounds})

    add("mechanism", "weight", "weight", 0.931)
    add("mechanism", "activation", "activation", 0.083)
    add("mechanism", "interaction", "both", -0.014)
    for by, items in (("layer", [str(layer) for layer in range(layers)]), ("site", list(SITES[2:]))):
        for mechanism, total in (("weight", 0.931), ("activation", 0.083)):
            draws = random.gamma(1.2, size=len(items))
            parts = 0.9 * total * draws / draws.sum()
            for item, part in zip(items, parts.tolist(), strict=True):
                add(by, item, mechanism, part)
            add(by, "interaction", mechanism, 0.1 * total)
    return {
        "status": "done",
        "output": "logits, centred over the vocabulary",
        "unit": "share of the energy of the output difference",
        "positions": 256,
        "sequences": 4,
        "minimum_positions": 192,
        "confidence": 0.95,
        "block_positions": 16,
        "resamples": 2000,
        "mean_energy": 12345.6,
        "first_token_energy_share": 0.021,
        "controls": {"no_op_energy": 0.0, "all_promoted_share": 1.0, "all_promoted_exact": True},
        "shares": shares,
        "shares_all_but_first": shares,
    }


def impact_document() -> dict[str, Any]:
    pairs = []
    for pair, kl, same, flips in zip(
        PAIRS, (0.0412, 0.0021, 0.0437), (0.914, 0.984, 0.906), (22, 4, 24), strict=True
    ):
        pairs.append(
            {
                "pair": pair,
                "positions": 256,
                "mean_kl": kl,
                "mean_kl_low": kl * 0.8,
                "mean_kl_high": kl * 1.25,
                "median_kl": kl * 0.55,
                "p90_kl": kl * 2,
                "p99_kl": kl * 6,
                "max_kl": kl * 14,
                "same_top1": same,
                "same_top1_low": same - 0.03,
                "same_top1_high": min(same + 0.03, 1.0),
                "known_next_tokens": 252,
                "ppl_a": 14.21,
                "ppl_b": 14.21 * (1 + kl),
                "log_ppl_ratio": float(np.log1p(kl)),
                "mean_delta_p": -0.004,
                "rms_delta_p": 0.05,
                "flips": [
                    {
                        "sequence": "text-1",
                        "position": 11 * index,
                        "top1_a": 17 + index,
                        "top1_b": 30,
                        "margin": 1.9 * (1 - index / flips) ** 2 + 0.01,
                        "logit_noise": 0.55 + 0.01 * index,
                    }
                    for index in range(flips)
                ],
                "flips_total": flips,
                "flips_within_noise": flips - 2,
            }
        )
    return {"status": "done", "confidence": 0.95, "units": "KL in nats, margins in logits", "pairs": pairs}


FALSIFIERS = [
    {
        "id": "token-scope",
        "verdict": "supported",
        "asked": "Do all-token and last-token statistics of one pass differ enough to fake a divergence?",
        "found": "On one path, std over all tokens is 0.61 to 17.4 times the last token's; in 24 of 30 layers"
        " the interval leaves out 1. A cross-scope ratio is refused.",
        "would_change": "Ratios within 10 % of 1 in every layer, over at least two prompts.",
        "figures": {"ratio_max": 17.4, "layers_outside": 24},
        "controls": {"same-scope": {"as_required": True}, "shuffled": {"as_required": False}},
        "regimes": {"short": {}, "long": {}},
        "domain": {"samples": 120, "holds": 96, "fails": 24},
    },
    {
        "id": "super-block",
        "verdict": "supported",
        "asked": "Do paths A and B differ on one Q4_K super-block as published?",
        "found": "A −18882.443, B −18897.059: relative difference 0.0774 %, both bit for bit as published.",
        "would_change": "Any other bit pattern of A or B.",
        "figures": {"relative_difference": 0.000774},
    },
    {
        "id": "five-step-chain",
        "verdict": "falsified",
        "asked": "Does the error of a chain of quantized products grow super-linearly with depth?",
        "found": "Growth exponent 0.48 (95 % interval 0.41 to 0.55) over depths 1 to 32, 16 seeds, 3 regimes",
        "would_change": "An exponent above 1 in at least two regimes.",
        "figures": {"exponent": 0.48, "seeds": 16},
    },
]

PUBLISHED = [
    {
        "id": "SHIP-007-27",
        "verdict": "refuted",
        "asked": "Layer-3 ffn_swiglu std ratio 18.23",
        "found": "The two sides are over 132,608 and 18,944 values: a population mismatch.",
        "would_change": "The same ratio over one scope.",
        "figures": {"published": 18.23},
    },
    {
        "id": "SHIP-007-008",
        "verdict": "reproduced",
        "asked": "One super-block: 0.0774 %",
        "found": "0.0774 %, bit for bit.",
        "would_change": "Another bit pattern.",
        "figures": {"published": 0.000774, "here": 0.000774},
    },
    {
        "id": "SHIP-007-014",
        "verdict": "not-reproducible-here",
        "asked": "First super-block of layer-3 ffn_down: 0.428 %",
        "found": "The 7B model's bytes are not part of this case.",
        "would_change": "Running the canonical case.",
        "figures": {"published": 0.00428},
    },
]

GATES = [
    {"id": "GATE-COVERAGE", "status": "holds", "asked": "All tensors compared", "found": "272 of 272"},
    {
        "id": "GATE-TOP1",
        "status": "fails",
        "asked": "Same top-1 at 95 % or more",
        "found": "90.6 % of 256 positions",
    },
    {
        "id": "GATE-CHAT",
        "status": "not-run",
        "asked": "Chat completions parse",
        "found": "no generation was run",
    },
]


def flipped_bit(tensor: str, row: int = 5, columns: tuple[int, int] = (256, 512)) -> dict[str, Any]:
    """A finding in a block, as the sweep's summary lists it."""
    where = f"row {row}, columns {columns[0]} to {columns[1] - 1}"
    return {
        "tensor": tensor,
        "kind": "flipped-bit",
        "row": row,
        "columns": list(columns),
        "statement": f"{where}: bit 5 of byte 1 of the block (d) is flipped",
        "evidence": {"energy": 40.0, "byte": 1, "bit": 5, "field": "d", "file_offset": 4711},
        "corrupt": True,
    }


def put_findings(evidence: Any, findings: list[dict[str, Any]]) -> None:
    """Let the sweep have looked into blocks and found these."""
    corrupt: dict[str, str] = {}
    for item in findings:
        if item["corrupt"]:
            corrupt.setdefault(item["tensor"], item["kind"])
    summary = evidence["sweep_summary"]
    evidence["sweep_summary"] = {
        **summary,
        "blocks": {
            "tensors": len(summary["kinds"]),
            "block_count": 123456,
            "outlying_blocks": len(findings),
            "outlying_rows": 0,
        },
        "block_findings": findings,
        "corrupt": corrupt,
        "at_fault": sorted(corrupt),
        "found": {
            name: {"relation": summary["kinds"][name], "class": "corrupt-block", "transforms": []}
            for name in corrupt
        },
    }


def synthetic_evidence(layers: int = 30, seed: int = 0) -> ReportEvidence:
    """Return the evidence of a clean quantized pair: every part but the counterfactuals and the replay."""
    random = np.random.Generator(np.random.Philox(seed))
    names = tensor_names(layers)
    config = {
        "architecture": "llama",
        "num_layers": layers,
        "hidden_size": 576,
        "num_heads": 9,
        "vocab_size": 49152,
    }
    headers = {
        f"trace/{path}.parquet": {
            "stage": "trace",
            "inputs": {"prompts.json": digest("prompts"), "model": digest(path)},
            "code": "0123456789abcdef",
            "parameters": digest("trace"),
            "clause": None,
        }
        for path in PATHS
    }
    traces = {path: trace_table(path, layers) for path in PATHS}
    return ReportEvidence(
        name="synthetic",
        title="SmolLM2-135M-Instruct, exact teacher against Q4_K_M",
        models=[
            {
                "id": "teacher",
                "role": "teacher",
                "source": "derived: exact safetensors of candidate",
                "container": "safetensors",
                "files": [
                    {"path": "teacher/model.safetensors", "bytes": 538_060_000, "sha256": digest("teacher")}
                ],
                "config": config,
            },
            {
                "id": "candidate",
                "role": "candidate",
                "source": "derived: Q4_K_M",
                "container": "gguf",
                "files": [{"path": "candidate.gguf", "bytes": 104_500_000, "sha256": digest("candidate")}],
                "config": config,
            },
        ],
        prompts=[{"id": name, "sha256": digest(name), "tokens": tokens} for name, tokens in PROMPTS.items()],
        texts=[{"id": f"text-{i}", "sha256": digest(f"text-{i}"), "count": 64} for i in range(1, 5)],
        paths=[
            {"id": path, "artifact": path.split(".")[0], "arithmetic": path.split(".")[1]} for path in PATHS
        ],
        code="0123456789abcdef",
        config=digest("config"),
        headers=headers,
        sweep=sweep_table(layers, random),
        sweep_inventory={
            "missing": [],
            "extra": [],
            "unmapped_a": [],
            "unmapped_b": [],
            "metadata_differences": [
                {"key": "context_length", "a": 8192, "b": 2048, "changes": "limit", "matters": False}
            ],
            "coverage": {"expected": len(names), "compared": len(names)},
        },
        sweep_summary={
            "band": {"low": 0.5, "high": 2.0},
            "conclusion": "quantized-from",
            "kinds": {
                name: "identical" if name.endswith("norm.weight") else "quantized-from" for name in names
            },
        },
        admissibility=admissibility_document(traces),
        traces=traces,
        divergence=divergence_table(layers, random, {PAIRS[0]: 4e-3, PAIRS[1]: 2e-5, PAIRS[2]: 4.1e-3}),
        decomposition=decomposition_document(layers, random),
        falsifiers=FALSIFIERS,
        published=PUBLISHED,
        impact=impact_document(),
        gates=GATES,
    )
