"""What can be wrong with RoPE: the angle of every pair at every position, measured from input and output."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from driftscope.analysis.explanations import norm as norms
from driftscope.analysis.explanations.base import F32, F64, I64, Candidate, Case, figure, rounded
from driftscope.analysis.explanations.caps import least
from driftscope.analysis.explanations.projection import interleaved
from driftscope.artifacts.model import Artifact, ModelConfig
from driftscope.artifacts.names import ROPE_FREQS
from driftscope.artifacts.rope_factors import llama3_factors
from driftscope.errors import InputError
from driftscope.forward.arithmetic import round_to
from driftscope.forward.policy import WHOLE_MODEL
from driftscope.forward.rotary import is_long, rope_frequencies, rope_scale, rotary_dim, turns_locally

C128 = NDArray[np.complex128]

_THETAS = (1e3, 1e4, 1e5, 1.5e5, 2.5e5, 5e5, 1e6, 5e6, 8e6, 1e7, 1e8)
_LINEAR = (2.0, 4.0, 8.0, 16.0, 0.5, 0.25, 0.125)
_LLAMA3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (16.0, 1.0, 4.0, 8192))
_FARTHEST_SHIFT = 1024
_MOST_PLACES = 1 << 25


@dataclass(frozen=True)
class Rotation:
    """The turn of q or k: what goes in, what came out, and the expected angles.

    Attributes:
        case: the case.
        x: what is turned, ``float64[tokens, heads * head_dim]``; after the head norm, where there is one.
        frequencies: expected, radians a position, ``float32[head_dim / 2]``.
        scale: expected factor of cosine and sine.
        config: hyperparameters, with the theta and the scaling of the op's layer.
        long: whether they are LongRoPE's frequencies for long sequences.
    """

    case: Case
    x: F64
    frequencies: F32
    scale: float
    config: ModelConfig
    long: bool = False

    @classmethod
    def of(cls, case: Case) -> Rotation | None:
        """The turn that an op is, or None where its input cannot be had; the same for every hypothesis."""
        if "rotation" not in case.memo:
            case.memo["rotation"] = cls._of(case)
        found = case.memo["rotation"]
        assert found is None or isinstance(found, cls)
        return found

    @classmethod
    def _of(cls, case: Case) -> Rotation | None:
        if not case.has("qkv_bias"):
            return None
        site = case.op.tap[0]
        x = case.part("qkv_bias", site).astype(np.float64)
        name = f"model.layers.{case.op.layer}.self_attn.{site}_norm.weight"
        if case.config.qk_norm:
            if not case.has_tensor(name):
                return None
            heads = x.reshape(-1, case.config.head_dim)
            square = np.mean(heads * heads, axis=1, keepdims=True) + case.config.rms_norm_eps
            x = (heads / np.sqrt(square) * case.norm_weight(name)).reshape(x.shape)
        layer = case.op.layer
        lengths = case.batch.totals[np.searchsorted(case.batch.boundaries, case.tokens, side="right") - 1]
        long = {is_long(case.config, int(length)) for length in lengths}
        if len(long) > 1:
            # Sequences turn by two sets of frequencies; hypotheses know one.
            return None
        local = turns_locally(case.config, layer)
        scale = rope_scale(case.config, local=local)
        is_of_long = long.pop()
        found = frequencies_of(case.artifact, layer, long=is_of_long)
        return cls(case, x, found, scale, _config(case), is_of_long)

    @property
    def half(self) -> int:
        """Pairs of channels a head that turn."""
        return rotary_dim(self.case.config) // 2

    @property
    def angles(self) -> F64:
        """Expected angles, ``float64[tokens, pairs]``, rounded to float32 as the kernels do."""
        return self.angles_at(self.case.positions, self.frequencies)

    def angles_at(self, positions: NDArray[np.generic], frequencies: NDArray[np.generic]) -> F64:
        """Angles of some positions."""
        return (positions.astype(np.float32)[:, None] * frequencies.astype(np.float32)[None, :]).astype(
            np.float64
        )

    def turned(self, angles: F64, scale: float | None = None, x: F64 | None = None) -> F64:
        """The op's output with other angles."""
        return self.turned_by(np.cos(angles), np.sin(angles), scale, x)

    def turned_by(self, cosine: F64, sine: F64, scale: float | None = None, x: F64 | None = None) -> F64:
        """The op's output with other cosines and sines, ``float64[tokens, pairs]``."""
        factor = self.scale if scale is None else scale
        before = self.x if x is None else x
        z = self.pairs(before) * (factor * (cosine + 1j * sine))[:, None, :]
        return np.concatenate([z.real, z.imag, self.rest(before)], axis=2).reshape(self.x.shape)

    def pairs(self, x: F64) -> C128:
        """Channels that turn as complex numbers, ``complex128[tokens, heads, pairs]``."""
        heads = x.reshape(x.shape[0], -1, self.case.config.head_dim)
        return np.asarray(heads[:, :, : self.half] + 1j * heads[:, :, self.half : 2 * self.half])

    def rest(self, x: F64) -> F64:
        """Channels that do not turn, ``float64[tokens, heads, channels]``."""
        return x.reshape(x.shape[0], -1, self.case.config.head_dim)[:, :, 2 * self.half :]

    @cached_property
    def overlap(self) -> C128:
        """For each token and pair a number whose angle is the one that was turned by."""
        target = np.where(np.isfinite(self.case.target), self.case.target, 0.0)
        return np.asarray(np.sum(self.pairs(target) * np.conj(self.pairs(self.x)), axis=1))

    @cached_property
    def measured_frequencies(self) -> F64 | None:
        """Radians a position of each pair, from the turn between tokens; None without two neighbours."""
        size = np.abs(self.overlap)
        phase = np.where(size > 0, self.overlap / np.where(size > 0, size, 1.0), 0.0)
        place, tokens = self.case.positions, self.case.tokens
        sequence = np.searchsorted(self.case.batch.boundaries, tokens, side="right")
        found: F64 | None = None
        lag = 1
        while lag < place.size:
            near = (place[lag:] - place[:-lag] == lag) & (sequence[lag:] == sequence[:-lag])
            if near.any():
                weight = np.minimum(size[lag:], size[:-lag])
                between = weight * phase[lag:] * np.conj(phase[:-lag])
                turn = np.angle(np.sum(np.where(near[:, None], between, 0), axis=0))
                if found is None:
                    if lag > 1:
                        return None
                    found = turn
                else:
                    found = (turn + 2 * np.pi * np.round((found * lag - turn) / (2 * np.pi))) / lag
            lag *= 2
        return found

    def agreement(self, angles: F64) -> float:
        """How well angles fit, higher is better: the error's energy falls by twice this."""
        return float(np.sum((self.overlap * np.exp(-1j * angles)).real))


