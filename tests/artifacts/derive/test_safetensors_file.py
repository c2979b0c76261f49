from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from driftscope.artifacts.derive.safetensors_file import SafetensorsWriter


def test_the_safetensors_package_reads_it(tmp_path: Path) -> None:
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    b = np.arange(5, dtype=np.float16)
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, {"b": ("F16", (5,), 10), "é": ("F32", (3, 4), 48)}) as writer:
        writer.write([b])
        writer.write([a[:2], a[2:]])
    read = safetensors.numpy.load_file(path)
    assert list(read) == ["b", "é"]
    np.testing.assert_array_equal(read["é"], a)
    np.testing.assert_array_equal(read["b"], b)


def test_the_data_starts_on_a_multiple_of_eight(tmp_path: Path) -> None:
    for length in range(1, 9):
        path = tmp_path / "a.safetensors"
        with SafetensorsWriter(path, {"x" * length: ("F32", (1,), 4)}) as writer:
            writer.write([np.ones(1, dtype=np.float32)])
        assert (path.stat().st_size - 4) % 8 == 0


def test_fewer_bytes_than_declared_are_noticed(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "a", {"x": ("F32", (2,), 8)})
    with pytest.raises(RuntimeError, match="4 bytes written, 8 declared"), writer:
        writer.write([np.ones(1, dtype=np.float32)])
