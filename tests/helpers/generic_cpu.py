"""Run functions of the package in a process that compiles for a plain x86-64 processor."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

_SCRIPT = """
import importlib, pickle, sys
from pathlib import Path
name, calls = pickle.loads(Path(sys.argv[1]).read_bytes())
module, function = name.split(":")
call = getattr(importlib.import_module(module), function)
results = {key: call(*arguments) for key, arguments in calls.items()}
Path(sys.argv[1]).write_bytes(pickle.dumps(results))
"""


def on_generic_cpu(function: str, calls: dict[str, tuple[Any, ...]]) -> dict[str, np.ndarray]:
    """The results of ``module:function`` for each list of arguments, without any vector extension."""
    with tempfile.TemporaryDirectory() as folder:
        exchange = Path(folder) / "calls"
        exchange.write_bytes(pickle.dumps((function, calls)))
        environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
        subprocess.run([sys.executable, "-c", _SCRIPT, str(exchange)], check=True, env=environment)
        results: dict[str, np.ndarray] = pickle.loads(exchange.read_bytes())
        return results