def _config(case: Case) -> ModelConfig:
    """Hyperparameters with the theta and the scaling of the op's layer."""
    config = case.config
    if not turns_locally(config, case.op.layer):
        return config
    assert config.local_rope_theta is not None
    return dataclasses.replace(
        config, rope_theta=config.local_rope_theta, rope_scaling=None, local_rope_theta=None
    )


def frequencies_of(artifact: Artifact, layer: int = WHOLE_MODEL, *, long: bool = False) -> F32:
    """The rotary frequencies of a layer of an artifact; of LongRoPE those of long or of short sequences."""
    from driftscope.kernels.dequantize import dequantize

    ref = artifact.tensors.get(ROPE_FREQS)
    factors = None
    if ref is not None:
        factors = dequantize(np.ascontiguousarray(ref.raw()), ref.dtype).reshape(-1)
    return rope_frequencies(artifact.config, factors, local=turns_locally(artifact.config, layer), long=long)


def pairing(case: Case) -> Iterator[Candidate]:
    """Neighbouring channels are paired instead of those half a head apart."""
    rotation = Rotation.of(case)
    if rotation is None:
        return
    # `order` puts the halves of a head side by side, `back` puts neighbours half a head apart.
    still = np.arange(2 * rotation.half, case.config.head_dim)
    order = np.concatenate([np.argsort(interleaved(2 * rotation.half, 1)), still])
    back = np.argsort(order)
    cosine, sine = np.cos(rotation.angles), np.sin(rotation.angles)

    def reordered(x: F64, places: I64) -> F64:
        return x.reshape(x.shape[0], -1, places.size)[:, :, places].reshape(x.shape)

    neighbours = rotation.turned_by(cosine, sine, x=reordered(rotation.x, back))
    yield Candidate(
        "rope-pairing",
        "channels 2i and 2i + 1 of a head are turned together instead of i and i + head_dim / 2",
        reordered(neighbours, order),
        0,
        {"pairing": "interleaved"},
    )
    for places, what in ((order, "interleaved"), (back, "taken apart")):
        yield Candidate(
            "row-permutation",
            f"channels of each head are {what} before the turn",
            rotation.turned_by(cosine, sine, x=reordered(rotation.x, places)),
            1,
            {"order": what},
        )


