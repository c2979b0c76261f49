"""Greedy generation with a key-value cache, over any policy."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import Artifact
from driftscope.errors import InputError
from driftscope.forward.architecture import attention_options
from driftscope.forward.batch import TokenBatch
from driftscope.forward.mapped import mapped
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import Policy
from driftscope.forward.rotary import is_long
from driftscope.kernels.cached_attention import KeyValueCache, cached_attention

F32 = NDArray[np.float32]

STOPPED, AT_LIMIT, AT_CONTEXT, NOT_FINITE = "stop-token", "limit", "context", "not-finite"
"""How a generation ends."""


@dataclass(frozen=True)
class Generation:
    """What was generated behind one prompt.

    Attributes:
        tokens: the new tokens; a stop token is not one of them.
        margins: for each step, logits of the first choice over the second; one more than `tokens` where a
            stop token was chosen.
        ended: ``stop-token``, ``limit``, ``context`` (the model's context is full) or ``not-finite`` (a logit
            is NaN or infinite, so that no token is the largest).
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    ended: str


@dataclass(frozen=True, eq=False)
class Continuation(TokenBatch):
    """New tokens of sequences whose earlier tokens were run before.

    Attributes:
        slots: where each sequence's keys and values are kept.
        lengths: tokens of each sequence that were run before.
    """

    slots: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def positions(self) -> NDArray[np.int64]:
        """``int64[n_tokens]``: position of each token in its own sequence."""
        before: NDArray[np.int64] = np.repeat(
            np.array(self.lengths, dtype=np.int64), np.diff(self.boundaries)
        )
        return super().positions + before

    @property
    def totals(self) -> NDArray[np.int64]:
        """``int64[n_sequences]``: tokens of each sequence, those run before included."""
        found: NDArray[np.int64] = super().totals + np.array(self.lengths, dtype=np.int64)
        return found


class CachedPass(ForwardPass):
    """A pass that keeps keys and values, so that each token is run once.

    Its logits have the same bits as those of `ForwardPass` over the whole sequences, because every op
    treats a token alike alone and in a batch.
    """

    def __init__(
        self,
        artifacts: Mapping[str, Artifact],
        policy: Policy,
        *,
        sequences: int,
        capacity: int,
        threads: int = 1,
    ) -> None:
        """Prepare an empty cache.

        Args:
            artifacts: as in `ForwardPass`.
            policy: as in `ForwardPass`.
            sequences: how many sequences are kept.
            capacity: tokens of the longest.
            threads: number of threads; the result does not depend on it.
        """
        kept = {role: mapped(artifacts[role]) for role in policy.artifacts if role in artifacts}
        super().__init__(kept, policy, threads=threads)
        config = self.config
        self.lengths = [0] * sequences
        self._tokens: list[list[int]] = [[] for _ in range(sequences)]
        self._caches = [
            KeyValueCache(sequences, config.num_kv_heads, config.head_dim, capacity)
            for _ in range(config.num_layers)
        ]

    def feed(self, tokens: Mapping[int, Sequence[int]]) -> F32:
        """Run the next tokens of some sequences.

        Where a sequence grows beyond the length from which on it turns by other angles (LongRoPE), all of its
        tokens are run again.

        Args:
            tokens: slot to token ids, at least one each.

        Returns:
            ``float32[len(tokens), vocabulary]``, logits behind each sequence's last token, in the order of
            `tokens`.

        Raises:
            InputError: a sequence gets longer than the context, or an id is outside of the vocabulary.
        """
        whole = {slot: [*self._tokens[slot], *new] for slot, new in tokens.items()}
        kept = {
            slot: before if is_long(self.config, before) == is_long(self.config, len(whole[slot])) else 0
            for slot, before in ((slot, self.lengths[slot]) for slot in tokens)
        }
        plain = TokenBatch.of([whole[slot][kept[slot] :] for slot in tokens])
        batch = Continuation(plain.ids, plain.starts, tuple(tokens), tuple(kept.values()))
        hidden = self.run_layers(self.embed(batch), batch, range(self.config.num_layers))
        for slot, ids in whole.items():
            self.lengths[slot], self._tokens[slot] = len(ids), ids
        return self.head(hidden[batch.boundaries[1:] - 1])

    def attend(self, layer: int, q: F32, k: F32, v: F32, batch: TokenBatch) -> F32:
        assert isinstance(batch, Continuation)  # `feed` makes no other
        return cached_attention(
            q,
            k,
            v,
            batch.boundaries,
            self._caches[layer],
            np.array(batch.slots, dtype=np.int64),
            np.array(batch.lengths, dtype=np.int64),
            kv_type=self.policy.kv_type,
            threads=self._threads,
            **attention_options(self.config, layer),
        )


def generate(
    artifacts: Mapping[str, Artifact],
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    limit: int,
    stop: Collection[int] = (),
    threads: int = 1,
) -> list[Generation]:
    """Continue prompts greedily: always the largest logit, of equal ones the lowest token id.

    The prompts run side by side and none depends on another.

    Args:
        artifacts: by the roles that the policy names.
        policy: which weights and which arithmetic.
        prompts: token ids, at least one each.
        limit: new tokens at most.
        stop: token ids that end a generation.
        threads: number of threads; the result does not depend on it.

    Raises:
        InputError: `limit` is not positive, or a prompt is empty, too long, or outside of the vocabulary.
    """
    if limit < 1:
        raise InputError(f"generation: limit {limit}; expected at least 1 new token")
    longest = max((len(prompt) for prompt in prompts), default=0)
    context = artifacts[policy.base.artifact].config.context_length
    model = CachedPass(
        artifacts,
        policy,
        sequences=len(prompts),
        capacity=max(1, min(context, longest + limit - 1)),
        threads=threads,
    )
    tokens: list[list[int]] = [[] for _ in prompts]
    margins: list[list[float]] = [[] for _ in prompts]
    ended: dict[int, str] = {}
    following: dict[int, Sequence[int]] = dict(enumerate(prompts))
    while following:
        logits = model.feed(following)
        chosen = {slot: _choose(row) for slot, row in zip(following, logits, strict=True)}
        following = {}
        for slot, choice in chosen.items():
            if choice is None:
                ended[slot] = NOT_FINITE
                continue
            token, margin = choice
            margins[slot].append(margin)
            if token in stop:
                ended[slot] = STOPPED
                continue
            tokens[slot].append(token)
            if len(tokens[slot]) == limit:
                ended[slot] = AT_LIMIT
            elif model.lengths[slot] == context:
                ended[slot] = AT_CONTEXT
            else:
                following[slot] = [token]
    return [Generation(tuple(tokens[i]), tuple(margins[i]), ended[i]) for i in range(len(prompts))]


def _choose(logits: F32) -> tuple[int, float] | None:
    """Return the token with the largest logit and its lead; None where a logit is not finite."""
    if not np.isfinite(logits).all():
        return None
    token = int(np.argmax(logits))
    others = np.delete(logits, token)
    margin = float(logits[token]) - float(others.max()) if others.size else 0.0
    return token, margin
