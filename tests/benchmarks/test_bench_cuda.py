from __future__ import annotations

import pytest

from benchmarks import bench_cuda


def test_without_a_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_cuda, "why_not_cuda", lambda: "no CUDA device answers")
    assert bench_cuda.main() == 2
    assert capsys.readouterr().out == "bench_cuda: no CUDA device answers\n"
