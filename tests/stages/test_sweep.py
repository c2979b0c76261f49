"""The steps of the sweep: the same bytes however split; only what is unexplained is read again."""

from __future__ import annotations

import json

import pytest
from tests.analysis.planted import BAND, DOWN, NORM, UP, K, copied, random_model, values

from driftscope.analysis.weights.alternatives import interleaved
from driftscope.analysis.weights.sweep import compare_tensor, inventory, pairs, relate, summarise
from driftscope.analysis.weights.transform_search import TransformSearch
from driftscope.kernels.device import kernels_on

MODEL = random_model()


def faulty(scheme: str = "Q4_K"):  # type: ignore[no-untyped-def]
    other = UP.replace("layers.2", "layers.4")
    return copied(
        MODEL,
        scheme,
        {
            K: values(MODEL, K)[interleaved(64, 8)],
            NORM: values(MODEL, NORM) - 1,
            UP: values(MODEL, other),
            DOWN: values(MODEL, DOWN)[::-1],
        },
    )


def test_relations_are_the_same_bytes_for_any_number_of_threads_and_any_order_of_rows() -> None:
    b = faulty()
    found = []
    for threads, order in ((1, 1), (2, -1)):
        kernels = kernels_on("cpu", threads)
        rows = [compare_tensor(p.a, p.b, tensor=p.tensor, kernels=kernels) for p in pairs(MODEL, b)][::order]
        listed = inventory(MODEL, b)
        relations = relate(rows, listed, BAND, MODEL, b, kernels=kernels)
        found.append(json.dumps(summarise(rows, listed, relations), sort_keys=True))
    assert found[0] == found[1]
    summary = json.loads(found[0])
    assert summary["at_fault"] == sorted([K, NORM, UP, DOWN])
    assert summary["relations"][DOWN] == "different"
    assert summary["conclusion"] == "different"


def test_only_what_nothing_explains_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    search = TransformSearch.search

    def watched(self, pair, relation):  # type: ignore[no-untyped-def]
        seen.append(pair.tensor)
        return search(self, pair, relation)

    monkeypatch.setattr(TransformSearch, "search", watched)
    b = faulty()
    rows = [compare_tensor(p.a, p.b, tensor=p.tensor) for p in pairs(MODEL, b)]
    relate(rows, inventory(MODEL, b), BAND, MODEL, b)
    assert sorted(seen) == sorted([K, NORM, UP, DOWN])


def test_a_search_keeps_rows_of_one_kind_of_tensor_alone() -> None:
    """Memory is bounded by sixteen rows of each layer, whatever the number of tensors."""
    b = faulty("F32")
    search = TransformSearch(MODEL, b, BAND, kernels_on("cpu"))
    rows = {p.tensor: compare_tensor(p.a, p.b, tensor=p.tensor) for p in pairs(MODEL, b)}
    found = {item.tensor: item for item in relate(rows.values(), inventory(MODEL, b), BAND).tensors}
    by_tensor = {p.tensor: p for p in pairs(MODEL, b)}
    for name in (DOWN, K, UP):
        search.search(by_tensor[name], found[name])
        kept = sum(sample.nbytes for sample in search._samples.values())
        assert kept <= 4 * 16 * 1024 * 3 * MODEL.config.num_layers
