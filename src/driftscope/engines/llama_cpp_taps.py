"""Which tensors of llama.cpp's graph are which taps, as data, for each of its architectures.

A weight's name is part of the GGUF format and stays; the names that llama.cpp's graph builders give to
results are its own. So an op that reads a weight is known by the weight, and by its own name otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.complete import expected_shapes
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.engines.llama_cpp_graph import GraphTensor
from driftscope.engines.llama_cpp_session import LlamaCppOptions
from driftscope.errors import InputError
from driftscope.forward.architecture import SITE_TENSORS, site_shape, site_tensor
from driftscope.forward.policy import WHOLE_MODEL

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Source:
    """A tap in the graph.

    Attributes:
        tap: name without the layer.
        op: ggml's name of the op.
        weight: name of the weight that the op reads, with ``{layer}``; empty where it reads none.
        name: name of the op's result, with ``{layer}``; empty where `weight` tells.
        part: ``q``, ``k`` or ``v`` of a tap that is stored in parts.
        operand: the tap is this operand of the op, not its result.
        rows_of: the channels lie in the order of the rows of this site's stored weight.
        cut: the tap is the channels of this site, of a product with several sites' weights in one.
        form: ``rows`` for ``[tokens, channels]``; ``heads`` for ``[tokens, heads, head_dim]``; ``softmax``
            for ``[heads, queries, keys]`` with keys beyond the sequence; ``scores`` for the same, before the
            scale, which llama.cpp applies inside its softmax where it has not scaled q.
    """

    tap: str
    op: str
    weight: str = ""
    name: str = ""
    part: str = ""
    operand: int | None = None
    rows_of: str = ""
    cut: str = ""
    form: str = "rows"


_WHOLE = (
    Source("embedding", "GET_ROWS", name="embd"),
    Source("final_norm", "MUL", weight="output_norm.weight"),
    Source("lm_head", "MUL_MAT", name="result_output"),
)


def _in_blocks(permuted: bool) -> tuple[Source, ...]:
    """The taps of a layer of RMSNorm, attention and SwiGLU."""
    q, k = ("q", "k") if permuted else ("", "")
    block = "blk.{layer}."
    return (
        Source("attn_norm", "MUL", weight=f"{block}attn_norm.weight"),
        Source("qkv_matmul", "MUL_MAT", weight=f"{block}attn_q.weight", part="q", rows_of=q),
        Source("qkv_matmul", "MUL_MAT", weight=f"{block}attn_k.weight", part="k", rows_of=k),
        Source("qkv_matmul", "MUL_MAT", weight=f"{block}attn_v.weight", part="v"),
        Source("qkv_bias", "ADD", weight=f"{block}attn_q.bias", part="q", rows_of=q),
        Source("qkv_bias", "ADD", weight=f"{block}attn_k.bias", part="k", rows_of=k),
        Source("qkv_bias", "ADD", weight=f"{block}attn_v.bias", part="v"),
        Source("q_post_rope", "ROPE", name="Qcur-{layer}", rows_of=q, form="heads"),
        Source("k_post_rope", "ROPE", name="Kcur-{layer}", rows_of=k, form="heads"),
        Source("attn_scores", "MUL_MAT", name="kq-{layer}", form="scores"),
        Source("attn_softmax", "SOFT_MAX", name="kq_soft_max-{layer}", form="softmax"),
        # What comes before o_proj, whatever it is called: heads that were rotated for a quantized cache are
        # turned back in between.
        Source("attention", "MUL_MAT", weight=f"{block}attn_output.weight", operand=1),
        Source("attn_out", "MUL_MAT", weight=f"{block}attn_output.weight"),
        Source("post_attn_residual", "ADD", name="ffn_inp-{layer}"),
        Source("ffn_norm", "MUL", weight=f"{block}ffn_norm.weight"),
        Source("ffn_gate", "MUL_MAT", weight=f"{block}ffn_gate.weight"),
        Source("ffn_up", "MUL_MAT", weight=f"{block}ffn_up.weight"),
        Source("ffn_swiglu", "SWIGLU", name="ffn_swiglu-{layer}"),
        Source("ffn_out", "MUL_MAT", weight=f"{block}ffn_down.weight"),
        Source("post_ffn_residual", "ADD", name="l_out-{layer}"),
    )


def _replaced(sources: tuple[Source, ...], *others: Source) -> tuple[Source, ...]:
    """Sources, of which those of the others' taps give way to the others."""
    taps = {source.tap for source in others}
    return (*(source for source in sources if source.tap not in taps), *others)


