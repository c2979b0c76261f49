"""Every CUDA source compiles for the cards that are supported; no card is needed."""

from __future__ import annotations

import pytest
from cupy_backends.cuda.libs import nvrtc
from tests.kernels.cuda.instances import core, sample

from driftscope.kernels.cuda.sources import ARCHITECTURES, OPTIONS, source

FILES = sorted({kernel.file for kernel in sample()})


def compile_for(architecture: str, text: str, names: list[str]) -> tuple[bytes, str]:
    """Machine code and log; raises where the text does not compile."""
    program = nvrtc.createProgram(text, "kernels.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (*OPTIONS, f"-arch={architecture}"))
        except nvrtc.NVRTCError as error:
            raise AssertionError(nvrtc.getProgramLog(program)) from error
        for name in names:
            assert nvrtc.getLoweredName(program, name)
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program).strip("\0\n")
    finally:
        nvrtc.destroyProgram(program)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_compiles_without_a_warning(file: str, architecture: str) -> None:
    # How a block is laid out does not depend on the card: one of them compiles all formats.
    kernels = sample() if architecture == "sm_90" else core()
    names = [kernel.name for kernel in kernels if kernel.file == file]
    code, log = compile_for(architecture, source(file), names)
    assert code[:4] == b"\x7fELF"
    assert log == ""


def test_an_error_is_noticed() -> None:
    text = source("dequantize.cu").replace("if (at >= count) return;", "if (at >= counted) return;")
    with pytest.raises(AssertionError, match="counted"):
        compile_for("sm_90", text, ["dequantize<Q4_K, 4>"])


def test_a_warning_is_noticed() -> None:
    text = source("dequantize.cu") + "\n__global__ void unused() { int never_read; }\n"
    assert "never_read" in compile_for("sm_90", text, ["dequantize<Q4_K, 4>"])[1]


def test_no_product_is_fused_with_a_sum() -> None:
    """The order of roundings is the CPU's; in PTX a fused operation would be named."""
    program = nvrtc.createProgram(source("matmul.cu"), "kernels.cu", (), ())
    nvrtc.addNameExpression(program, "multiply<F32, 4, 64, 1>")
    nvrtc.compileProgram(program, (*OPTIONS, "-arch=compute_90"))
    text = nvrtc.getPTX(program)
    nvrtc.destroyProgram(program)
    text = text.decode() if isinstance(text, bytes) else text
    assert "fma.rn" not in text
    assert "mul.f32" in text or "mul.rn.f32" in text
