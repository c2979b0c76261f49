"""The tables of the evidence, declared in one place: columns, dtypes, ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandera.polars as pa
import polars as pl

from driftscope.errors import InputError


def _table(columns: dict[str, tuple[Any, dict[str, Any]]], keys: list[str]) -> pa.DataFrameSchema:
    return pa.DataFrameSchema(
        {
            name: pa.Column(
                dtype,
                nullable=options.get("nullable", False),
                checks=options.get("checks", []),
            )
            for name, (dtype, options) in columns.items()
        },
        strict=True,
        ordered=True,
        unique=keys,
    )


def _text(*allowed: str) -> tuple[Any, dict[str, Any]]:
    return (pl.String, {"checks": [pa.Check.isin(list(allowed))]} if allowed else {})


_COUNT = (pl.Int64, {"checks": [pa.Check.ge(0)]})
_COUNT_OR_NULL = (pl.Int64, {"nullable": True, "checks": [pa.Check.ge(0)]})
_INDEX = (pl.Int64, {"checks": [pa.Check.ge(-1)]})
_REAL: tuple[Any, dict[str, Any]] = (pl.Float64, {})
_REAL_OR_NULL = (pl.Float64, {"nullable": True})
_NOT_NEGATIVE = (pl.Float64, {"checks": [pa.Check.ge(0.0)]})
_NOT_NEGATIVE_OR_NULL = (pl.Float64, {"nullable": True, "checks": [pa.Check.ge(0.0)]})
_SCOPE = _text("all", "last", "all-but-first", "token")

SWEEP = {
    "tensor": _text(),
    "shape_a": _text(),
    "shape_b": _text(),
    "dtype_a": _text(),
    "dtype_b": _text(),
    "decoder_a": _text("native", "gguf"),
    "decoder_b": _text("native", "gguf"),
    "transforms_a": _text(),
    "transforms_b": _text(),
    "element_count": _COUNT,
    "compared_count": _COUNT,
    "mean_diff": _NOT_NEGATIVE_OR_NULL,
    "max_diff": _NOT_NEGATIVE_OR_NULL,
    "max_index": (pl.String, {"nullable": True}),
    "max_value_a": _REAL_OR_NULL,
    "max_value_b": _REAL_OR_NULL,
    "rmse": _NOT_NEGATIVE_OR_NULL,
    "nmse": _NOT_NEGATIVE_OR_NULL,
    "relative_l2": _NOT_NEGATIVE_OR_NULL,
    "cosine_similarity": _REAL_OR_NULL,
    "scale": _REAL_OR_NULL,
    "mean_error": _REAL_OR_NULL,
    "std_a": _NOT_NEGATIVE_OR_NULL,
    "std_b": _NOT_NEGATIVE_OR_NULL,
    "std_ratio": _NOT_NEGATIVE_OR_NULL,
    "identical_count": _COUNT,
    "small_count": _COUNT,
    "medium_count": _COUNT,
    "large_count": _COUNT,
    "nan_a": _COUNT,
    "nan_b": _COUNT,
    "inf_a": _COUNT,
    "inf_b": _COUNT,
    "bit_identical": (pl.Boolean, {}),
    "same_bytes": (pl.Boolean, {}),
    "rounded_copy": (pl.Boolean, {}),
    "expected_nmse": _NOT_NEGATIVE_OR_NULL,
    "outside_count": _COUNT,
    "cell_count": _COUNT,
    "status": _text(),
}

TRACE = {
    "prompt": _text(),
    "layer": _INDEX,
    "tap": _text(),
    "scope": _SCOPE,
    "position": _INDEX,
    "token_count": _COUNT,
    "count": _COUNT,
    "capture_point": _text(),
    "path": _text(),
    "artifact": _text(),
    "activation_format": _text(),
    "min": _REAL_OR_NULL,
    "max": _REAL_OR_NULL,
    "mean": _REAL_OR_NULL,
    "std": _NOT_NEGATIVE_OR_NULL,
    "rms": _NOT_NEGATIVE_OR_NULL,
    "nan_count": _COUNT,
    "inf_count": _COUNT,
    "zero_count": _COUNT,
    "argmax_channel": _INDEX,
    "argmax_position": _INDEX,
}

DIVERGENCE = {
    "pair": _text(),
    "prompt": _text(),
    "layer": _INDEX,
    "tap": _text(),
    "kind": _text("propagated"),
    "scope": _SCOPE,
    "position": _INDEX,
    "token_count": _COUNT,
    "count": _COUNT,
    "compared_count": _COUNT,
    "nmse": _NOT_NEGATIVE_OR_NULL,
    "relative_l2": _NOT_NEGATIVE_OR_NULL,
    "cosine_similarity": _REAL_OR_NULL,
    "max_abs_diff": _NOT_NEGATIVE_OR_NULL,
    "std_ratio": _NOT_NEGATIVE_OR_NULL,
}

REPLAY = {
    "path": _text(),
    "prompt": _text(),
    "layer": _INDEX,
    "tap": _text(),
    "part": _text("", "q", "k", "v"),
    "component": _text("engine", "arithmetic", "model"),
    "token_count": _COUNT,
    "count": _COUNT,
    "nmse": _NOT_NEGATIVE_OR_NULL,
    "energy": _NOT_NEGATIVE,
    "signal_energy": _NOT_NEGATIVE,
    "predicted_energy": _NOT_NEGATIVE,
    "score": _REAL_OR_NULL,
    "score_token": _REAL_OR_NULL,
    "worst_position": _INDEX,
    "score_channel": _REAL_OR_NULL,
    "worst_channel": _INDEX,
    "non_finite": _COUNT,
    "recomputed": _text(),
}

ENERGIES = {
    "by": _text("total", "layer", "site", "control"),
    "item": _text(),
    "mechanism": _text("weight", "activation", "both"),
    "sequence": _text(),
    "position": _COUNT,
    "energy": _NOT_NEGATIVE_OR_NULL,
}

IMPACT = {
    "pair": _text(),
    "sequence": _text(),
    "position": _COUNT,
    "kl": (pl.Float64, {"nullable": True, "checks": [pa.Check.ge(-1e-6)]}),
    "top1_a": _COUNT_OR_NULL,
    "top1_b": _COUNT_OR_NULL,
    "same_top1": (pl.Boolean, {"nullable": True}),
    "margin_a": _NOT_NEGATIVE_OR_NULL,
    "logit_noise": _NOT_NEGATIVE_OR_NULL,
    "nll_a": _REAL_OR_NULL,
    "nll_b": _REAL_OR_NULL,
    "delta_p": _REAL_OR_NULL,
}

PROPAGATION = {
    "pair": _text(),
    "prompt": _text(),
    "layer": _INDEX,
    "tap": _text("embedding", "post_ffn_residual", "lm_head"),
    "scope": _SCOPE,
    "position": _INDEX,
    "token_count": _COUNT,
    "compared_count": _COUNT,
    "energy_in": _NOT_NEGATIVE,
    "injected": _NOT_NEGATIVE,
    "inherited": _NOT_NEGATIVE,
    "remainder": _REAL,
    "cross": _REAL,
    "energy_out": _NOT_NEGATIVE,
    "signal_energy": _NOT_NEGATIVE,
    "gain": _NOT_NEGATIVE_OR_NULL,
    "unexplained": _REAL,
}

SCHEMAS: dict[str, pa.DataFrameSchema] = {
    "sweep": _table(SWEEP, ["tensor"]),
    "trace": _table(TRACE, ["prompt", "layer", "tap", "scope", "position"]),
    "divergence": _table(DIVERGENCE, ["pair", "prompt", "layer", "tap", "kind", "scope", "position"]),
    "replay": _table(REPLAY, ["path", "prompt", "layer", "tap", "part", "component"]),
    "energies": _table(ENERGIES, ["by", "item", "mechanism", "sequence", "position"]),
    "impact": _table(IMPACT, ["pair", "sequence", "position"]),
    "propagation": _table(PROPAGATION, ["pair", "prompt", "layer", "tap", "scope", "position"]),
}

COLUMNS: dict[str, dict[str, Any]] = {
    name: {column: dtype for column, (dtype, _) in columns.items()}
    for name, columns in {
        "sweep": SWEEP,
        "trace": TRACE,
        "divergence": DIVERGENCE,
        "replay": REPLAY,
        "energies": ENERGIES,
        "impact": IMPACT,
        "propagation": PROPAGATION,
    }.items()
}


def frame_of(rows: list[dict[str, Any]], schema: str) -> pl.DataFrame:
    """Build a frame from rows with exactly the columns and dtypes of the named schema."""
    return pl.DataFrame(rows, schema=COLUMNS[schema], orient="row", strict=True)


def validate(frame: pl.DataFrame, schema: str, where: Path) -> pl.DataFrame:
    """Return `frame` if it meets the named schema and is not empty.

    Raises:
        InputError: the first violation, in one line.
    """
    if frame.is_empty():
        raise InputError(f"{where}: the {schema} table has no rows; nothing was measured")
    try:
        return SCHEMAS[schema].validate(frame)
    except pa.errors.SchemaError as error:
        raise InputError(f"{where}: breaks the {schema} table's schema: {error}") from error
