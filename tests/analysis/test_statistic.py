from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from driftscope.analysis.statistic import Statistic
from driftscope.errors import InadmissibleError

# The published figures of layer 3: 7 tokens on one side, the last one alone on the other.
APR = Statistic(
    value=1.2216,
    name="std",
    tap="layers.3.ffn_swiglu",
    scope="all",
    position=-1,
    token_count=7,
    count=7 * 18944,
    capture_point="silu(gate) * up",
    path="apr",
    token_ids_sha256="0" * 64,
)


def test_ratio_of_like_statistics() -> None:
    last = replace(APR, value=0.080802, scope="last", token_count=1, count=18944)
    gguf = replace(last, value=0.067006, path="gguf")
    assert last.ratio(gguf) == pytest.approx(1.2059, abs=1e-4)


def test_the_published_ratio_is_refused() -> None:
    gguf = replace(APR, value=0.067006, scope="last", token_count=1, count=18944, path="gguf")
    with pytest.raises(InadmissibleError, match="token scope 'all' against 'last'"):
        APR.ratio(gguf)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "rms"},
        {"tap": "layers.2.ffn_swiglu"},
        {"scope": "all-but-first"},
        {"position": 3},
        {"token_count": 6},
        {"count": 7},
        {"capture_point": "silu(gate)"},
        {"token_ids_sha256": "1" * 64},
        {"path_kind": "local"},
    ],
)
def test_any_other_population_is_refused_in_one_line(change: dict[str, Any]) -> None:
    other = replace(APR, path="gguf", **change)
    with pytest.raises(InadmissibleError) as error:
        APR.ratio(other)
    assert "\n" not in str(error.value)
    assert "gguf" in str(error.value)


@pytest.mark.parametrize(("value", "other"), [(None, 1.0), (1.0, None), (1.0, 0.0)])
def test_an_undefined_ratio_is_refused(value: float | None, other: float | None) -> None:
    with pytest.raises(InadmissibleError, match="undefined"):
        replace(APR, value=value).ratio(replace(APR, value=other))
