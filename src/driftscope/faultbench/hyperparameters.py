"""Faults of the configuration: the right tensors, read with other hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from driftscope.artifacts.model import Artifact
from driftscope.faultbench.edited import with_config
from driftscope.faultbench.injection import Injection, Site, Spot, from_the_start
from driftscope.faultbench.weights import without_factors
from driftscope.forward.rotary import turns_locally


def multiplied(field: str, factor: float) -> Callable[[Site], Artifact]:
    """A hyperparameter times a factor."""
    return lambda site: with_config(site.artifact, **{field: factor * getattr(site.config, field)})


def window_moved(by: int) -> Callable[[Site], Artifact]:
    """The sliding window so many tokens wider."""
    return lambda site: with_config(site.artifact, sliding_window=(site.config.sliding_window or 0) + by)


def changed(**changes: Any) -> Callable[[Site], Artifact]:
    """Hyperparameters replaced."""
    return lambda site: with_config(site.artifact, **changes)


def no_window(site: Site) -> str | None:
    """Why a fault of the window cannot be injected."""
    return None if site.config.sliding_window else "the model has no sliding window"


def no_scaling(site: Site) -> str | None:
    """Why frequency factors cannot be dropped."""
    return None if site.config.rope_scaling else "the model's rotary frequencies are not scaled"


def no_window_of_its_own(site: Site) -> str | None:
    """Why the window cannot be taken off alone."""
    if site.config.local_rope_theta is not None:
        return "the layers with a window have a theta of their own"
    return no_window(site)


def first_turned(site: Site) -> Spot:
    """The turn of q in the first layer that turns by the model's own theta and scaling."""
    layers = range(site.config.num_layers)
    return Spot(next(layer for layer in layers if not turns_locally(site.config, layer)), "q_post_rope")


def first_with_a_window(site: Site) -> Spot:
    """The softmax of the first layer with a window."""
    layers = range(site.config.num_layers)
    return Spot(next((layer for layer in layers if site.config.window_of(layer)), 0), "attn_softmax")


_C = "configuration"

INJECTIONS = (
    Injection(
        "F11",
        "eps-times-ten",
        _C,
        "rms_norm_eps ten times too large",
        from_the_start("attn_norm"),
        ("norm-eps",),
        artifact=multiplied("rms_norm_eps", 10.0),
    ),
    Injection(
        "F14",
        "factors-dropped",
        _C,
        "rotary frequencies without their divisors",
        first_turned,
        ("rope-factors",),
        unless=no_scaling,
        artifact=without_factors,
    ),
    Injection(
        "F16",
        "theta-times-ten",
        _C,
        "rope_theta ten times too large",
        first_turned,
        ("rope-theta",),
        artifact=multiplied("rope_theta", 10.0),
    ),
    Injection(
        "F19",
        "window-plus-one",
        _C,
        "a sliding window one token too wide",
        first_with_a_window,
        ("window",),
        unless=no_window,
        artifact=window_moved(1),
    ),
    Injection(
        "F19",
        "window-less-one",
        _C,
        "a sliding window one token too narrow",
        first_with_a_window,
        ("window",),
        unless=no_window,
        artifact=window_moved(-1),
    ),
    Injection(
        "F19",
        "window-ignored",
        _C,
        "no sliding window",
        first_with_a_window,
        ("window",),
        unless=no_window_of_its_own,
        artifact=changed(sliding_window=None),
    ),
)
"""What can be wrong with the hyperparameters."""
