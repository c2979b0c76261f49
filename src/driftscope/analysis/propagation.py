"""How error travels: what a layer adds to it, what it passes on, and by how much that grows.

A is the reference's trace, B another one of the same tokens, and ``L`` a layer as the reference computes it.
The error behind the layer is, to the last bit of exact arithmetic,

    B_out - A_out = [B_out - L(B_in)] + [L(B_in) - L(A_in)] + [L(A_in) - A_out]
                     injected            inherited             remainder

The remainder is what our computation of the reference's layer is off by; it is zero for traces of our own
pass. The energy of a sum is not the sum of the energies: the cross term 2 <injected, inherited> is given
beside them, and is negative where a layer takes back a part of what it was handed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.divergence import scopes_of
from driftscope.artifacts.model import Artifact
from driftscope.engines.trace import Trace
from driftscope.errors import InputError
from driftscope.forward.architecture import tap_name
from driftscope.forward.arithmetic import Arithmetic, round_to
from driftscope.forward.batch import TokenBatch
from driftscope.forward.evaluate import DeclaredOps, Value
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import WHOLE_MODEL
from driftscope.forward.rounded import rounded

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """One part of the model, seen as a function of the residual stream.

    Attributes:
        layer: its layer, -1 for the embedding and the head.
        tap: what comes out: ``embedding``, ``post_ffn_residual`` or ``lm_head``.
        before: layer and tap of what goes in; None for the embedding.
    """

    layer: int
    tap: str
    before: tuple[int, str] | None


@dataclass(frozen=True)
class Parts:
    """Energies of the parts of a step's error, token by token; every array is ``float64[n_tokens]``.

    A channel in which one of the six arrays is not finite is left out of all sums; `compared` counts the
    others.
    """

    energy_in: F64
    injected: F64
    inherited: F64
    remainder: F64
    cross: F64
    energy_out: F64
    signal: F64
    compared: NDArray[np.int64]


def steps_of(n_layers: int, layers: Iterable[int] | None = None) -> list[Step]:
    """The steps of a model: embedding, layers, head; with `layers` only these, of which -1 is both others."""
    found = [Step(WHOLE_MODEL, "embedding", None)]
    for layer in range(n_layers):
        before = (layer - 1, "post_ffn_residual") if layer else (WHOLE_MODEL, "embedding")
        found.append(Step(layer, "post_ffn_residual", before))
    found.append(Step(WHOLE_MODEL, "lm_head", (n_layers - 1, "post_ffn_residual")))
    wanted = None if layers is None else set(layers)
    return [step for step in found if wanted is None or step.layer in wanted]


def propagation(
    reference: Trace,
    other: Trace,
    artifact: Artifact,
    *,
    pair: str | None = None,
    arithmetic: Arithmetic | None = None,
    layers: Iterable[int] | None = None,
    threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Rows of the ``propagation`` table, in topological order.

    Args:
        reference: A.
        other: B, of the same prompts.
        artifact: the reference's model.
        pair: what the rows are called; by default the names of both engines.
        arithmetic: the reference's; by default what its trace declares, else f32.
        layers: only these, -1 for embedding and head; None for all.
        threads: the result does not depend on it.
        progress: called with the steps done and their number.

    A step whose output or input one of the traces does not have is left out.

    Raises:
        InputError: the traces are not of the same tokens, or a tap has not the model's width.
    """
    if reference.manifest.prompts != other.manifest.prompts:
        raise InputError(
            f"{other.folder}: is not over the prompts and token ids of {reference.folder}; expected the same"
        )
    arithmetic = arithmetic or reference.manifest.arithmetic or Arithmetic.of()
    layer_of = ReferenceLayers(artifact, arithmetic, threads=threads)
    ids = [prompt for prompt, _ in reference.manifest.prompts]
    slices = reference.batch.slices
    steps = steps_of(artifact.config.num_layers, layers)
    rows: list[dict[str, Any]] = []
    for index, step in enumerate(steps):
        places = [(step.layer, step.tap), *([step.before] if step.before else [])]
        if all(trace.has(*place) for trace in (reference, other) for place in places):
            for prompt, tokens in zip(ids, slices, strict=True):
                parts = _parts(reference, other, layer_of, step, tokens)
                for scope, position, part in scopes_of(tokens.stop - tokens.start):
                    about = {"pair": pair or f"{reference.name}|{other.name}", "prompt": prompt}
                    place = {"layer": step.layer, "tap": step.tap, "scope": scope, "position": position}
                    rows.append({**about, **place, **pooled(parts, part)})
        progress(index + 1, len(steps))
    return rows


