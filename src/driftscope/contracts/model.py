"""What a contract file may say: one immutable model a kind of entry, unknown keys refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from driftscope.evidence.digest import sha256_json

Identifier = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
Version = Annotated[str, Field(pattern=r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sentence = Annotated[str, Field(min_length=1)]
MetricPath = Annotated[str, Field(min_length=1)]
Threshold = float | int | str | bool

Verdict = Literal[
    "supported", "falsified", "regime-dependent", "inconclusive", "vacuous", "inadmissible", "not-run"
]
Comparator = Literal["<", "<=", ">", ">=", "==", "!=", "within", "refuses", "empty"]
Status = Literal["proposed", "partial", "blocked", "active", "discharged", "withdrawn"]


class Entry(BaseModel):
    """Base of everything in a contract: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Clause(Entry):
    """One comparison of a measured metric with a threshold or a band; it computes nothing.

    A metric with an interval (`{value, low, high}`, or a number with siblings `<name>_low` and
    `<name>_high`) holds if the whole interval meets the comparison, fails if none of it does, and is
    open in between.
    """

    id: Identifier
    metric: MetricPath = Field(
        description="dotted path; `*` stands for every member, `[key=value]` selects from a list"
    )
    scope: Literal["regime", "document"] = Field(
        "regime", description="regime: the path starts at each regime; document: at the measurement"
    )
    comparator: Comparator = Field(
        description="within needs a band; refuses (the measurement met a refusal) and empty need nothing"
    )
    threshold: Threshold | None = None
    threshold_metric: MetricPath | None = Field(
        None, description="compare with another metric of the same scope instead of a constant"
    )
    band: tuple[float, float] | None = Field(None, description="both ends included")
    why: str = Field("", description="where the threshold comes from")

    @model_validator(mode="after")
    def _operand_fits(self) -> Clause:
        given = [
            name for name in ("threshold", "threshold_metric", "band") if getattr(self, name) is not None
        ]
        if self.comparator in ("refuses", "empty"):
            wanted = "nothing"
            fits = not given
        elif self.comparator == "within":
            wanted = "`band`"
            fits = given == ["band"]
        else:
            wanted = "one of `threshold`, `threshold_metric`"
            fits = len(given) == 1 and given != ["band"]
        if not fits:
            raise ValueError(f"clause `{self.id}`: comparator `{self.comparator}` takes {wanted}")
        if self.band is not None and not self.band[0] <= self.band[1]:
            raise ValueError(f"clause `{self.id}`: the band's lower end is above its upper end")
        if self.comparator in ("<", "<=", ">", ">=") and isinstance(self.threshold, str | bool):
            raise ValueError(f"clause `{self.id}`: comparator `{self.comparator}` needs a number")
        return self


