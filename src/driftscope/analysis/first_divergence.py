"""Which ops of a replayed trace are off by more than noise, and which of them comes first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from driftscope.analysis.floors import COMPONENTS, Floors
from driftscope.forward.architecture import op_order
from driftscope.forward.arithmetic import Arithmetic

if TYPE_CHECKING:
    import polars as pl

ALPHA = 0.001
"""Probability that a clean trace is flagged anywhere."""

NON_FINITE = "non_finite"

_FEW_TOKENS = 4


@dataclass(frozen=True)
class Flag:
    """An op of one prompt whose error its floor does not explain.

    Attributes:
        path: the trace.
        prompt: its prompt.
        layer: its layer, -1 where it has none.
        tap: the op, by its output.
        part: ``q``, ``k`` or ``v`` where a tap is tested in parts, else empty.
        component: ``engine`` or ``model``.
        statistic: the one that stands out most: ``score``, ``score_token``, ``score_channel``, or
            ``non_finite`` where the trace holds an infinity or a NaN that the replay does not.
        p_value: probability that a clean trace has such a flag at any of the ops that were tested (Holm).
        tail: probability for this op and statistic alone.
        score: decimal logarithm of the measured over the predicted energy, of the statistic; None where
            there is none.
        nmse: measured error energy over the energy of the op's output, of the whole prompt.
        predicted_nmse: the same, as predicted.
        token_count: tokens of the prompt.
        position: the worst token, None where no error was measured.
        channel: the worst channel, of ragged taps the worst head; likewise.
    """

    path: str
    prompt: str
    layer: int
    tap: str
    part: str
    component: str
    statistic: str
    p_value: float
    tail: float
    score: float | None
    nmse: float | None
    predicted_nmse: float | None
    token_count: int
    position: int | None
    channel: int | None

    @property
    def place(self) -> tuple[int, str, str]:
        """Layer, tap and part."""
        return self.layer, self.tap, self.part

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


@dataclass(frozen=True)
class FirstDivergence:
    """The first op, in topological order, that is flagged.

    Attributes:
        flag: its clearest flag.
        flags: all flags of the op, over prompts and components.
        prompts: prompts in which the op is flagged, and those in which it was tested and is clean.
        positions: prompt to its worst token.
        one_position: the position that all flagged prompts share, or None.
        note: ``row-count`` where the op fails at a few token counts and holds for both fewer and more,
            ``long-prompts`` where it fails from some length on, else None.
    """

    flag: Flag
    flags: tuple[Flag, ...]
    prompts: tuple[tuple[str, ...], tuple[str, ...]]
    positions: Mapping[str, int]
    one_position: int | None
    note: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            **self.flag.to_dict(),
            "prompts_flagged": list(self.prompts[0]),
            "prompts_clean": list(self.prompts[1]),
            "positions": dict(self.positions),
            "one_position": self.one_position,
            "note": self.note,
        }


def flags(
    rows: pl.DataFrame | Iterable[Mapping[str, Any]],
    floors: Floors,
    alpha: float = ALPHA,
    *,
    arithmetic: Arithmetic | None = None,
) -> list[Flag]:
    """Find the ops whose error the floors do not explain.

    Every row is tested in three statistics, in all parts, prompts and both components, and all of these tests
    are corrected for together (S. Holm, Scandinavian Journal of Statistics 6, 1979), which holds whatever
    depends on what: a clean trace is flagged anywhere with a probability of `alpha` at most. What is not
    finite where the replay is finite is flagged as it is.

    An op is tested on the inputs that the trace recorded, so each flag stands by itself: an op after a
    flagged one is not flagged for what it inherits.

    Args:
        rows: rows of the ``replay`` table, of one trace. Those of the ``arithmetic`` component are not
            judged.
        floors: the floors.
        alpha: error rate of the whole list.
        arithmetic: what the trace was computed in; None judges an op by the arithmetic that allows most.

    Returns:
        One flag a row that is flagged, in topological order, then by tail.
    """
    judged = [row for row in _each(rows) if row["component"] in COMPONENTS]
    tests: list[tuple[float, int, str]] = []
    for index, row in enumerate(judged):
        for statistic, tail in floors.tail_probabilities(row, arithmetic).items():
            tests.append((tail, index, statistic))
        if row["non_finite"]:
            tests.append((0.0, index, NON_FINITE))
    tests.sort(key=lambda test: test[0])
    found: dict[int, Flag] = {}
    largest = 0.0
    for rank, (tail, index, statistic) in enumerate(tests):
        largest = max(largest, min(1.0, tail * (len(tests) - rank)))
        if largest > alpha:
            break
        if index not in found or statistic == NON_FINITE:
            found[index] = flag_of(judged[index], statistic, largest, tail)
    return sorted(found.values(), key=_by_place)


def first_divergence(
    flagged: Sequence[Flag], rows: pl.DataFrame | Iterable[Mapping[str, Any]] = ()
) -> FirstDivergence | None:
    """The earliest flagged op over all prompts; None where nothing is flagged.

    Ties between components and prompts of that op go to the smallest tail, then to the largest score.

    Args:
        flagged: from `flags`.
        rows: the rows that were tested, to tell the prompts in which the op is clean.
    """
    if not flagged:
        return None
    first = min(flagged, key=_by_place)
    here = tuple(sorted((flag for flag in flagged if flag.place == first.place), key=_by_place))
    token_counts = {
        row["prompt"]: int(row["token_count"])
        for row in _each(rows)
        if (row["layer"], row["tap"], row["part"]) == first.place and row["component"] == first.component
    }
    wrong = {flag.prompt: flag.token_count for flag in here}
    clean = {prompt: count for prompt, count in token_counts.items() if prompt not in wrong}
    positions = {flag.prompt: flag.position for flag in reversed(here) if flag.position is not None}
    shared = set(positions.values())
    return FirstDivergence(
        flag=first,
        flags=here,
        prompts=(tuple(sorted(wrong)), tuple(sorted(clean))),
        positions=dict(sorted(positions.items())),
        one_position=shared.pop() if len(shared) == 1 else None,
        note=_note(set(wrong.values()), set(clean.values())),
    )


def _note(wrong: set[int], clean: set[int]) -> str | None:
    """What the numbers of tokens of flagged and clean prompts tell."""
    if not wrong or not clean or wrong & clean:
        return None
    if max(wrong) < _FEW_TOKENS and max(clean) > max(wrong):
        return "row-count"
    if min(wrong) > max(clean):
        return "long-prompts"
    return "row-count" if max(clean) > max(wrong) and min(clean) < min(wrong) else None


def _by_place(flag: Flag) -> tuple[Any, ...]:
    score = float("inf") if flag.score is None else flag.score
    return (*op_order(*flag.place), flag.tail, -score, flag.prompt, flag.component)


def flag_of(row: Mapping[str, Any], statistic: str, p_value: float, tail: float) -> Flag:
    """The flag of a row of the ``replay`` table; `statistic` is the column of its score, or `NON_FINITE`."""
    signal = row["signal_energy"]
    predicted = row["predicted_energy"]
    return Flag(
        path=row["path"],
        prompt=row["prompt"],
        layer=row["layer"],
        tap=row["tap"],
        part=row["part"],
        component=row["component"],
        statistic=statistic,
        p_value=p_value,
        tail=tail,
        score=row.get(statistic) if statistic != NON_FINITE else None,
        nmse=row["nmse"],
        predicted_nmse=predicted / signal if signal and predicted is not None else None,
        token_count=row["token_count"],
        position=_index(row["worst_position"]),
        channel=_index(row["worst_channel"]),
    )


def _index(value: int | None) -> int | None:
    """A worst token or channel; the table has -1 where there is none."""
    return None if value is None or value < 0 else value


def _each(rows: Any) -> Iterable[Mapping[str, Any]]:
    return rows.iter_rows(named=True) if hasattr(rows, "iter_rows") else rows