def share(case: Case) -> Iterator[Candidate]:
    """The whole head turns where a part of it should."""
    rotation, dim = Rotation.of(case), case.config.head_dim
    if rotation is None or 2 * rotation.half == dim or rotation.config.rope_scaling:
        return
    frequencies = rope_frequencies(dataclasses.replace(rotation.config, rotary_dim=None))
    angles = rotation.angles_at(case.positions, frequencies)
    heads = rotation.x.reshape(rotation.x.shape[0], -1, 2, dim // 2)
    z = (heads[:, :, 0] + 1j * heads[:, :, 1]) * np.exp(1j * angles)[:, None, :]
    yield Candidate(
        "rope-pairing",
        f"all {dim} channels of a head are turned instead of the leading {2 * rotation.half}",
        np.concatenate([z.real, z.imag], axis=2).reshape(rotation.x.shape),
        0,
        {"turned": dim, "expected_turned": 2 * rotation.half},
    )


def theta(case: Case) -> Iterator[Candidate]:
    """Another base of the frequencies."""
    rotation = Rotation.of(case)
    if rotation is None:
        return
    own = float(rotation.config.rope_theta)
    tried: dict[float, int] = {own * factor: 0 for factor in (10.0, 0.1, 100.0, 0.01)}
    tried |= dict.fromkeys(_THETAS, 0)
    if other := _other_side(case):
        tried[_theta_of(other, case.op.layer)] = 0
    fitted = _fitted_theta(rotation)
    if fitted is not None:
        tried.setdefault(rounded(fitted), 1)
        tried.setdefault(fitted, 2)
    for value, complexity in tried.items():
        if value == own or not 1.0 < value < 1e12:
            continue
        frequencies = _with_theta(case, rotation, value)
        yield Candidate(
            "rope-theta",
            f"rope_theta is {value:.6g} instead of {own:.6g}",
            rotation.turned(rotation.angles_at(case.positions, frequencies)),
            complexity,
            {"theta": float(f"{value:.6g}"), "expected_theta": own},
        )


def _theta_of(artifact: Artifact, layer: int) -> float:
    """The base of a layer's frequencies."""
    config = artifact.config
    local = config.local_rope_theta if turns_locally(config, layer) else None
    return float(config.rope_theta if local is None else local)


def _other_side(case: Case) -> Artifact | None:
    return case.context.reference if case.is_engine else case.context.own


def _with_theta(case: Case, rotation: Rotation, value: float) -> F32:
    """Frequencies with another base; stored factors stay."""
    config = rotation.config
    bare = dataclasses.replace(config, rope_scaling=None)
    # Divisors of each pair do not hang on the base.
    divided = (
        ROPE_FREQS in case.artifact.tensors or (config.rope_scaling or {}).get("rope_type") == "longrope"
    )
    try:
        if not divided:
            return rope_frequencies(dataclasses.replace(config, rope_theta=value))
    except InputError:
        pass
    ratio = rotation.frequencies / rope_frequencies(bare)
    return rope_frequencies(dataclasses.replace(bare, rope_theta=value)) * ratio


def _fitted_theta(rotation: Rotation) -> float | None:
    measured = rotation.measured_frequencies
    if measured is None:
        return None
    config = rotation.config
    exponents = np.arange(rotation.half) / rotation.half
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None)).astype(np.float64)
    ratio = rotation.frequencies / plain
    weight = np.sum(np.abs(rotation.overlap), axis=0)

    def misfit(log: float) -> float:
        return float(np.sum(weight * (measured - ratio * np.exp(-log * exponents)) ** 2))

    grid = np.linspace(np.log(10.0), np.log(1e9), 1500)
    best = float(grid[int(np.argmin([misfit(float(log)) for log in grid]))])
    step = float(grid[1] - grid[0])
    return float(np.exp(least(misfit, best - step, best + step)))


