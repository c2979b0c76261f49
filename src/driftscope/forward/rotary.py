"""The rotary frequencies of a model, with the scalings that long-context models use."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from decimal import Context, Decimal
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.model import ModelConfig
from driftscope.artifacts.yarn import attention_factor, logarithm
from driftscope.errors import InputError
from driftscope.forward.batch import TokenBatch

# Powers to 40 digits, so that they are the same on every host.
_EXACT = Context(prec=40)


def rope_frequencies(
    config: ModelConfig,
    factors: NDArray[np.float32] | None = None,
    *,
    local: bool = False,
    long: bool = False,
) -> NDArray[np.float32]:
    """Radians a position of each pair of channels: ``theta^(-2i / rotary_dim)``, scaled.

    Every step is rounded to float32, as transformers does (``modeling_rope_utils.py``): the exponent,
    the power, its reciprocal, the scaling. `exact_frequencies` is the same without the roundings.

    Args:
        config: gives theta, the channels that are turned and the scaling (none, ``linear``, ``llama3``,
            ``yarn``, ``longrope``, ``stored_factors``).
        factors: ``float32[rotary_dim / 2]`` divisors from GGUF's ``rope_freqs.weight``, which hold the
            ``llama3`` scaling already computed and then stand in for the one in `config`; or None.
        local: those of the layers with a window, where they have a theta of their own: they are not scaled.
        long: of ``longrope`` the ones for sequences that are longer than those of the training.

    Returns:
        ``float32[rotary_dim / 2]``.

    Raises:
        InputError: a scaling that is not implemented, or factors of another length.
    """
    found: NDArray[np.float32] = _frequencies(config, factors, np.float32, local, long)
    return found


def exact_frequencies(
    config: ModelConfig,
    factors: NDArray[np.float32] | None = None,
    *,
    local: bool = False,
    long: bool = False,
) -> NDArray[np.float64]:
    """`rope_frequencies` in float64, ``float64[rotary_dim / 2]``."""
    found: NDArray[np.float64] = _frequencies(config, factors, np.float64, local, long)
    return found


def rotary_dim(config: ModelConfig) -> int:
    """Channels of a head that RoPE turns."""
    return config.rotary_dim or config.head_dim


def turns_locally(config: ModelConfig, layer: int) -> bool:
    """Whether a layer turns by the theta of the layers with a window."""
    return config.local_rope_theta is not None and config.window_of(layer) is not None


def _frequencies(
    config: ModelConfig, factors: NDArray[np.float32] | None, real: Any, local: bool, long: bool
) -> Any:
    theta = config.local_rope_theta if local else config.rope_theta
    assert theta is not None
    half = rotary_dim(config) // 2
    exponents = (np.arange(half, dtype=real) * real(2)) / real(rotary_dim(config))
    exact = [_power(float(theta), float(exponent)) for exponent in exponents]
    powers = np.array(exact, np.float64).astype(real)
    frequencies = real(1) / powers
    if local:
        return frequencies
    if factors is not None:
        if factors.shape != (half,):
            raise InputError(
                f"rope_freqs.weight: {factors.size} values, expected {half} (half of the channels that turn)"
            )
        frequencies = frequencies / factors
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    if kind in ("llama3", "stored_factors") and factors is not None:
        return frequencies
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / real(scaling["factor"])
    if kind == "llama3":
        return _llama3(
            frequencies,
            float(scaling["factor"]),
            float(scaling["low_freq_factor"]),
            float(scaling["high_freq_factor"]),
            float(scaling["original_max_position_embeddings"]),
        )
    if kind == "yarn":
        return _yarn(powers, config)
    if kind == "longrope":
        return _longrope(powers, scaling, "long_factor" if long else "short_factor")
    if kind == "stored_factors":
        raise InputError(
            "tensor rope_freqs.weight is missing, which the RoPE scaling of the model is stored in"
        )
    raise InputError(
        f"RoPE scaling {kind!r} has no forward pass; expected default, linear, llama3, longrope or yarn"
    )


@lru_cache(maxsize=4096)
def _power(base: float, exponent: float) -> float:
    """To 40 digits, rounded once: slow, and the same for each pass of a model."""
    return float(_EXACT.power(Decimal(base), Decimal(exponent)))


def rope_scale(config: ModelConfig, *, local: bool = False) -> float:
    """Factor of every cosine and sine: the attention factor of YaRN and of LongRoPE, else 1.

    Args:
        config: gives the scaling.
        local: that of the layers with a window, where they have a theta of their own: 1.
    """
    scaling = config.rope_scaling or {}
    stretched = not local and scaling.get("rope_type") in ("yarn", "longrope")
    return attention_factor(scaling) if stretched else 1.0


def longest_sequence(config: ModelConfig) -> int:
    """Positions that the model is made for; YaRN stretches those that it was trained on."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") != "yarn":
        return config.context_length
    return max(config.context_length, int(float(scaling["factor"]) * _trained_length(config)))


