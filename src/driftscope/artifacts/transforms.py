"""What may lie between a tensor's stored bytes and its canonical values, for each architecture, as data.

Canonical values are those of Hugging Face's own models: the rows of a head in two halves, norm weights as
the model learnt them, each projection a matrix of its own. A file may store them otherwise and still hold
the same model; the tables below say how, and everything that reads, writes or compares files asks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from driftscope.artifacts.model import ModelConfig
from driftscope.artifacts.names import suffix_of
from driftscope.artifacts.tensor import TensorRef


@dataclass(frozen=True)
class InterleavedRows:
    """Stored row ``2 j + s`` of a head is canonical row ``s * head_dim / 2 + j``.

    llama.cpp turns neighbouring channels of these architectures, transformers those of two halves
    (``conversion/llama.py``, ``LlamaModel.permute``).

    Attributes:
        heads: field of `ModelConfig` that holds the number of heads.
    """

    heads: str
    label: str = "rows-interleaved"


@dataclass(frozen=True)
class Offset:
    """A stored value is the canonical one plus `added`, in f32."""

    added: float

    @property
    def label(self) -> str:
        """``offset+1`` and the like."""
        return f"offset{self.added:+g}"


@dataclass(frozen=True)
class Split:
    """The tensor is some of the rows of a larger one (`driftscope.artifacts.names`: ``gguf_parts``)."""

    label: str = "split"


@dataclass(frozen=True)
class Transposed:
    """Stored rows are canonical columns."""

    label: str = "transposed"


@dataclass(frozen=True)
class NegatedExponential:
    """A stored value is ``-exp`` of the canonical one."""

    label: str = "negated-exponential"


@dataclass(frozen=True)
class Tied:
    """The tensor is left out, and another serves in its place.

    Attributes:
        to: canonical name of the other.
    """

    to: str
    label: str = "tied"


@dataclass(frozen=True)
class PaddedRows:
    """One file has more rows than the other, at the end; no token of the vocabulary uses them."""

    label: str = "rows-padded"


Transform = InterleavedRows | Offset | Split | Transposed | NegatedExponential | Tied | PaddedRows
Table = Mapping[str, tuple[Transform, ...]]
"""Pattern of a canonical name without its layer (as in `fnmatch`) to what may be done to the tensor."""

# In every container and architecture.
ANYWHERE: Table = {
    "model.embed_tokens.weight": (PaddedRows(),),
    "lm_head.weight": (Tied(to="model.embed_tokens.weight"), PaddedRows()),
}

# What a writer of GGUF does, by `general.architecture`.
GGUF: dict[str, Table] = {
    "llama": {
        "self_attn.q_proj.*": (InterleavedRows("num_heads"),),
        "self_attn.k_proj.*": (InterleavedRows("num_kv_heads"),),
    },
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"*norm.weight": (Offset(1.0),)},
    "gemma3": {"*norm.weight": (Offset(1.0),)},
    "phi3": {
        "self_attn.[qkv]_proj.*": (Split(),),
        "mlp.gate_proj.weight": (Split(),),
        "mlp.up_proj.weight": (Split(),),
    },
}

# What a Hugging Face file does, by `model_type`.
HUGGING_FACE: dict[str, Table] = {
    "phi3": {
        "self_attn.[qkv]_proj.*": (Split(),),
        "mlp.gate_proj.weight": (Split(),),
        "mlp.up_proj.weight": (Split(),),
    },
}

# Done by llama.cpp's converter to models that cannot be run here. A pair of tensors that differ by one of
# these is named all the same.
ELSEWHERE: tuple[Transform, ...] = (Transposed(), NegatedExponential())

# What `applied` and the relations of a sweep call them, and where each is explained.
LABELS: dict[str, type] = {
    "rows-interleaved": InterleavedRows,
    "offset+1": Offset,
    "split": Split,
    "tied": Tied,
    "rows-padded": PaddedRows,
    "transposed": Transposed,
    "negated-exponential": NegatedExponential,
}


def stored_as(name: str, table: Table) -> tuple[Transform, ...]:
    """What a table says of a canonical name."""
    suffix = suffix_of(name)
    return tuple(
        transform
        for pattern, transforms in table.items()
        if fnmatchcase(suffix, pattern)
        for transform in transforms
    )


def rope_heads(name: str, architecture: str, config: ModelConfig) -> int:
    """Heads whose rows GGUF interleaves, 0 where it does not (`TensorRef.rope_heads`)."""
    rows = [t for t in stored_as(name, GGUF[architecture]) if isinstance(t, InterleavedRows)]
    return int(getattr(config, rows[0].heads)) if rows else 0


def value_offset(name: str, architecture: str) -> float:
    """What GGUF adds to each value (`TensorRef.value_offset`)."""
    return sum(t.added for t in stored_as(name, GGUF[architecture]) if isinstance(t, Offset))


def applied(ref: TensorRef) -> tuple[str, ...]:
    """Labels of the transforms between a tensor's stored bytes and its canonical values, sorted."""
    found: list[Transform] = []
    if ref.rope_heads:
        found.append(InterleavedRows("num_heads"))
    if ref.value_offset:
        found.append(Offset(ref.value_offset))
    if ref.stored_rows is not None:
        found.append(Split())
    return tuple(sorted(transform.label for transform in found))