def factors(case: Case) -> Iterator[Candidate]:
    """Divisors of the frequencies are left out, or there are some that should not be."""
    rotation = Rotation.of(case)
    if rotation is None:
        return
    plain = rope_frequencies(dataclasses.replace(rotation.config, rope_scaling=None))
    tries: list[tuple[str, F32, float, int]] = []
    if not np.array_equal(plain, rotation.frequencies) or rotation.scale != 1.0:
        tries.append(("the scaling of the rotary frequencies is left out", plain, 1.0, 0))
        if rotation.scale != 1.0:
            scaled = rotation.frequencies
            longrope = (rotation.config.rope_scaling or {}).get("rope_type") == "longrope"
            whose = "LongRoPE's" if longrope else "YaRN's"
            tries.append((f"{whose} attention factor is left out", scaled, 1.0, 0))
            tries.append((f"{whose} attention factor is applied twice", scaled, rotation.scale**2, 0))
    if (rotation.config.rope_scaling or {}).get("rope_type") == "longrope":
        theirs = frequencies_of(case.artifact, case.op.layer, long=not rotation.long)
        taken, right = ("short", "long") if rotation.long else ("long", "short")
        what = f"LongRoPE's factors for {taken} texts are taken for a {right} one"
        tries.append((what, theirs, rotation.scale, 0))
    other = _other_side(case)
    if other is not None and _theta_of(other, case.op.layer) == rotation.config.rope_theta:
        theirs = frequencies_of(other, case.op.layer)
        if theirs.shape == rotation.frequencies.shape and not np.array_equal(theirs, rotation.frequencies):
            what = "the rotary frequencies are scaled as in the other artifact"
            scale = rope_scale(other.config, local=turns_locally(other.config, case.op.layer))
            tries.append((what, theirs, scale, 0))
    for factor in _LINEAR:
        divided = rotation.frequencies / np.float32(factor)
        tries.append((f"all rotary frequencies are divided by {factor:g}", divided, rotation.scale, 1))
    for factor, low, high, length in _LLAMA3:
        divisors = llama3_factors(
            rotation.config.rope_theta,
            2 * rotation.half,
            factor=factor,
            low=low,
            high=high,
            original_length=length,
        ).astype(np.float32)
        what = f"the rotary frequencies are divided by Llama 3's factors (factor {factor:g})"
        tries.append((what, plain / divisors, rotation.scale, 1))
    for what, frequencies, scale, complexity in tries:
        ratio = frequencies.astype(np.float64) / rotation.frequencies
        yield Candidate(
            "rope-factors",
            what,
            rotation.turned(rotation.angles_at(case.positions, frequencies), scale),
            complexity,
            {"ratio_low": rounded(float(ratio.min())), "ratio_high": rounded(float(ratio.max()))},
        )
    measured = rotation.measured_frequencies
    if measured is not None:
        ratio = measured / rotation.frequencies
        yield Candidate(
            "rope-factors",
            f"pairs turn {figure(ratio.min())} to {figure(ratio.max())} times as fast as they should",
            rotation.turned(case.positions[:, None] * measured[None, :]),
            6,
            {"ratios": [rounded(float(value)) for value in ratio]},
        )


def precision(case: Case) -> Iterator[Candidate]:
    """Positions, frequencies, angles, or their cosines and sines are rounded to 16 bits."""
    rotation = Rotation.of(case)
    if rotation is None:
        return
    positions = case.positions.astype(np.float32)[:, None]
    frequencies = rotation.frequencies[None, :]
    for dtype in ("bf16", "f16"):
        for which in itertools.product((False, True), repeat=4):
            if not any(which):
                continue
            place = round_to(positions, dtype) if which[0] else positions
            rate = round_to(frequencies, dtype) if which[1] else frequencies
            angle = place * rate
            angle = round_to(angle, dtype) if which[2] else angle
            cosine, sine = np.cos(angle.astype(np.float64)), np.sin(angle.astype(np.float64))
            if which[3]:
                cosine = round_to(cosine.astype(np.float32), dtype).astype(np.float64)
                sine = round_to(sine.astype(np.float32), dtype).astype(np.float64)
            names = [
                name
                for name, on in zip(
                    ("positions", "frequencies", "angles", "cosines and sines"), which, strict=True
                )
                if on
            ]
            yield Candidate(
                "rope-precision",
                f"{', '.join(names)} of RoPE are rounded to {dtype}",
                rotation.turned_by(cosine, sine),
                len(names),
                {"dtype": dtype, "rounded": names},
            )


