"""The odd one out: planted faults are named from their op on, clean sources are not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.forward.models import write_model

from driftscope.analysis import vote as module
from driftscope.analysis.vote import THRESHOLD, distances, judge, ratios, topological, vote
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.engines import own
from driftscope.engines.trace import Trace
from driftscope.errors import InputError
from driftscope.forward.architecture import LAYER_TAPS, layer_ops, site_tensor, taps
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.model import ForwardPass

PROMPTS = [("a", [5, 9, 200, 7, 7, 41, 300, 2]), ("b", [3, 17])]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return open_artifact(write_model(tmp_path_factory.mktemp("model"), "llama"))


@pytest.fixture(scope="module")
def clean(model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    """Three programs in float32: our kernels' order of sums, BLAS's, and sums in float64."""
    folder = tmp_path_factory.mktemp("traces")
    passes = {"ours": ForwardPass, "blas": Blas, "double": Double}
    return {name: recorded(kind, model, folder / name) for name, kind in passes.items()}


def recorded(kind: type[ForwardPass], model: Artifact, folder: Path) -> Trace:
    arithmetic = Arithmetic.of()
    return own.record(kind({"model": model}, arithmetic.policy), PROMPTS, folder, declared=arithmetic)


class Blas(ForwardPass):
    """Products by numpy."""

    accumulate = np.float32

    def project(self, layer: int, site: str, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        weights = self._weights["model"]
        ref = weights.artifact.tensors[site_tensor(self.config, layer, site)]
        weight = ref.raw().view(np.float32).astype(self.accumulate)
        return (x.astype(self.accumulate) @ weight.T).astype(np.float32)


class Double(Blas):
    """Products by numpy in float64."""

    accumulate = np.float64  # type: ignore[assignment]


class Louder(ForwardPass):
    """The gate of the layer 1 is a tenth too large."""

    def project(self, layer: int, site: str, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        found = super().project(layer, site, x)
        return found * np.float32(1.1) if (layer, site) == (1, "gate") else found


class LouderBlas(Louder, Blas):
    """The same fault in another program."""


class Hollow(ForwardPass):
    """The head of the model gives a NaN."""

    def final_norm(self, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        found = super().final_norm(x)
        found[3, 4] = np.nan
        return found


def test_distances_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.Generator(np.random.Philox(1))
    arrays = [(rng.standard_normal((4, 6)) * scale).astype(np.float32) for scale in (1.0, 2.0, 0.5)]
    matrix = distances(arrays)
    monkeypatch.setattr(module, "CHUNK", 12)  # two tokens at once
    assert distances(arrays) == pytest.approx(matrix, rel=1e-14)
    arrays = [array.astype(np.float64) for array in arrays]  # type: ignore[misc]
    assert np.array_equal(matrix, matrix.T)
    for i in range(3):
        for j in range(3):
            expected = np.mean(
                [
                    2 * sum((arrays[i][t] - arrays[j][t]) ** 2) / sum(arrays[i][t] ** 2 + arrays[j][t] ** 2)
                    for t in range(4)
                ]
            )
            assert matrix[i, j] == pytest.approx(expected, rel=1e-12, abs=0)


def test_the_ratio_does_not_depend_on_order_or_scale() -> None:
    matrix = np.array([[0, 1, 50, 3], [1, 0, 60, 2], [50, 60, 0, 70], [3, 2, 70, 0]], dtype=float)
    found = ratios(matrix, 1e-12)
    assert found == pytest.approx([1 / 2, 1 / 3, 50 / 1, 2 / 1])
    order = [2, 0, 3, 1]
    assert ratios(1e-5 * matrix[np.ix_(order, order)], 1e-12) == pytest.approx(found[order])


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ([[0, 1, 2], [1, 0, 2], [2, 2, 0]], ("alike", [], [])),
        ([[0, 1, 500], [1, 0, 500], [500, 500, 0]], ("odd", [2], [])),
        (
            [[0, 1, 500, 500], [1, 0, 500, 500], [500, 500, 0, 1], [500, 500, 1, 0]],
            ("split", [], [[0, 1], [2, 3]]),
        ),
        ([[0, 0, 0], [0, 0, 0], [0, 0, 0]], ("equal", [], [])),
        # Two that are the same bit for bit are one, and two are no jury.
        ([[0, 0, 500], [0, 0, 500], [500, 500, 0]], ("too-few", [], [])),
        (
            [[0, 0, 1, 500], [0, 0, 1, 500], [1, 1, 0, 500], [500, 500, 500, 0]],
            ("odd", [3], []),
        ),
    ],
)
def test_what_a_matrix_says(
    matrix: list[list[float]], expected: tuple[str, list[int], list[list[int]]]
) -> None:
    assert judge(np.array(matrix, dtype=float) * 1e-6, 1e-12) == expected


@pytest.mark.parametrize(("apart", "status"), [(1e-11, "alike"), (1e-9, "odd")])
def test_the_floor_stands_for_what_is_usual(apart: float, status: str) -> None:
    matrix = np.array([[0, 1e-16, apart], [1e-16, 0, apart], [apart, apart, 0]])
    assert judge(matrix, 1e-12)[0] == status


def test_clean_sources_have_no_odd_one_out(clean: dict[str, Trace]) -> None:
    found = vote(clean)
    assert found["odd"] == []
    assert found["conclusion"].startswith("no odd one out: the sources differ alike at")
    json.dumps(found, allow_nan=False)


def test_the_faulty_one_is_named_from_its_op_on(
    model: Artifact, clean: dict[str, Trace], tmp_path: Path
) -> None:
    found = vote({"one": clean["ours"], "two": recorded(Louder, model, tmp_path), "three": clean["blas"]})
    (odd,) = found["odd"]
    assert (odd["source"], odd["layer"], odd["tap"]) == ("two", 1, "ffn_gate")
    assert odd["ratio"] > THRESHOLD
    at = [(op["layer"], op["tap"]) for op in found["ops"] if op["odd"] == ["two"]]
    assert {(1, "ffn_silu"), (1, "ffn_swiglu"), (1, "ffn_out"), (2, "attn_norm"), (-1, "lm_head")} <= set(at)
    assert (1, "ffn_up") not in at
    assert "two is the odd one out from layers.1.ffn_gate on" in found["conclusion"]


def test_two_runs_of_one_program_are_no_jury(
    model: Artifact, clean: dict[str, Trace], tmp_path: Path
) -> None:
    """Before its fault the faulty run is the clean one, bit for bit; the third program is not odd there."""
    found = vote({"a": clean["ours"], "b": recorded(Louder, model, tmp_path), "c": clean["double"]})
    assert {op["status"] for op in found["ops"] if op["layer"] == 0} <= {"too-few", "equal"}
    assert [(odd["source"], odd["layer"], odd["tap"]) for odd in found["odd"]] == [("b", 1, "ffn_gate")]
    same = vote({"a": clean["ours"], "b": clean["ours"], "c": clean["double"]})
    assert same["conclusion"].startswith("no vote: fewer than three of the sources differ")


def test_a_rounding_that_falls_the_other_way_makes_nobody_odd(model: Artifact, tmp_path: Path) -> None:
    """Sums in another order flip a few of the 8-bit activations in one program and none in another."""
    arithmetic = Arithmetic.of("f32", activation="q8_0")
    traces = {
        str(step): own.record(
            kind({"model": model}, arithmetic.policy), PROMPTS, tmp_path / str(step), declared=arithmetic
        )
        for step, kind in enumerate((ForwardPass, Nudged, NudgedMore))
    }
    found = vote(traces)
    assert found["floor"] == 1e-6
    assert found["odd"] == []


class Nudged(ForwardPass):
    """Norms that are off by a rounding."""

    by = np.float32(1 + 2**-23)

    def attn_norm(self, layer: int, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return super().attn_norm(layer, x) * self.by


class NudgedMore(Nudged):
    """And by eight."""

    by = np.float32(1 + 2**-20)


def test_two_against_two_decides_nothing(model: Artifact, clean: dict[str, Trace], tmp_path: Path) -> None:
    faulty = [recorded(kind, model, tmp_path / kind.__name__) for kind in (Louder, LouderBlas)]
    found = vote({"a": clean["ours"], "b": clean["blas"], "c": faulty[0], "d": faulty[1]})
    assert found["odd"] == []
    split = next(op for op in found["ops"] if op["status"] == "split")
    assert (split["layer"], split["tap"], split["groups"]) == (1, "ffn_gate", [["a", "b"], ["c", "d"]])
    assert found["conclusion"].startswith("undecided: from layers.1.ffn_gate on")


def test_what_is_not_finite_is_odd(model: Artifact, clean: dict[str, Trace], tmp_path: Path) -> None:
    found = vote({**clean, "c": recorded(Hollow, model, tmp_path)}, layers=[-1])
    (odd,) = (item for item in found["odd"] if item["non_finite"])
    assert (odd["source"], odd["tap"], odd["non_finite"]) == ("c", "final_norm", 1)
    json.dumps(found, allow_nan=False)


def test_what_only_one_declares_is_said(model: Artifact, clean: dict[str, Trace], tmp_path: Path) -> None:
    """The only source in another arithmetic is odd; that is no fault, and the vote says what it declares."""
    coarse = own.trace(model, PROMPTS, tmp_path, Arithmetic.of("f32", activation="q8_0"))
    found = vote({**clean, "c": coarse})
    (odd,) = found["odd"]
    assert (odd["source"], odd["layer"], odd["tap"]) == ("c", 0, "attention")
    assert odd["declares_alone"] == ["arithmetic"]
    assert "c is apart from layers.0.attention on" in found["conclusion"]


def row(
    score: float | None, layer: int, tap: str, part: str = "", component: str = "engine"
) -> dict[str, object]:
    return {"layer": layer, "tap": tap, "part": part, "component": component, "score": score}


def test_the_vote_on_local_errors(clean: dict[str, Trace]) -> None:
    quiet = [row(0.1, 0, "qkv_matmul", "q"), row(-0.2, 0, "ffn_out"), row(None, 1, "ffn_out")]
    loud = [*quiet[:1], row(4.0, 0, "ffn_out"), row(3.0, 1, "ffn_out"), row(9.0, 0, "attn_out", "", "model")]
    found = vote(clean, layers=[0], replays={"ours": quiet, "blas": loud, "double": quiet})
    (item,) = found["local"]
    assert (item["source"], item["layer"], item["tap"], item["ops"]) == ("blas", 0, "ffn_out", 2)
    assert "blas alone does not compute layers.0.ffn_out as it declares" in found["conclusion"]


def test_the_order_is_that_of_the_ops(model: Artifact) -> None:
    taken = {op.tap for op in layer_ops(model.config)}
    assert [op.tap for op in layer_ops(model.config)] == [tap for tap in LAYER_TAPS if tap in taken]
    places = [(tap.layer, tap.op.tap) for tap in taps(model.config)]
    assert topological([*reversed(places), (0, "unheard_of"), (-1, "ffn_out")]) == places


def test_two_are_no_vote(clean: dict[str, Trace]) -> None:
    with pytest.raises(InputError, match="three or more traces; got 2"):
        vote({name: clean[name] for name in ("ours", "blas")})


def test_other_tokens_are_refused(model: Artifact, clean: dict[str, Trace], tmp_path: Path) -> None:
    other = own.trace(model, [("a", [1, 2])], tmp_path, Arithmetic.of())
    with pytest.raises(InputError, match="is not over the prompts and token ids"):
        vote({**clean, "c": other})
