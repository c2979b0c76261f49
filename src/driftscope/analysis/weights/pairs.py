"""Which tensor of one model is compared with which of the other, and in what shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tensor import TensorRef
from driftscope.artifacts.transforms import applied
from driftscope.errors import InputError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Pair:
    """Two tensors to compare, under the name that the row of the sweep gets."""

    tensor: str
    a: TensorRef
    b: TensorRef

    @property
    def nbytes(self) -> int:
        """Bytes that comparing them reads."""
        return self.a.nbytes + self.b.nbytes


def pairs(a: Artifact, b: Artifact) -> list[Pair]:
    """Every tensor that both models have, in the order of a.

    A model with a tied head has its embedding as head: where the other side stores a head of its own, the two
    are compared as ``lm_head.weight``.
    """
    found = [Pair(name, ref, b.tensors[name]) for name, ref in a.tensors.items() if name in b.tensors]
    head_a, head_b = _head(a), _head(b)
    stored = (HEAD in a.tensors) + (HEAD in b.tensors)
    if stored == 1 and head_a is not None and head_b is not None:
        found.append(Pair(HEAD, head_a, head_b))
    return found


def plan_shards(sizes: Mapping[str, int], n_shards: int) -> list[list[str]]:
    """Deal tensors out to shards of about as many bytes.

    Largest first, each to the shard with the fewest bytes so far (Graham 1969: at most 4/3 of the optimum).
    Ties go by name and by shard number, so the plan does not depend on the order of `sizes`.

    Args:
        sizes: tensor name to bytes.
        n_shards: number of shards; those past the number of tensors are empty.

    Returns:
        Names of each shard, sorted.
    """
    if n_shards < 1:
        raise InputError(f"{n_shards} shards: expected at least one")
    shards: list[list[str]] = [[] for _ in range(n_shards)]
    loads = [0] * n_shards
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        lightest = min(range(n_shards), key=lambda i: (loads[i], len(shards[i]), i))
        shards[lightest].append(name)
        loads[lightest] += size
    return [sorted(shard) for shard in shards]


def undone(tensor: str, ref: TensorRef) -> tuple[str, ...]:
    """Labels of what is undone on reading a tensor under a canonical name, a tied head's tie included."""
    tied = ("tied",) if tensor == HEAD and ref.name == EMBEDDING else ()
    return (*applied(ref), *tied)


def _head(artifact: Artifact) -> TensorRef | None:
    if HEAD in artifact.tensors:
        return artifact.tensors[HEAD]
    return artifact.tensors.get(EMBEDDING) if artifact.config.tie_word_embeddings else None