def is_long(config: ModelConfig, tokens: int) -> bool:
    """Whether a sequence of so many tokens turns by the long factors of ``longrope``, all of its tokens.

    transformers chooses by the sequence; llama.cpp by the context that it was given room for.
    """
    longrope = (config.rope_scaling or {}).get("rope_type") == "longrope"
    return longrope and tokens > _trained_length(config)


class Rotations:
    """The angles that the layers of a model turn by: which frequencies hold for a layer and a token.

    Attributes:
        config: the model's hyperparameters.
        sets: whether of a layer that turns locally, to ``float[sets, rotary_dim / 2]``; a second set is that
            of long sequences.
    """

    def __init__(
        self, config: ModelConfig, factors: NDArray[np.float32] | None = None, *, exact: bool = False
    ) -> None:
        """Compute the frequencies.

        Args:
            config: the model's hyperparameters.
            factors: as in `rope_frequencies`.
            exact: in float64 instead of float32.

        Raises:
            InputError: as `rope_frequencies`.
        """
        make = exact_frequencies if exact else rope_frequencies
        self.config = config
        longrope = (config.rope_scaling or {}).get("rope_type") == "longrope"
        each = [make(config, factors, long=long) for long in ((False, True) if longrope else (False,))]
        self.sets: dict[bool, NDArray[Any]] = {False: np.stack(each)}
        if config.local_rope_theta is not None:
            self.sets[True] = make(config, local=True)[None]
        self._kept: dict[bool, tuple[TokenBatch, tuple[Any, Any, NDArray[np.int64]]]] = {}

    def times(self, factor: Any) -> Rotations:
        """The same with all frequencies multiplied."""
        found = copy.copy(self)
        found.sets = {local: frequencies * factor for local, frequencies in self.sets.items()}
        found._kept = {}
        return found

    def scale(self, layer: int) -> float:
        """`rope_scale` of a layer."""
        return rope_scale(self.config, local=turns_locally(self.config, layer))

    def set_of(self, layer: int, batch: TokenBatch) -> NDArray[np.int64]:
        """``int64[n_tokens]``: which set of frequencies each token turns by."""
        if turns_locally(self.config, layer):
            return np.zeros(batch.n_tokens, dtype=np.int64)
        long = [int(is_long(self.config, int(total))) for total in batch.totals]
        return np.repeat(np.array(long, dtype=np.int64), np.diff(batch.boundaries))

    def of_tokens(self, layer: int, batch: TokenBatch) -> NDArray[Any]:
        """Frequencies of each token, ``float[n_tokens, rotary_dim / 2]``."""
        found: NDArray[Any] = self.sets[turns_locally(self.config, layer)][self.set_of(layer, batch)]
        return found

    def tables(
        self,
        layer: int,
        batch: TokenBatch,
        make: Callable[..., tuple[Any, Any]],
        positions: NDArray[np.int64] | None = None,
    ) -> tuple[Any, Any, NDArray[np.int64]]:
        """Cosines and sines of a layer, and which row of them is each token's.

        They are kept for the next layer that turns alike.

        Args:
            layer: its number.
            batch: the tokens.
            make: ``rope_tables`` of `driftscope.kernels.forward` or of `driftscope.kernels.float64`.
            positions: ``int64[n_tokens]``, others than the batch's.

        Returns:
            Two ``float[rows, rotary_dim / 2]`` and ``int64[n_tokens]``.
        """
        local = turns_locally(self.config, layer)
        kept = self._kept.get(local)
        if positions is None and kept is not None and kept[0] is batch:
            return kept[1]
        chosen = self.set_of(layer, batch)
        sets = self.sets[local][: 1 + int(chosen.max())]
        length = batch.longest if positions is None else int(positions.max()) + 1
        # Side by side in one table, so that a position's rows of all sets follow each other.
        cosine, sine = make(sets.reshape(-1), length, scale=self.scale(layer))
        rows = (batch.positions if positions is None else positions) * len(sets) + chosen
        found = (cosine.reshape(-1, sets.shape[1]), sine.reshape(-1, sets.shape[1]), rows)
        if positions is None:
            self._kept[local] = (batch, found)
        return found