class Measurement(Entry):
    """What is measured: a registered measurement, its parameters, regimes and seeds. No threshold."""

    name: Identifier = Field(description="key of driftscope.falsifiers.registry.MEASUREMENTS")
    parameters: dict[Name, Any] = Field(default_factory=dict)
    regimes: dict[str, dict[str, Any]] = Field(description="regime name to its own parameters")
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(min_length=1)

    @model_validator(mode="after")
    def _regimes_are_regimes(self) -> Measurement:
        if len(self.regimes) < 2:
            raise ValueError(f"a measurement needs at least two regimes, found {len(self.regimes)}")
        for name in self.regimes:
            if not name or any(character in name for character in ".*[]{}"):
                raise ValueError(f"regime `{name}`: a name must not be empty or hold any of . * [ ] {{ }}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("a seed is listed twice")
        return self


class Control(Entry):
    """A case with a known answer, judged by the same clauses as the regimes.

    The positive control's clauses must hold, the negative control's must fail.
    """

    id: Identifier = Field(description="key under `controls` of the measurement")
    kind: Literal["positive", "negative"]
    what: Sentence


class Text(Entry):
    """Templates of the three sentences; `{path:format}` is filled from the measurement.

    `found` may name a template for each verdict; `default` serves the others.
    """

    asked: Sentence
    found: dict[Verdict | Literal["default"], Sentence] | Sentence
    would_change: dict[Verdict | Literal["default"], Sentence] | Sentence


class Judgement(Entry):
    """How a measurement becomes a verdict: comparisons, joined by `and`, in each regime."""

    admits: list[Clause] = Field(
        default_factory=list, description="on the whole measurement; one that fails makes it inadmissible"
    )
    clauses: list[Clause] = Field(min_length=1, description="all must hold for the prediction to hold")
    text: Text
    figures: dict[Name, MetricPath] = Field(
        default_factory=dict, description="figures of the verdict, by their path in the measurement"
    )
    contradicts: dict[Verdict, list[str]] = Field(
        default_factory=dict, description="verdict to the report verdicts that it rules out"
    )

    @model_validator(mode="after")
    def _clauses_are_distinct(self) -> Judgement:
        _refuse_repeats("clause", [clause.id for clause in (*self.admits, *self.clauses)])
        if all(clause.scope == "document" for clause in self.clauses):
            raise ValueError("at least one clause must have the scope `regime`")
        return self


class Falsifier(Entry):
    """A registered test of a hypothesis, with its controls."""

    id: Identifier
    hypothesis: Sentence
    prediction: Sentence
    measurement: Measurement
    judgement: Judgement
    controls: list[Control] = Field(min_length=2)

    @model_validator(mode="after")
    def _has_both_controls(self) -> Falsifier:
        _refuse_repeats("control", [control.id for control in self.controls])
        missing = {"positive", "negative"} - {control.kind for control in self.controls}
        if missing:
            raise ValueError(f"falsifier `{self.id}` has no {' and no '.join(sorted(missing))} control")
        return self


class Equation(Entry):
    """A formula that the contract rests on."""

    id: Identifier
    formula: Sentence
    source: str = ""


class Obligation(Entry):
    """Something that must be true, and the falsifiers and gates that would show that it is not."""

    id: Identifier
    statement: Sentence
    falsifiers: list[Identifier] = Field(default_factory=list)
    gates: list[Identifier] = Field(default_factory=list)


class Gate(Entry):
    """A condition to ship, judged over evidence documents.

    The first step of every metric path names the document.
    """

    id: Identifier
    clauses: list[Clause] = Field(min_length=1)
    asked: Sentence
    found: Sentence
    would_change: Sentence = "other evidence"

    @model_validator(mode="after")
    def _clauses_are_distinct(self) -> Gate:
        _refuse_repeats("clause", [clause.id for clause in self.clauses])
        return self


class StatusChange(Entry):
    """One step of a contract's life."""

    version: Version
    status: Status
    reason: str = ""


class PinnedEvidence(Entry):
    """What a verdict rested on when it was pinned."""

    verdict: Verdict
    measurement_sha256: Sha256
    judgement_sha256: Sha256
    inputs: dict[str, Sha256] = Field(default_factory=dict)
    code: str = ""
    figures: dict[Name, float | int | str | bool | None] = Field(default_factory=dict)


class Contract(Entry):
    """One contract file."""

    id: Identifier
    version: Version
    title: Sentence
    references: list[Sentence] = Field(min_length=1)
    equations: list[Equation] = Field(default_factory=list)
    obligations: list[Obligation] = Field(min_length=1)
    falsifiers: list[Falsifier] = Field(default_factory=list)
    gates: list[Gate] = Field(default_factory=list)
    status_history: list[StatusChange] = Field(min_length=1)
    evidence: dict[Identifier, PinnedEvidence] = Field(
        default_factory=dict, description="falsifier id to its pinned evidence"
    )

    @model_validator(mode="after")
    def _references_hold(self) -> Contract:
        falsifiers = [falsifier.id for falsifier in self.falsifiers]
        gates = [gate.id for gate in self.gates]
        if not falsifiers and not gates:
            raise ValueError("a contract needs at least one falsifier or gate")
        _refuse_repeats("falsifier", falsifiers)
        _refuse_repeats("gate", gates)
        _refuse_repeats("obligation", [obligation.id for obligation in self.obligations])
        _refuse_repeats("equation", [equation.id for equation in self.equations])
        for obligation in self.obligations:
            for kind, named, known in (
                ("falsifier", obligation.falsifiers, falsifiers),
                ("gate", obligation.gates, gates),
            ):
                for name in named:
                    if name not in known:
                        raise ValueError(
                            f"obligation `{obligation.id}` names {kind} `{name}`, which is not here"
                        )
        for name in self.evidence:
            if name not in falsifiers:
                raise ValueError(f"evidence is pinned for `{name}`, which is no falsifier of this contract")
        if self.status_history[-1].version != self.version:
            raise ValueError(
                f"status_history ends at version {self.status_history[-1].version}, the contract is"
                f" {self.version}"
            )
        return self

    def falsifier(self, falsifier_id: str) -> Falsifier:
        """Return the falsifier of that id.

        Raises:
            KeyError: there is none.
        """
        for falsifier in self.falsifiers:
            if falsifier.id == falsifier_id:
                return falsifier
        raise KeyError(falsifier_id)


def _refuse_repeats(kind: str, ids: list[str]) -> None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise ValueError(f"{kind} id `{name}` is used twice")
        seen.add(name)


def measurement_sha256(falsifier: Falsifier) -> str:
    """Return the digest of what the measurement reads: name, parameters, regimes and seeds.

    Nothing of the judgement enters, so that an edited threshold leaves the measurement as it is.
    """
    return sha256_json(falsifier.measurement.model_dump(mode="json"))


def judgement_sha256(falsifier: Falsifier) -> str:
    """Return the digest of the clause: everything of the falsifier but its measurement."""
    return sha256_json(falsifier.model_dump(mode="json", exclude={"measurement"}))


def gate_sha256(gate: Gate) -> str:
    """Return the digest of a gate's clause."""
    return sha256_json(gate.model_dump(mode="json"))


def contract_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a contract file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Contract.model_json_schema()}