_GEMMA = _replaced(
    (*_WHOLE, *_in_blocks(permuted=False)),
    Source("embedding", "SCALE", name="inp_scaled"),
    Source("post_attn_norm", "MUL", weight="blk.{layer}.post_attention_norm.weight"),
    Source("post_attn_residual", "ADD", name="sa_out-{layer}"),
    Source("ffn_swiglu", "GEGLU", name="ffn_geglu-{layer}"),
    Source("post_ffn_norm", "MUL", weight="blk.{layer}.post_ffw_norm.weight"),
)
_CAPPED_SCORES = Source("attn_scores", "SCALE", name="kq_scaled_2-{layer}", form="softmax")
_CAPPED_LOGITS = Source("lm_head", "SCALE", name="result_output")
# q is scaled, so that its products with k are the scores.
_SCORES = Source("attn_scores", "MUL_MAT", name="kq-{layer}", form="softmax")
_QKV, _GATE_UP = "blk.{layer}.attn_qkv.weight", "blk.{layer}.ffn_up.weight"
_PHI3 = _replaced(
    (*_WHOLE, *_in_blocks(permuted=False)),
    _SCORES,
    *(Source("qkv_matmul", "MUL_MAT", weight=_QKV, part=site, cut=site) for site in ("q", "k", "v")),
    *(Source(f"ffn_{site}", "MUL_MAT", weight=_GATE_UP, cut=site) for site in ("gate", "up")),
)

ARCHITECTURES: Mapping[str, tuple[Source, ...]] = {
    "llama": (*_WHOLE, *_in_blocks(permuted=True)),
    "qwen2": (*_WHOLE, *_in_blocks(permuted=False)),
    "qwen3": (*_WHOLE, *_in_blocks(permuted=False)),
    "gemma2": _replaced(_GEMMA, _CAPPED_SCORES, _CAPPED_LOGITS),
    # Its logits are capped in few models.
    "gemma3": (*_replaced(_GEMMA, _SCORES), _CAPPED_LOGITS),
    "phi3": tuple(source for source in _PHI3 if source.tap != "post_attn_residual"),
}
"""GGUF's ``general.architecture`` to its taps. Mistral's files are of the architecture ``llama``."""

_ABSENT = {"ffn_silu": "llama.cpp computes it inside ffn_swiglu and keeps no copy"}
_ABSENT_PHI3 = {"post_attn_residual": "llama.cpp gives the sum no name in phi3"}
_ABSENT_FLASH = {
    "attn_scores": "flash attention keeps no scores",
    "attn_softmax": "flash attention keeps no softmax",
}
_LATER_KEYS = (
    "q.k times the scale, before the mask, head by head; 0 for keys of later batches, which are not computed"
)


def absent_taps(options: LlamaCppOptions, architecture: str) -> dict[str, str]:
    """Taps that llama.cpp does not have, and why.

    Args:
        options: how llama.cpp runs.
        architecture: Hugging Face's ``model_type``.
    """
    of_phi3 = _ABSENT_PHI3 if architecture == "phi3" else {}
    return {**_ABSENT, **of_phi3, **(_ABSENT_FLASH if options.flash_attention else {})}


def capture_points(longest: int, options: LlamaCppOptions) -> dict[str, str]:
    """What differs from the taps' standard capture points."""
    chunked = 0 < options.batch_size < longest
    return {"attn_scores": _LATER_KEYS} if chunked and not options.flash_attention else {}


@dataclass(frozen=True)
class Place:
    """A tap of a layer (`WHOLE_MODEL` for none), and how to read it."""

    layer: int
    source: Source


