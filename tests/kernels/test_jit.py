from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from driftscope.kernels import jit
from driftscope.kernels.jit import kernel

_FIRST_CALL = """
import sys
import numpy as np
from driftscope.kernels.matmul import matmul_f32
product = matmul_f32(np.ones((3, 8), np.float32), np.ones((2, 8), np.float32))
print(product[0, 0], "scipy.linalg" in sys.modules)
"""


def test_code_is_kept_under_all_that_a_kernel_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Directly, through other modules, as a name, and in lines of several names."""
    (tmp_path / "first.py").write_text("from driftscope.kernels.second import function\nimport third\n")
    (tmp_path / "second.py").write_text(
        "from driftscope.kernels import (\n    fourth as other,\n    fifth,\n)\n"
    )
    for name in ("third", "fourth", "fifth", "sixth"):
        (tmp_path / f"{name}.py").write_text("from driftscope.kernels import first\n")
    monkeypatch.setattr(jit, "_PACKAGE", tmp_path)
    found = {file.stem for file in jit._sources(tmp_path / "first.py")}
    assert found == {"first", "second", "fourth", "fifth"}


def test_the_first_call_of_a_kernel_compiles_once_and_does_not_import_scipy_linalg(tmp_path: Path) -> None:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    kept = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _FIRST_CALL], check=True, capture_output=True, text=True, env=environment
        )
        assert done.stdout.split() == ["8.0", "False"]
        kept.append({file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nb?")})
    assert kept[0]
    assert kept[0] == kept[1]


def test_an_argument_of_another_type_is_refused() -> None:
    @kernel("void(f4[::1])")
    def double(values):  # type: ignore[no-untyped-def]
        for i in range(values.size):
            values[i] *= np.float32(2)

    values = np.ones(3, np.float32)
    double(values)
    assert values.tolist() == [2, 2, 2]
    with pytest.raises(TypeError):
        double(np.ones(3))
