"""Synthetic evidence of a replay and of its propagation: seeded, shaped like a 30-layer model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from tests.report.helpers import PROMPTS, taps

from driftscope.evidence.schemas import frame_of

MATMULS = {"qkv_matmul": 4e-3, "attn_out": 4e-3, "ffn_gate": 5e-3, "ffn_up": 5e-3, "ffn_out": 5e-3}
PATHS = {
    "teacher.f32": "driftscope",
    "candidate.f32": "driftscope",
    "candidate.int8-dot": "driftscope",
    "candidate.llama.cpp": "llama.cpp",
}
NOT_INSTALLED = {
    "path": "teacher.transformers",
    "engine": "transformers",
    "status": "not-run",
    "reason": "transformers is not installed (no module torch)",
    "install": "pip install 'driftscope[transformers]'",
}
FAULT = {
    "layer": 1,
    "tap": "q_post_rope",
    "part": "",
    "component": "engine",
    "class": "rope-pairing",
    "statement": "Turning neighbouring channels, not halves, leaves NMSE 3.1e-14 of 0.62; token 0 is exact.",
    "evidence": {"residual_before": 0.62, "residual_after": 3.1e-14},
    "p_value": 0.0,
}


def local_map(path: str, layers: int, random: np.random.Generator) -> list[dict[str, Any]]:
    integer, own = path.endswith(("int8-dot", "llama.cpp")), path in list(PATHS)[:3]
    cells = []
    for layer, tap in taps(layers):
        weights = MATMULS.get(tap, 4e-3 if tap in ("lm_head", "embedding") else 0.0)
        spread = random.lognormal(0, 0.4, size=3)
        engine = 0.0 if own else 2e-14 * float(spread[0])
        matmul = integer and weights and tap != "embedding"
        arithmetic = (2e-5 if matmul else 1e-14) * float(spread[1])
        model = weights * float(spread[2]) if path.startswith("candidate.") else 0.0
        parts = {"engine": engine, "arithmetic": arithmetic, "model": model}
        total = sum(parts.values())
        cells.append({"layer": layer, "tap": tap, **parts, "total": total, "predicted": total * 1.1})
    return cells


def replayed(path: str, layers: int = 3, seed: int = 1, **changes: Any) -> dict[str, Any]:
    random = np.random.Generator(np.random.Philox(seed))
    ops = 3 + 19 * layers
    return {
        "path": path,
        "engine": {"name": PATHS.get(path, "foreign"), "version": "1.2", "options": {}},
        "own": "candidate.gguf",
        "reference": "teacher",
        "arithmetic": {"path": "int8-dot" if "int8" in path else "f32", "kv_type": "f32", "dtype": "f32"},
        "alpha": 0.001,
        "status": "done",
        "tested": ops,
        "prompts": len(PROMPTS),
        "flagged": [],
        "first": None,
        "capture_points": [],
        "map": local_map(path, layers, random),
        **changes,
    }


def flag(layer: int, tap: str, component: str, **changes: Any) -> dict[str, Any]:
    place = {"layer": layer, "tap": tap, "part": "", "component": component}
    return {**place, "p_value": 1e-40, "nmse": 0.3, "predicted_nmse": 1e-13, "prompt": "story", **changes}


def faulty(path: str = "candidate.llama.cpp", layers: int = 3, **changes: Any) -> dict[str, Any]:
    """Return a replayed path with one fault, which is raised in its map too."""
    first = {**FAULT, **changes}
    entry = replayed(path, layers)
    where, component = (first["layer"], first["tap"]), first["component"]
    for cell in entry["map"]:
        if (cell["layer"], cell["tap"]) == where:
            cell[component] = 0.62
            cell["total"] = 0.62
    flagged = [flag(*where, component, p_value=first["p_value"], part=first["part"])]
    return {**entry, "flagged": flagged, "first": first}


def odd(source: str, layer: int, tap: str, **changes: Any) -> dict[str, Any]:
    found = {"source": source, "layer": layer, "tap": tap, "ratio": 4.2e4, "non_finite": 0, "ops": 31}
    return {**found, "share_from_there": 0.9, "declares_alone": [], **changes}


def vote(layers: int, *odds: dict[str, Any]) -> dict[str, Any]:
    """Return the vote of the candidate's paths, as `driftscope.analysis.vote` gives it."""
    places = list(taps(layers))
    return {
        "status": "done",
        "statistic": "separation over the usual one",
        "threshold": 100.0,
        "floor": 1e-12,
        "sources": [{"name": path, "engine": engine} for path, engine in list(PATHS.items())[1:]],
        "prompts": len(PROMPTS),
        "compared": len(places),
        "not_in_all": 0,
        "ops": [{"layer": layer, "tap": tap, "status": "odd" if odds else "alike"} for layer, tap in places],
        "odd": list(odds),
        "local": [
            {"source": item["source"], "layer": item["layer"], "tap": item["tap"], "part": "", "ops": 1}
            | {"score": 12.4, "usual": 0.1}
            for item in odds
        ],
        "conclusion": f"{odds[0]['source']} is the odd one out" if odds else "no source is odd",
    }


