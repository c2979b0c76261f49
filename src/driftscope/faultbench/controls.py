"""Controls: what looks like a fault to a careless measure, and is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from driftscope.analysis.admissibility import TraceMetadata, admissibility
from driftscope.analysis.clean_engines import CleanEngine, Habits
from driftscope.analysis.floors import Floors
from driftscope.analysis.impact import impact_rows
from driftscope.analysis.replay import Replayer
from driftscope.analysis.weights.sweep import Band, compare_tensor, inventory, relate, summarise
from driftscope.artifacts.model import Artifact
from driftscope.faultbench.clean import Clean, own_trace, verdict
from driftscope.faultbench.edited import values_of, with_values
from driftscope.faultbench.examine import examine
from driftscope.faultbench.faults import FAULTS
from driftscope.faultbench.subjects import Subject, Workbench
from driftscope.faultbench.trace_in_memory import record
from driftscope.forward.model import ForwardPass
from driftscope.forward.policy import WHOLE_MODEL

Result = dict[str, Any]

BAND = Band(0.0, 1.6)
"""Measured over expected NMSE of a tensor that is the quantization of another, as configured by default."""

_FINE_TUNED = 0.05
"""Standard deviation of what a fine-tuning adds to each matrix, in units of the matrix's own."""


NAMES = ("C2", "C3", "C4", "C5", "C6", "C7")


