from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from driftscope.errors import InputError
from driftscope.evidence import provenance
from driftscope.kernels import device
from driftscope.kernels.cpu import CpuKernels
from driftscope.kernels.cuda import module
from driftscope.kernels.device import choose_device, kernels_on
from driftscope.stages.device import device_parameter, take_device


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Let the driver answer with a number of devices, or with an error."""

    def set_answer(answer: Any) -> None:
        def device_count() -> int:
            if isinstance(answer, Exception):
                raise answer
            return int(answer)

        monkeypatch.setattr(module, "device_count", device_count)
        monkeypatch.setattr(module, "compute_capability", lambda: (9, 0))
        monkeypatch.setattr(module, "compiler_version", lambda: (12, 9))

    return set_answer


def test_the_cpu_is_always_to_be_had() -> None:
    assert choose_device("cpu") == "cpu"


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(InputError, match="device 'gpu' is unknown; expected one of cpu, auto, cuda"):
        choose_device("gpu")


def test_a_device_that_answers_is_taken(count: Callable[[Any], None]) -> None:
    count(1)
    assert choose_device("auto") == choose_device("cuda") == "cuda"


@pytest.mark.parametrize("answer", [0, RuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")])
def test_without_a_device_auto_is_the_cpu_and_cuda_an_error(
    count: Callable[[Any], None], answer: Any
) -> None:
    count(answer)
    assert choose_device("auto") == "cpu"
    with pytest.raises(InputError, match="no CUDA device answers") as raised:
        choose_device("cuda")
    assert "\n" not in str(raised.value)


def test_an_old_card_is_not_taken(count: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    count(1)
    monkeypatch.setattr(module, "compute_capability", lambda: (7, 5))
    assert choose_device("auto") == "cpu"
    with pytest.raises(InputError, match=r"compute capability 7\.5; expected 8\.0 or later"):
        choose_device("cuda")


def test_without_the_compiler_there_is_no_cuda(
    count: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> tuple[int, int]:
        raise RuntimeError("Failure finding libnvrtc.so.12\nand more")

    count(1)
    monkeypatch.setattr(module, "compiler_version", fail)
    with pytest.raises(InputError, match=r"NVRTC, CUDA's compiler, is missing \(Failure finding") as raised:
        choose_device("cuda")
    assert "\n" not in str(raised.value)


def test_without_cupy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        device.importlib.util, "find_spec", lambda name: None if name == "cupy" else found(name)
    )
    assert choose_device("auto") == "cpu"
    with pytest.raises(InputError, match=r"CuPy is not installed; install driftscope\[cuda12\]") as raised:
        choose_device("cuda")
    assert "\n" not in str(raised.value)


def test_a_cpu_stage_never_touches_cupy() -> None:
    code = """
import sys
from driftscope.forward.model import ForwardPass
from driftscope.stages.device import take_device
take_device("cpu")
assert "cupy" not in sys.modules
assert "driftscope.kernels.cuda" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_cpu_has_the_kernels_of_the_protocol() -> None:
    kernels = kernels_on("cpu", 2)
    assert isinstance(kernels, CpuKernels)
    names = [name for name in vars(device.Kernels) if not name.startswith("_")]
    assert names
    assert all(hasattr(kernels, name) for name in names)


def test_the_device_is_noted_beside_evidence_and_only_cuda_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "_device", {"kind": "cpu", "name": ""})
    assert take_device("cpu") == "cpu"
    provenance.write_provenance(tmp_path / "a")
    provenance.note_device("cuda", "a card")
    provenance.write_provenance(tmp_path / "b")
    noted = [json.loads(provenance.provenance_path(tmp_path / name).read_text())["device"] for name in "ab"]
    assert noted == [{"kind": "cpu", "name": ""}, {"kind": "cuda", "name": "a card"}]
    assert device_parameter("cpu") == {}
    assert device_parameter("cuda") == {"device": "cuda"}
