"""Every CUDA source compiles for the cards that are supported; no card is needed."""

from __future__ import annotations

import pytest
from cupy_backends.cuda.libs import nvrtc
from tests.kernels.cuda.instances import core, sample

from driftscope.kernels.cuda.sources import ARCHITECTURES, OPTIONS, source

# What CuPy adds by itself.
CUPY_OPTIONS = ("--device-as-default-execution-space",)
FILES = sorted({kernel.file for kernel in sample()})


def compile_for(architecture: str, text: str, names: list[str]) -> tuple[bytes, str]:
    """Machine code and log; raises where the text does not compile."""
    program = nvrtc.createProgram(text, "kernels.cu", (), ())
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (*OPTIONS, *CUPY_OPTIONS, f"-arch={architecture}"))
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


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("activations.cu", "quantize_32<SIMD>"),
        ("compare.cu", "compare<BF16, false, Q4_K, false, 1, 4>"),
        ("dot.cu", "dot_rows<Q4_1, 32, true, 4>"),
        ("forward.cu", "attention<true>"),
        ("forward.cu", "gelu"),
        ("matmul.cu", "multiply<Q4_K, 4, 16, 4>"),
        ("statistics.cu", "tap_statistics"),
    ],
)
def test_operations_are_rounded_one_by_one_as_ieee_says(file: str, name: str) -> None:
    """A fused or approximate operation, or one that flushes subnormals, would be named in PTX."""
    program = nvrtc.createProgram(source(file), "kernels.cu", (), ())
    nvrtc.addNameExpression(program, name)
    nvrtc.compileProgram(program, (*OPTIONS, "-arch=compute_90"))
    text = nvrtc.getPTX(program)
    nvrtc.destroyProgram(program)
    text = text.decode() if isinstance(text, bytes) else text
    assert ".entry" in text
    for odd in ("fma.rn", "mad.f", ".approx", ".ftz", "div.full"):
        assert odd not in text, odd