class Controls:
    """Runs the controls C2 to C7; C1 is the clean pairs."""

    def __init__(self, bench: Workbench, floors: Floors, *, threads: int = 1) -> None:
        """Prepare."""
        self._bench = bench
        self._floors = floors
        self._threads = threads
        self._clean = Clean(bench, floors, threads=threads)

    def run(self, name: str) -> list[Result]:
        """The rows of a control, ``C2`` and so on."""
        return [{**row, "control": name} for row in self._all[name]()]

    @property
    def _all(self) -> Mapping[str, Callable[[], Iterator[Result]]]:
        return {
            "C2": self.massive_activation,
            "C3": self.near_tie,
            "C4": self.other_weights,
            "C5": self.other_scope,
            "C6": self.other_order,
            "C7": self.outlier_channel,
        }

    def massive_activation(self) -> Iterator[Result]:
        """C2: the first token's activation makes one layer's spread many times its neighbour's."""
        for scheme, path in (("F32", "f32"), ("Q8_0", "int8-dot"), ("Q4_K_M", "int8-dot")):
            for seed in (0, 1):
                subject = Subject("qwen2-massive", scheme, path, seed=seed)
                trace = own_trace(self._bench, subject, "short", threads=self._threads)
                spread = [
                    float(np.std(trace.tap(layer, "ffn_swiglu"))) for layer in range(self._layers(subject))
                ]
                figures = {
                    "std_by_layer": [_figure(value) for value in spread],
                    "std_over_neighbour": _figure(spread[1] / spread[0]),
                }
                found = self._clean.examine(trace, subject)
                yield {**_about(subject, "short"), **verdict(found), "figures": figures}

    def near_tie(self) -> Iterator[Result]:
        """C3: greedy choices that flip, between logits that differ by less than their noise."""
        for seed in (0, 1, 2):
            subject = Subject("qwen2-twins", "Q8_0", "int8-dot", seed=seed)
            sound = own_trace(self._bench, Subject("qwen2-twins", seed=seed), "long", threads=self._threads)
            trace = own_trace(self._bench, subject, "long", threads=self._threads)
            a, b = (item.tap(WHOLE_MODEL, "lm_head") for item in (sound, trace))
            places = [("", index) for index in range(a.shape[0])]
            rows = impact_rows(a, b, np.full(a.shape[0], -1), places, "teacher|candidate")
            flips = [row for row in rows if not row["same_top1"]]
            figures = {
                "positions": len(rows),
                "flips": len(flips),
                "flips_within_noise": sum(row["margin_a"] <= 4.0 * row["logit_noise"] for row in flips),
            }
            found = self._clean.examine(trace, subject)
            yield {**_about(subject, "long"), **verdict(found), "figures": figures}

    def other_weights(self) -> Iterator[Result]:
        """C4: a fine-tuned model against its base: everything is different and nothing corrupt."""
        for seed in (0, 1):
            subject = Subject("qwen2", seed=seed)
            base = self._bench.artifact("qwen2", "F32", seed)
            tuned = fine_tuned(base, seed)
            policy = subject.arithmetic.policy
            forward = ForwardPass({policy.base.artifact: tuned}, policy, threads=self._threads)
            trace = record(forward, self._bench.prompts("qwen2", "short"), subject.arithmetic)
            found = examine(trace, tuned, base, self._floors, threads=self._threads)
            rows = [compare_tensor(ref, tuned.tensors[name]) for name, ref in base.tensors.items()]
            listed = inventory(base, tuned)
            sweep = summarise(rows, listed, relate(rows, listed, BAND, base, tuned))
            named = {fault.class_ for fault in FAULTS.values()}
            said = verdict(found)
            # That the weights differ must be found; what must not be said is that one of them is corrupt.
            said["alarm"] = bool(found.first is not None and found.first["class"] in named)
            said["alarm"] = said["alarm"] or sweep["conclusion"] != "different-weights"
            different = list(sweep["relations"].values()).count("different")
            figures = {"tensors_different": different, "tensors": len(rows)}
            yield {**_about(subject, "short"), **said, "figures": figures}

    def other_scope(self) -> Iterator[Result]:
        """C5: statistics over the last token against statistics over all tokens."""
        digests = {"prompt": "0" * 64}
        for tap, scope in (("attn_norm", "last"), ("ffn_swiglu", "all-but-first")):
            sides = []
            for count, name in ((7, "all"), (1 if scope == "last" else 6, scope)):
                row = {"prompt": "prompt", "layer": 0, "tap": tap, "scope": name, "position": -1}
                row |= {"token_count": count, "count": 256 * count, "capture_point": "the same"}
                sides.append(TraceMetadata.of_rows(name, digests, [row]))
            status = admissibility(sides)["status"]
            yield {
                **_about(Subject("qwen2"), "short"),
                "id": f"statistics of {tap}: all tokens against {scope}",
                "status": "run",
                "reason": "",
                "alarm": status != "inadmissible",
                "found": None,
                "capture_points": [],
                "figures": {"status": status},
            }

    def other_order(self) -> Iterator[Result]:
        """C6: sums in other orders, and another number of threads."""
        for order in ("reversed", "pairwise", "lanes-8", "fused-lanes-32"):
            for scheme, path in (("F32", "f32"), ("Q8_0", "int8-dot")):
                subject = Subject("qwen2-square", scheme, path, seed=3)
                artifact = self._bench.artifact(subject.model, scheme, subject.seed)
                engine = CleanEngine(artifact, subject.arithmetic, Habits(order))
                prompts = self._bench.prompts(subject.model, "short", subject.seed)
                trace = record(engine, prompts, subject.arithmetic)
                said = verdict(self._clean.examine(trace, subject))
                about = _about(subject, "short")
                yield {**about, "id": f"{about['id']}|{order}", **said, "figures": {}}
        subject = Subject("qwen2", "Q4_K_M", "int8-dot")
        one, two = (own_trace(self._bench, subject, "rows", threads=threads) for threads in (1, 2))
        same = all(np.array_equal(one.tap(-1, tap), two.tap(-1, tap)) for tap in ("final_norm", "lm_head"))
        said = verdict(self._clean.examine(two, subject))
        said["alarm"] = said["alarm"] or not same
        about = _about(subject, "rows")
        yield {**about, "id": f"{about['id']}|2 threads", **said, "figures": {"same_bits": same}}

    def outlier_channel(self) -> Iterator[Result]:
        """C7: quantizing an activation costs much in the block of an outlier."""
        for seed in (0, 1):
            subject = Subject("qwen2-massive", "Q4_K_M", "int8-dot", seed=seed)
            trace = own_trace(self._bench, subject, "short", threads=self._threads)
            own = self._bench.artifact(subject.model, subject.scheme, seed)
            sides = Replayer(trace, own, components=("arithmetic",)).op(1, "ffn_out").sides("arithmetic")
            assert sides is not None
            error = np.square(np.asarray(sides[0], np.float64) - np.asarray(sides[1], np.float64))
            per_token = error.sum(axis=1)
            figures = {"error_of_first_token_over_others": _figure(per_token[0] / np.median(per_token[1:]))}
            found = self._clean.examine(trace, subject)
            yield {**_about(subject, "short"), **verdict(found), "figures": figures}

    def _layers(self, subject: Subject) -> int:
        return self._bench.artifact(subject.model).config.num_layers


def fine_tuned(base: Artifact, seed: int) -> Artifact:
    """A model whose every tensor has moved a little, as by further training."""
    random = np.random.Generator(np.random.Philox([seed, 4]))
    changed = {}
    for name in base.tensors:
        values = values_of(base, name)
        noise = random.standard_normal(values.shape, dtype=np.float32)
        changed[name] = values + np.float32(_FINE_TUNED * float(np.std(values))) * noise
    return with_values(base, changed)


def _about(subject: Subject, regime: str) -> Result:
    return {
        "id": f"{subject.id}|{regime}",
        "source": "driftscope",
        "model": subject.model,
        "format": subject.scheme,
        "path": subject.path,
        "regime": regime,
    }


def _figure(value: float) -> float:
    return float(f"{value:.3e}")