def _llama3(frequencies: Any, factor: float, low: float, high: float, original_length: float) -> Any:
    """Llama 3.1: leave short wavelengths, divide long ones by `factor`, interpolate between."""
    wavelengths = 2.0 * math.pi / frequencies.astype(np.float64)
    smooth = (original_length / wavelengths - low) / (high - low)
    wide = frequencies.astype(np.float64)
    between = (1.0 - smooth) * wide / factor + smooth * wide
    scaled = np.where(wavelengths > original_length / low, wide / factor, between)
    return np.where(wavelengths < original_length / high, wide, scaled).astype(frequencies.dtype)


def _yarn(powers: Any, config: ModelConfig) -> Any:
    """YaRN (Peng et al. 2023): keep what turns often in the trained context, divide what turns seldom.

    `powers` are the reciprocals of the frequencies. Between the pairs that turn ``beta_fast`` and
    ``beta_slow`` times, the two are mixed along a line; these pairs are whole numbers unless ``truncate`` is
    false. In the type of `powers`, of transformers float32.
    """
    scaling = config.rope_scaling or {}
    if scaling.get("extrapolation_factor", 1) != 1:
        raise InputError(
            f"extrapolation_factor of the RoPE scaling is {scaling['extrapolation_factor']}; expected 1"
        )
    real = powers.dtype.type
    one = real(1)
    kept, divided = one / powers, one / (real(scaling["factor"]) * powers)

    def pair(turns: float) -> float:
        log = logarithm(_trained_length(config) / (turns * 2 * math.pi))
        return rotary_dim(config) * log / (2 * logarithm(float(config.rope_theta)))

    try:
        low, high = pair(float(scaling.get("beta_fast") or 32)), pair(float(scaling.get("beta_slow") or 1))
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
    except (ArithmeticError, ValueError) as error:
        raise InputError("RoPE scaling 'yarn': theta, beta_fast and beta_slow give no range") from error
    low, high = max(low, 0), min(high, rotary_dim(config) - 1)
    if low == high:
        high += 0.001
    pairs = np.arange(len(powers), dtype=real)
    share = one - np.clip((pairs - real(low)) / real(high - low), 0, 1).astype(real)
    return divided * (one - share) + kept * share


def _longrope(powers: Any, scaling: Mapping[str, Any], which: str) -> Any:
    """LongRoPE (Ding et al. 2024): each pair's frequency has a divisor that was searched for."""
    if which not in scaling:
        raise InputError(f"RoPE scaling 'longrope' lacks {which}")
    factors = np.array(scaling[which], powers.dtype)
    if factors.shape != powers.shape:
        raise InputError(
            f"{which} of the RoPE scaling has {factors.size} values; expected {powers.size} "
            "(half of the channels that turn)"
        )
    return powers.dtype.type(1) / (factors * powers)


def _trained_length(config: ModelConfig) -> int:
    scaling = config.rope_scaling or {}
    return int(scaling.get("original_max_position_embeddings") or config.context_length)
