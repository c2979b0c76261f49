"""The catalogue: faults that real engines and converters had, and what must not be called one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One row of the catalogue.

    Attributes:
        id: ``F01`` and so on.
        class_: what the tool should call it.
        says: what is wrong.
        seen: where it happened: projects' issue threads by number.
        absent: why it is injected otherwise than it happened, empty where it is not.
    """

    id: str
    class_: str
    says: str
    seen: str
    absent: str = ""


_OPPOSITE = "the models of the benchmark have none; an engine that applies one is injected instead"

FAULTS: Mapping[str, Fault] = {
    fault.id: fault
    for fault in (
        Fault("F01", "row-permutation", "q/k row permutation missing", "llama.cpp 22611, 3364"),
        Fault(
            "F02",
            "row-permutation-heads",
            "permutation with the wrong head count",
            "llama.cpp 3364",
            "the query heads do not divide the rows of k of these models; twice the key heads are used",
        ),
        Fault("F03", "rope-pairing", "RoPE pairs: interleaved or split halves", "llama.cpp's converter"),
        Fault("F04", "norm-offset", "one added to a norm's weight, or not", "llama.cpp 5631, vLLM 31464"),
        Fault("F05", "bias-dropped", "attention bias dropped", "ports of Qwen2"),
        Fault("F06", "head-tie", "LM head tied or untied wrongly", "transformers 43429"),
        Fault("F07", "missing-tensor", "tensors silently dropped", "aprender 2382"),
        Fault("F08", "gate-up-swapped", "gate and up exchanged", "nntrainer 4194"),
        Fault("F09", "transposed", "projection transposed", "aprender 155"),
        Fault("F10", "layer-skipped", "a layer not run", "llama.cpp 25845"),
        Fault("F11", "norm-eps", "RMSNorm's eps wrong", "llama.cpp 2373, 9310"),
        Fault("F12", "scale-dropped", "scale of a quantized weight dropped", "LTX-2 172"),
        Fault("F13", "zero-point", "zero point off by one", "vLLM 38966"),
        Fault("F14", "rope-factors", "RoPE frequency factors missing", "ik_llama 2291"),
        Fault("F15", "rope-precision", "RoPE positions in bf16", "transformers 29285"),
        Fault("F16", "rope-theta", "wrong RoPE theta", "many"),
        Fault("F17", "head-mapping", "grouped heads tiled instead of repeated", "jax-js 180"),
        Fault("F18", "soft-cap", "soft cap of scores or logits", "llama.cpp 8197", _OPPOSITE),
        Fault("F19", "window", "sliding window off by one", "Megatron-Bridge 2656"),
        Fault("F20", "capture-point", "a tap recorded at another point", "nnsight 337"),
        Fault("F21", "score-precision", "attention scores summed in f16", "llama.cpp 10232"),
        Fault("F22", "score-scale", "attention scale missing or squared", "several"),
        Fault("F23", "activation-function", "another activation function", "vLLM 3411"),
        Fault("F24", "output-scale", "multiplier of an output", "vLLM 52158", _OPPOSITE),
        Fault("F25", "f16-overflow", "f16 overflow in ffn_down", "llama.cpp 17534, 27016"),
        Fault("F26", "f16-overflow", "q8_1's block sum overflows f16", "llama.cpp 21652"),
        Fault("F27", "row-count", "a kernel wrong only at 2 or 3 rows", "ik_llama 446"),
        Fault("F28", "position-shift", "keys at shifted positions", "several"),
        Fault("F29", "causal-mask", "causal mask off by one", "several"),
        Fault("F30", "transposed", "LM head read transposed", "aprender 1651"),
        Fault("F31", "swiglu-shift", "slice of the SwiGLU product off by one", "aprender 1072"),
        Fault("F32", "residual", "residual added twice or missing", "several"),
        Fault("F33", "other-layer", "another layer's weights", "several"),
        Fault("F34", "non-finite", "NaN or infinity in one weight row", "several"),
        Fault("F35", "corrupt-block", "one flipped bit in a quantized block", "storage faults"),
    )
}
"""Fault id to its row."""

CONTROLS: Mapping[str, str] = {
    "C1": "a clean pair under any supported quantization",
    "C2": "a massive activation on the first token, on both sides",
    "C3": "a greedy choice that flips between two all but equal logits",
    "C4": "a base model against its instruct version: different weights, none of them corrupt",
    "C5": "last-token statistics against all-token statistics: inadmissible, not a divergence",
    "C6": "another order of accumulation, or another number of threads",
    "C7": "the large error of q8_K beside an outlier channel",
}
"""What must not be called a bug."""
