"""A statistic that knows what it is over, and refuses to be divided by one that is over something else.

The published headline (18.23x) divided a std over all tokens of one side by a std over the last token of
the other. With these types that ratio cannot be formed.
"""

from __future__ import annotations

from dataclasses import dataclass

from driftscope.errors import InadmissibleError

_POPULATION = {
    "name": "statistic",
    "tap": "tap",
    "token_ids_sha256": "token ids",
    "scope": "token scope",
    "position": "position",
    "token_count": "tokens",
    "count": "count",
    "capture_point": "capture point",
    "path_kind": "path kind",
}


@dataclass(frozen=True)
class Statistic:
    """One figure about an op's output, with its population.

    Attributes:
        value: the figure, or None where it is undefined.
        name: what it is: ``std``, ``mean``, ``rms``, ...
        tap: op output, e.g. ``layers.3.ffn_swiglu``.
        scope: token set: ``all``, ``last``, ``all-but-first`` or ``token``.
        position: token position for the scope ``token``, else -1.
        token_count: tokens of the scope.
        count: values: tokens times channels.
        capture_point: what exactly was captured.
        path: what computed it, e.g. ``candidate.int8-dot``; two paths may be compared.
        token_ids_sha256: digest of the prompt's token ids.
        path_kind: ``propagated`` where the op's inputs are the path's own, ``local`` where they were
            recorded from another path.
    """

    value: float | None
    name: str
    tap: str
    scope: str
    position: int
    token_count: int
    count: int
    capture_point: str
    path: str
    token_ids_sha256: str
    path_kind: str = "propagated"

    def why_not(self, other: Statistic) -> str | None:
        """Why the two may not be compared, in one line, or None where they may."""
        unlike = [
            f"{words} {getattr(self, field)!r} against {getattr(other, field)!r}"
            for field, words in _POPULATION.items()
            if getattr(self, field) != getattr(other, field)
        ]
        if unlike:
            return f"{self.path} and {other.path} are not over the same population: {'; '.join(unlike)}"
        return None

    def ratio(self, other: Statistic) -> float:
        """This value over the other one.

        Raises:
            InadmissibleError: the populations differ, or the ratio is undefined.
        """
        if reason := self.why_not(other):
            raise InadmissibleError(reason)
        if self.value is None or not other.value:
            raise InadmissibleError(
                f"{self.name} of {self.tap}: {self.value} of {self.path} over {other.value} of {other.path} "
                "is undefined"
            )
        return self.value / other.value
