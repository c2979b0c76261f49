"""Which weights and which arithmetic each matmul of a forward pass uses."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from driftscope.errors import InputError

WHOLE_MODEL = -1
"""The layer number of what lies outside of the layers: embedding, final norm, LM head."""

LAYER_SITES = ("q", "k", "v", "o", "gate", "up", "down")
"""Matmul sites of a layer, in the order in which they run. A bias goes with its site."""

MATMUL_SITES = (*LAYER_SITES, "lm_head")
SITES = ("embed", "norms", *MATMUL_SITES)
"""Everything that reads weights: the matmuls, the embedding rows, and the RMSNorms (QK norm included)."""

PATHS = ("f32", "int8-dot")
"""``f32``: dequantize the weight, multiply in float32. ``int8-dot``: quantize the activation, integer dot."""

KV_TYPES = ("f32", "f16")


@dataclass(frozen=True)
class Choice:
    """The weights and the arithmetic of one site.

    Attributes:
        artifact: role of the artifact whose weights are read, e.g. ``teacher`` or ``candidate``.
        path: ``f32`` or ``int8-dot``.
        activation: format that the activation is quantized to; None for the path's own (on ``f32`` not at
            all, on ``int8-dot`` the one that ggml pairs with the weight's format). On ``f32`` the activation
            is rounded to the format and multiplied in float32.
    """

    artifact: str
    path: str = "f32"
    activation: str | None = None

    def __post_init__(self) -> None:
        if self.path not in PATHS:
            raise InputError(f"policy: path {self.path!r} is unknown; expected one of {', '.join(PATHS)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for hashing and for evidence."""
        return {"artifact": self.artifact, "path": self.path, "activation": self.activation}


@dataclass(frozen=True)
class Override:
    """Sites at which another choice holds.

    Attributes:
        choice: what holds there.
        layers: ascending layer numbers (`WHOLE_MODEL` for the embedding, the final norm and the head), or
            None for everywhere.
        sites: in the order of `SITES`, or None for all.
    """

    choice: Choice
    layers: tuple[int, ...] | None = None
    sites: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        if self.sites is not None:
            for site in self.sites:
                _check_site(site)
            object.__setattr__(self, "sites", tuple(site for site in SITES if site in self.sites))

    def covers(self, layer: int, site: str) -> bool:
        """Whether the choice holds at a site."""
        return (self.layers is None or layer in self.layers) and (self.sites is None or site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for hashing and for evidence."""
        return {
            "layers": None if self.layers is None else list(self.layers),
            "sites": None if self.sites is None else list(self.sites),
            **self.choice.to_dict(),
        }


@dataclass(frozen=True)
class Policy:
    """A choice for every site: a base, and overrides of which the last that covers a site holds.

    Attributes:
        base: the choice where no override holds; its artifact's hyperparameters govern the pass.
        overrides: in rising priority.
        kv_type: ``f32``, or ``f16`` for the roundings of a float16 key-value cache
            (`driftscope.kernels.forward.attention`).
    """

    base: Choice
    overrides: tuple[Override, ...] = field(default=())
    kv_type: str = "f32"

    def __post_init__(self) -> None:
        if self.kv_type not in KV_TYPES:
            raise InputError(
                f"policy: kv_type {self.kv_type!r} is unknown; expected one of {', '.join(KV_TYPES)}"
            )

    @classmethod
    def uniform(cls, artifact: str, path: str = "f32", *, activation: str | None = None) -> Policy:
        """The same choice everywhere."""
        return cls(Choice(artifact, path, activation))

    def override(
        self,
        choice: Choice,
        *,
        layers: Collection[int] | None = None,
        sites: Collection[str] | None = None,
    ) -> Policy:
        """Return this policy with another choice at some sites; arguments as in `Override`."""
        added = Override(
            choice,
            None if layers is None else tuple(layers),
            None if sites is None else tuple(sites),
        )
        return replace(self, overrides=(*self.overrides, added))

    def choice(self, layer: int, site: str) -> Choice:
        """The choice that holds at a site.

        Args:
            layer: layer number, or `WHOLE_MODEL`.
            site: one of `SITES`.
        """
        _check_site(site)
        for override in reversed(self.overrides):
            if override.covers(layer, site):
                return override.choice
        return self.base

    @property
    def artifacts(self) -> tuple[str, ...]:
        """Roles that the policy names, sorted."""
        return tuple(sorted({self.base.artifact, *(item.choice.artifact for item in self.overrides)}))

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the same for equal policies, so that their JSON can be hashed."""
        return {
            **self.base.to_dict(),
            "overrides": [override.to_dict() for override in self.overrides],
            "kv_type": self.kv_type,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Policy:
        """The inverse of `to_dict`.

        Raises:
            InputError: a key is unknown, missing, or has a nonsensical value.
        """
        try:
            _refuse_unknown(document, {"artifact", "path", "activation", "overrides", "kv_type"})
            overrides = []
            for item in document.get("overrides", ()):
                _refuse_unknown(item, {"artifact", "path", "activation", "layers", "sites"})
                layers, sites = item.get("layers"), item.get("sites")
                overrides.append(
                    Override(
                        _choice_of(item),
                        None if layers is None else tuple(int(layer) for layer in layers),
                        None if sites is None else tuple(str(site) for site in sites),
                    )
                )
            return cls(_choice_of(document), tuple(overrides), str(document.get("kv_type", "f32")))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"policy: malformed ({type(error).__name__}: {error})") from error


def _choice_of(document: Mapping[str, Any]) -> Choice:
    activation = document.get("activation")
    return Choice(
        str(document["artifact"]),
        str(document.get("path", "f32")),
        None if activation is None else str(activation),
    )


def _refuse_unknown(document: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(document) - known)
    if unknown:
        raise InputError(f"policy: unknown key {unknown[0]!r}; expected one of {', '.join(sorted(known))}")


def _check_site(site: str) -> None:
    if site not in SITES:
        raise InputError(f"policy: site {site!r} is unknown; expected one of {', '.join(SITES)}")