def position_shift(case: Case) -> Iterator[Candidate]:
    """Positions are off by a constant, by one for each sequence, or are others altogether."""
    rotation = Rotation.of(case)
    if rotation is None:
        return
    pulled = rotation.overlap * np.exp(-1j * rotation.angles)
    whole = _best_shift(pulled.sum(axis=0), rotation.frequencies)
    if whole:
        yield Candidate(
            "position-shift",
            f"positions are shifted by {whole:+d}",
            rotation.turned(rotation.angles_at(case.positions + whole, rotation.frequencies)),
            1,
            {"shift": whole},
        )
    sequence = np.searchsorted(case.batch.boundaries, case.tokens, side="right") - 1
    shifts = np.zeros(case.tokens.size, np.int64)
    for s in np.unique(sequence):
        shifts[sequence == s] = _best_shift(pulled[sequence == s].sum(axis=0), rotation.frequencies)
    if shifts.any():
        yield Candidate(
            "position-shift",
            "positions are shifted by a number of its own in each sequence",
            rotation.turned(rotation.angles_at(case.positions + shifts, rotation.frequencies)),
            2,
            {"shifts": {int(s): int(shifts[sequence == s][0]) for s in np.unique(sequence)}},
        )
    places = _best_positions(rotation)
    if places is not None and not np.array_equal(places, case.positions):
        moved = places - case.positions
        first = int(np.flatnonzero(moved)[0])
        yield Candidate(
            "position-shift",
            f"from position {int(case.positions[first])} on tokens are turned as at other positions, "
            f"{int(places[first])} first",
            rotation.turned(rotation.angles_at(places, rotation.frequencies)),
            5,
            {
                "first_position": int(case.positions[first]),
                "taken_position": int(places[first]),
                "shifts": sorted({int(value) for value in moved})[:16],
            },
        )


def _best_shift(pulled: C128, frequencies: F32) -> int:
    shifts = np.arange(-_FARTHEST_SHIFT, _FARTHEST_SHIFT + 1)
    turns = np.exp(-1j * shifts[:, None] * frequencies.astype(np.float64)[None, :])
    return int(shifts[int(np.argmax(np.sum((turns * pulled).real, axis=1)))])


def _best_positions(rotation: Rotation) -> I64 | None:
    count = int(rotation.case.positions.max()) + 65
    if count * rotation.half * rotation.case.tokens.size > _MOST_PLACES:
        return None
    places = np.arange(count)
    turns = np.exp(-1j * places[:, None] * rotation.frequencies.astype(np.float64)[None, :])
    scores = np.stack([np.sum((turns * row).real, axis=1) for row in rotation.overlap])
    return np.asarray(np.argmax(scores, axis=1), np.int64)


def other_turns(case: Case) -> Iterator[Candidate]:
    """No turn, or one in the other direction."""
    rotation = Rotation.of(case)
    if rotation is None:
        return
    none = "q and k are not turned: RoPE is left out"
    yield Candidate("rope-missing", none, rotation.turned(0 * rotation.angles), 0, {})
    yield Candidate(
        "cross-match",
        "pairs are turned in the other direction",
        rotation.turned(-rotation.angles),
        0,
        {"direction": -1},
    )


def head_norm(case: Case) -> Iterator[Candidate]:
    """Faults of the norm of each head, where the model has one."""
    rotation = Rotation.of(case)
    if rotation is None or not case.config.qk_norm:
        return
    site, dim = case.op.tap[0], case.config.head_dim
    back = rotation.pairs(case.target) * np.exp(-1j * rotation.angles)[:, None, :]
    turned = np.concatenate([back.real, back.imag], axis=2) / rotation.scale
    target = np.concatenate([turned, rotation.rest(case.target)], axis=2).reshape(-1, dim)
    found = norms.Norm(
        case,
        f"model.layers.{case.op.layer}.self_attn.{site}_norm.weight",
        case.part("qkv_bias", site).astype(np.float64).reshape(-1, dim),
        lambda y: rotation.turned(rotation.angles, x=y.reshape(rotation.x.shape)),
        target,
        case.config.rms_norm_eps,
    )
    for kind in (norms.offsets, norms.epsilons, norms.missing):
        yield from kind(found)


def dropped_bias(case: Case) -> Iterator[Candidate]:
    """The bias is left out, where the op before was not recorded."""
    rotation = Rotation.of(case)
    name = f"model.layers.{case.op.layer}.self_attn.{case.op.tap[0]}_proj.bias"
    if rotation is None or "qkv_bias" not in case.op.recomputed or not case.has_tensor(name):
        return
    if case.config.qk_norm or not case.config.attention_bias:
        return
    for times, what in ((1.0, "the bias is not added"), (-1.0, "the bias is added twice")):
        x = rotation.x - times * case.vector(name)
        yield Candidate("bias-dropped", what, rotation.turned(rotation.angles, x=x), 0, {"tensor": name})


HYPOTHESES = (
    pairing,
    share,
    other_turns,
    factors,
    theta,
    position_shift,
    precision,
    head_norm,
    dropped_bias,
)
