"""Faults of the configuration: the right tensors, read with other hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from driftscope.artifacts.model import Artifact
from driftscope.faultbench.edited import with_config
from driftscope.faultbench.injection import Injection, Site, from_the_start
from driftscope.faultbench.weights import without_factors


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
        from_the_start("q_post_rope"),
        ("rope-factors",),
        unless=no_scaling,
        artifact=without_factors,
    ),
    Injection(
        "F16",
        "theta-times-ten",
        _C,
        "rope_theta ten times too large",
        from_the_start("q_post_rope"),
        ("rope-theta",),
        artifact=multiplied("rope_theta", 10.0),
    ),
    Injection(
        "F19",
        "window-plus-one",
        _C,
        "a sliding window one token too wide",
        from_the_start("attn_softmax"),
        ("window",),
        unless=no_window,
        artifact=window_moved(1),
    ),
    Injection(
        "F19",
        "window-less-one",
        _C,
        "a sliding window one token too narrow",
        from_the_start("attn_softmax"),
        ("window",),
        unless=no_window,
        artifact=window_moved(-1),
    ),
    Injection(
        "F19",
        "window-ignored",
        _C,
        "no sliding window",
        from_the_start("attn_softmax"),
        ("window",),
        unless=no_window,
        artifact=changed(sliding_window=None),
    ),
)
"""What can be wrong with the hyperparameters."""