def pooled(parts: Parts, tokens: slice) -> dict[str, Any]:
    """The figures of a set of tokens. ``gain`` is null where nothing comes in."""
    names = ("energy_in", "injected", "inherited", "remainder", "cross", "energy_out")
    sums = {name: float(getattr(parts, name)[tokens].sum()) for name in names}
    explained = sums["injected"] + sums["inherited"] + sums["remainder"] + sums["cross"]
    return {
        "token_count": tokens.stop - tokens.start,
        "compared_count": int(parts.compared[tokens].sum()),
        **sums,
        "signal_energy": float(parts.signal[tokens].sum()),
        "gain": sums["inherited"] / sums["energy_in"] if sums["energy_in"] > 0 else None,
        "unexplained": sums["energy_out"] - explained,
    }


def decompose(a_in: F32 | None, a_out: F32, b_in: F32 | None, b_out: F32, of_a: F32, of_b: F32) -> Parts:
    """Split the error of a step.

    Args:
        a_in: the reference's input, ``float32[n_tokens, channels]``; None where the step has none.
        a_out: its recorded output, ``float32[n_tokens, channels_out]``.
        b_in: the other's input.
        b_out: the other's recorded output.
        of_a: the reference's step on `a_in`.
        of_b: the reference's step on `b_in`.
    """
    outputs = [np.asarray(x, dtype=np.float64) for x in (a_out, b_out, of_a, of_b)]
    finite = np.logical_and.reduce([np.isfinite(x) for x in outputs])
    a, b, la, lb = (np.where(finite, x, 0.0) for x in outputs)
    injected, inherited, remainder = b - lb, lb - la, la - a
    zeros = np.zeros(a.shape[0])
    return Parts(
        energy_in=zeros if a_in is None or b_in is None else _energy_between(a_in, b_in),
        injected=_energy(injected),
        inherited=_energy(inherited),
        remainder=_energy(remainder) + 2 * (remainder * (injected + inherited)).sum(axis=1),
        cross=2 * (injected * inherited).sum(axis=1),
        energy_out=_energy(b - a),
        signal=_energy(a),
        compared=finite.sum(axis=1),
    )


class ReferenceLayers:
    """The steps of a model in an arithmetic, as functions.

    In ``bf16`` and ``f16`` the weights and the output of every op are rounded, as torch does.
    """

    def __init__(self, artifact: Artifact, arithmetic: Arithmetic, *, threads: int = 1) -> None:
        role = arithmetic.policy.base.artifact
        loaded = rounded(artifact, arithmetic.dtype)
        self._pass = ForwardPass({role: loaded}, arithmetic.policy, threads=threads)
        self._dtype = arithmetic.dtype
        self.config = self._pass.config

    def __call__(self, step: Step, hidden: F32 | None, batch: TokenBatch) -> F32:
        """Run one step on ``float32[n_tokens, hidden_size]``."""
        if hidden is None:
            return round_to(self._pass.embed(batch), self._dtype)
        if hidden.shape[1] != self.config.hidden_size:
            raise InputError(
                f"{tap_name(*step.before) if step.before else step.tap}: {hidden.shape[1]} channels; "
                f"expected the model's {self.config.hidden_size}"
            )
        if self._dtype != "f32":
            return self._rounded(step, hidden, batch)
        if step.layer == WHOLE_MODEL:
            return self._pass.head(hidden)
        return self._pass.run_layers(hidden, batch, [step.layer])

    def _rounded(self, step: Step, hidden: F32, batch: TokenBatch) -> F32:
        """Op by op, each output rounded to the dtype."""
        from driftscope.forward.architecture import head_ops, layer_ops

        ops = DeclaredOps(self._pass, self._dtype)
        values: dict[str, Value] = {"layer_input": hidden}
        for op in (head_ops if step.layer == WHOLE_MODEL else layer_ops)(self.config):
            values[op.tap] = ops.evaluate(step.layer, op.tap, values, batch)
        found = values[step.tap]
        assert not isinstance(found, list)
        return found