def guess(path: str = "candidate.llama.cpp") -> dict[str, Any]:
    """Return a guess, as `driftscope.analysis.arithmetic_guess` gives it."""

    def answer(winner: str, **residuals: float) -> dict[str, Any]:
        return {"status": "decided", "winner": winner, "margin": 5.1, "residuals": residuals}

    return {
        "path": path,
        "arithmetic": {"artifact": "model", "path": "int8-dot", "activation": None, "kv_type": "f16"},
        "products": answer("int8-dot", **{"int8-dot": 4.7e-13, "f32": 2.1e-5}),
        "accumulation": answer("f32", f32=4.7e-13),
        "dtype": "f32",
        "kv_type": answer("f16", f16=3e-13, f32=2e-8),
        "capture_points": {},
        "statement": "Integer products with q8_K activations, sums in f32, keys and values in f16.",
    }


def replay_document(paths: Sequence[dict[str, Any]] | None = None, layers: int = 3) -> dict[str, Any]:
    held_out = {
        "alpha": 0.01,
        "runs": 120,
        "flagged": 0,
        "rate": 0.0,
        "low": 0.0,
        "high": 0.03,
        "tests": 9000,
    }
    return {
        "floors": {"alpha": 0.001, "runs": 120, "formats": ["F32", "Q4_K"], "held_out": held_out},
        "paths": [*(paths or [replayed(path, layers) for path in PATHS]), NOT_INSTALLED],
        "vote": vote(layers),
        "guess": [guess()],
    }


def propagation_table(
    layers: int, random: np.random.Generator, pairs: Sequence[str], base: float = 3e-3
) -> pl.DataFrame:
    rows = []
    for pair in pairs:
        for prompt, tokens in PROMPTS.items():
            error = 0.0
            steps = [
                (-1, "embedding"),
                *((layer, "post_ffn_residual") for layer in range(layers)),
                (-1, "lm_head"),
            ]
            for layer, tap in steps:
                scopes = [("all", -1, tokens), ("all-but-first", -1, tokens - 1), ("token", 0, 1)]
                signal = 500.0 * (1 + max(layer, 0) / 4)
                gain = float(random.lognormal(0.02, 0.18)) if error else None
                injected = base * signal * float(random.lognormal(0, 0.6)) * (4.0 if layer == 0 else 0.2)
                inherited = error * (gain or 0.0)
                cross = 0.1 * float(random.normal()) * (injected * inherited) ** 0.5
                out = injected + inherited + cross
                for scope, position, count in scopes:
                    size = count * (30.0 if scope == "token" and layer >= 2 else 1.0)
                    rows.append(
                        {
                            "pair": pair,
                            "prompt": prompt,
                            "layer": layer,
                            "tap": tap,
                            "scope": scope,
                            "position": position,
                            "token_count": count,
                            "compared_count": count * 576,
                            "energy_in": error * size,
                            "injected": injected * size / (50.0 if scope == "token" else 1.0),
                            "inherited": inherited * size,
                            "remainder": 0.0,
                            "cross": cross * size,
                            "energy_out": out * size,
                            "signal_energy": signal
                            * count
                            * (1000.0 if scope == "token" and layer >= 2 else 1.0),
                            "gain": gain,
                            "unexplained": 1e-14 * out * size,
                        }
                    )
                error = out
    return frame_of(rows, "propagation")