class TapMap:
    """Finds taps among the tensors of a model's graph."""

    def __init__(self, artifact: Artifact) -> None:
        """Lay out the taps of a model.

        Raises:
            InputError: not a GGUF file, an architecture without a map, or a tensor that is missing, of
                another shape, or a bias where no tap is after one.
        """
        name = str(artifact.metadata.get("general.architecture", ""))
        if artifact.container != "gguf":
            raise InputError(
                f"{artifact.path}: llama.cpp reads GGUF files; this model is {artifact.container}"
            )
        if name not in ARCHITECTURES:
            raise InputError(
                f"{artifact.path}: taps of the architecture {name!r} in llama.cpp are not known; "
                f"expected one of {', '.join(ARCHITECTURES)}"
            )
        _check_shapes(artifact)
        self._config = artifact.config
        self._named: dict[tuple[str, str], tuple[Place, ...]] = {}
        self._weighted: dict[tuple[str, str], tuple[Place, ...]] = {}
        for source in ARCHITECTURES[name]:
            text = source.weight or source.name
            layers = range(artifact.config.num_layers) if "{layer}" in text else (WHOLE_MODEL,)
            places = self._weighted if source.weight else self._named
            for layer in layers:
                key = source.op, text.format(layer=layer)
                places[key] = (*places.get(key, ()), Place(layer, source))
        self._orders = {
            (layer, site): _row_order(artifact, layer, site)
            for layer in range(artifact.config.num_layers)
            for site in {source.rows_of for source in ARCHITECTURES[name]} - {""}
        }

    def find(self, tensor: GraphTensor) -> tuple[Place, ...]:
        """The taps that a tensor, or an operand of it, holds."""
        named = self._named.get((tensor.op, tensor.name))
        if named is not None:
            return named
        if tensor.op in _WEIGHTED_OPS:
            for operand in tensor.operand_names():
                if (tensor.op, operand) in self._weighted:
                    return self._weighted[tensor.op, operand]
        return ()

    def read(self, place: Place, tensor: GraphTensor, end: int, length: int) -> F32:
        """Copy a tap.

        Args:
            place: where it belongs.
            tensor: a tensor that `find` gave the place for.
            end: keys that are in the cache, those of this batch included.
            length: tokens of the whole sequence.

        Returns:
            ``float32[tokens, channels]`` in canonical order; of scores and softmax
            ``[tokens, heads * length]``.
        """
        values = tensor.values(place.source.operand)[0]
        match place.source.form:
            case "scores":
                return _by_query(values, self._config.head_dim**-0.5, end, length)
            case "softmax":
                return _by_query(values, 1.0, end, length)
            case "heads":
                values = values.reshape(values.shape[0], -1)
            case _:
                values = values[0]
        if place.source.cut:
            return values[:, _columns(self._config, place.source.cut)].copy()
        order = self._orders.get((place.layer, place.source.rows_of))
        return values.copy() if order is None else np.ascontiguousarray(values[:, order])


_WEIGHTED_OPS = frozenset({"MUL", "MUL_MAT", "ADD"})


def _by_query(values: F32, scale: float, end: int, length: int) -> F32:
    """``[heads, queries, keys]``, keys padded, as ``[queries, heads * length]``; 0 for keys not computed."""
    heads, queries, _ = values.shape
    found = np.zeros((queries, heads, length), dtype=np.float32)
    np.multiply(values[:, :, :end].swapaxes(0, 1), np.float32(scale), out=found[:, :, :end])
    return found.reshape(queries, heads * length)


def _columns(config: ModelConfig, site: str) -> slice:
    """Columns of a site in what a fused weight gives."""
    together = ("q", "k", "v") if site in ("q", "k", "v") else ("gate", "up")
    widths = [site_shape(config, each)[0] for each in together]
    first = sum(widths[: together.index(site)])
    return slice(first, first + widths[together.index(site)])


def _check_shapes(artifact: Artifact) -> None:
    """Refuse what llama.cpp would end the process for, and biases that no tap accounts for.

    A model without its biases on q, k and v passes: llama.cpp runs it.
    """
    for name, shape in expected_shapes(artifact.config).items():
        tensor = artifact.tensors.get(name)
        if tensor is None and not name.endswith(".bias"):
            raise InputError(f"{artifact.path}: {name} is missing; llama.cpp cannot run the model without it")
        if tensor is not None and tensor.shape != shape:
            raise InputError(
                f"{artifact.path}: {name} has the shape {list(tensor.shape)}; expected {list(shape)}"
            )
    known = tuple(f".{SITE_TENSORS[site].rpartition('.')[2]}.bias" for site in ("q", "k", "v"))
    for name in (*artifact.tensors, *artifact.unmapped):
        if name.endswith(".bias") and not name.endswith(known):
            raise InputError(f"{artifact.path}: {name} is a bias that the taps do not know")


def _row_order(artifact: Artifact, layer: int, site: str) -> NDArray[np.int64] | None:
    """Stored row of each canonical row of a weight."""
    config: ModelConfig = artifact.config
    weight = artifact.tensors.get(site_tensor(config, layer, site))
    return None if weight is None else weight.row_order()