def _parts(reference: Trace, other: Trace, layer_of: ReferenceLayers, step: Step, tokens: slice) -> Parts:
    """One prompt's: a sequence sees no other, so each is run by itself and little is held at once."""
    batch = TokenBatch(reference.batch.ids[tokens], (0,))

    def rows(trace: Trace, place: tuple[int, str]) -> F32:
        return np.ascontiguousarray(trace.tap(*place)[tokens])

    a_in, b_in = ((rows(t, step.before) if step.before else None) for t in (reference, other))
    a_out, b_out = (rows(t, (step.layer, step.tap)) for t in (reference, other))
    of_a = layer_of(step, a_in, batch)
    same = b_in is None or (a_in is not None and np.array_equal(a_in, b_in))
    of_b = of_a if same else layer_of(step, b_in, batch)
    for trace, array in ((reference, a_out), (other, b_out)):
        if array.shape != of_a.shape:
            raise InputError(
                f"{trace.folder}: {tap_name(step.layer, step.tap)} has {array.shape[1]} channels; "
                f"expected the model's {of_a.shape[1]}"
            )
    # Some tokens at a time: there are several float64 copies of the logits.
    step_rows = max(1, _CHUNK // a_out.shape[1])
    found = []
    for first in range(0, a_out.shape[0], step_rows):
        cut = slice(first, first + step_rows)
        inputs = [None if x is None else x[cut] for x in (a_in, b_in)]
        found.append(decompose(inputs[0], a_out[cut], inputs[1], b_out[cut], of_a[cut], of_b[cut]))
    names = [item.name for item in fields(Parts)]
    return Parts(**{name: np.concatenate([getattr(part, name) for part in found]) for name in names})


_CHUNK = 1 << 21
"""Values of an output that are split at once."""


def by_layer(rows: Iterable[dict[str, Any]], scope: str = "all-but-first") -> Iterator[dict[str, Any]]:
    """Sums over the prompts of one scope, step by step, with the shares of the error behind each step.

    A prompt of a single token has no ``all-but-first`` and does not count there.
    """
    sums: dict[tuple[int, str], dict[str, float]] = {}
    names = ("energy_in", "injected", "inherited", "remainder", "cross", "energy_out", "signal_energy")
    for row in rows:
        if row["scope"] == scope:
            total = sums.setdefault((row["layer"], row["tap"]), dict.fromkeys(names, 0.0))
            for name in names:
                total[name] += row[name]
    for (layer, tap), total in sums.items():
        out, signal = total["energy_out"], total["signal_energy"]
        yield {
            "layer": layer,
            "tap": tap,
            **total,
            "nmse": out / signal if signal > 0 else None,
            "gain": total["inherited"] / total["energy_in"] if total["energy_in"] > 0 else None,
            "injected_share": total["injected"] / out if out > 0 else None,
            "inherited_share": total["inherited"] / out if out > 0 else None,
        }


def _energy(x: F64) -> F64:
    found: F64 = np.square(x).sum(axis=1)
    return found


def _energy_between(a: F32, b: F32) -> F64:
    d = b.astype(np.float64) - a.astype(np.float64)
    return _energy(np.where(np.isfinite(d), d, 0.0))
