"""The models that faults are put into, the prompts that they are run on, and where they lie on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from driftscope.artifacts.derive.candidate import write_candidate
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.open import open_artifact
from driftscope.errors import InputError
from driftscope.faultbench.injection import Site
from driftscope.faultbench.tiny import VARIANTS, write_tiny
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.mapped import mapped

DEFAULT = "default"
"""Name of the model that is given from outside, the case's."""

SHORT, LONG = 7, 300
ROWS = (1, 2, 3, 4, 8, 17)
REGIMES: Mapping[str, tuple[int, ...]] = {"short": (SHORT,), "long": (LONG,), "rows": ROWS}
"""Regime to the lengths of its prompts, in tokens: past position 256 and any window; several row counts."""

_TEXT = (
    "The lighthouse keeper wrote down the weather every morning, the direction of the wind, the height "
    "of the waves and the number of ships that passed before noon. In winter there were days without a "
    "single sail, and he filled the empty lines with small drawings of gulls. His daughter learned to "
    "read from those books. She knew that a column of threes meant a storm, and that the summer of 1911 "
    "had been so calm that the oil for the lamp lasted until October. When the harbour was enlarged, an "
    "engineer came to measure the tides. He asked for the records, expecting nothing, and left with "
    "copies of forty years. Two numbers in them turned out to be wrong: on one day the keeper had been "
    "ill, and on another he had fallen in love. The engineer found the first by comparing the level "
    "with the port to the north, because an error that repeats itself at every place is the sea's, and "
    "one that stands alone is the observer's. The second he never found. It had been corrected by the "
    "daughter, who had noticed that a wave of nine metres on a windless evening in June was more likely "
    "a mistake than a miracle. Years later she told the story to students of statistics, and asked them "
    "which of the two mistakes they would have noticed, and with what evidence. Most of them wanted to "
    "see the whole column, one wanted to see the drawings, and one asked whether the clock in the tower "
    "had been right. "
    "She wrote all three answers into the book, below the weather of that day."
)
"""Read by models that have a tokenizer."""


_DEEPEST = 3


@dataclass(frozen=True)
class Subject:
    """A model in a format, run along a path.

    Attributes:
        model: a key of `driftscope.faultbench.tiny.VARIANTS`, or `DEFAULT`.
        scheme: how it is stored: ``F32`` for the teacher itself, else a scheme of candidates.
        path: ``f32`` or ``int8-dot``.
        activation: what the path rounds activations to, None for what the formats ask for.
        kv_type: of keys and values, ``f32`` or ``f16``.
        seed: of a tiny model's weights.
        regimes: prompts that faults are run on.
        only: faults that it is there for; empty for all.
    """

    model: str
    scheme: str = "F32"
    path: str = "f32"
    activation: str | None = None
    kv_type: str = "f32"
    seed: int = 0
    regimes: tuple[str, ...] = ("short", "long", "rows")
    only: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """For example ``qwen2/Q4_K_M/int8-dot``."""
        kv = "" if self.kv_type == "f32" else f"/kv-{self.kv_type}"
        rounded = "" if self.activation is None else f"/{self.activation}"
        return f"{self.model}/{self.scheme}/{self.path}{rounded}{kv}" + (f"/{self.seed}" if self.seed else "")

    @property
    def arithmetic(self) -> Arithmetic:
        """What its engine says that it computes in."""
        return Arithmetic.of(self.path, activation=self.activation, kv_type=self.kv_type)


class Workbench:
    """Models on disk, written when they are first asked for.

    Attributes:
        folder: where tiny models and quantized copies are written.
    """

    def __init__(self, folder: Path, default: Artifact | None = None, candidate: Artifact | None = None):
        """Prepare a workbench.

        Args:
            folder: for what is written.
            default: the default model in float32, where it takes part.
            candidate: its copy in ``Q4_K_M``, where there is one already.
        """
        self.folder = folder
        self._default = default
        self._candidate = candidate
        self._open: dict[tuple[str, str, int], Artifact] = {}

    def artifact(self, model: str, scheme: str = "F32", seed: int = 0) -> Artifact:
        """A model in a format; rows in canonical order."""
        key = (model, scheme, seed)
        if key not in self._open:
            self._open[key] = mapped(self._made(model, scheme, seed))
        return self._open[key]

    def site(self, subject: Subject) -> Site:
        """A subject as injections see it; faults of one layer sit in an early one, but not in the first."""
        teacher = self.artifact(subject.model, "F32", subject.seed)
        artifact = self.artifact(subject.model, subject.scheme, subject.seed)
        layer = min(_DEEPEST, max(1, teacher.config.num_layers // 4))
        return Site(artifact, teacher, subject.arithmetic, layer)

    def prompts(self, model: str, regime: str, seed: int = 0) -> list[tuple[str, tuple[int, ...]]]:
        """Prompts of a regime: words for a model with a tokenizer, else random tokens."""
        if regime not in REGIMES:
            raise InputError(f"regime {regime!r} is unknown; expected one of {', '.join(REGIMES)}")
        lengths = REGIMES[regime]
        if model == DEFAULT:
            return [(f"{n}-tokens", _cut(self._words, n, seed)) for n in lengths]
        vocabulary = self.artifact(model, "F32").config.vocab_size
        random = np.random.Generator(np.random.Philox(1000 + seed))
        drawn = random.integers(2, vocabulary, size=(len(lengths), max(lengths)))
        rows = [drawn[index, :n] for index, n in enumerate(lengths)]
        return [(f"{len(row)}-tokens", _beginning(row, model)) for row in rows]

    @cached_property
    def _words(self) -> Sequence[int]:
        from driftscope.artifacts.tokenizers.tokenizer import load_tokenizer

        assert self._default is not None
        return load_tokenizer(self._default).encode(_TEXT)

    def _made(self, model: str, scheme: str, seed: int) -> Artifact:
        if model == DEFAULT:
            if self._default is None:
                raise InputError("the fault benchmark was not given the default model")
            if scheme == "F32":
                return self._default
            if scheme == "Q4_K_M" and self._candidate is not None:
                return self._candidate
        elif model not in VARIANTS:
            raise InputError(
                f"model {model!r} is unknown; expected {DEFAULT} or one of {', '.join(VARIANTS)}"
            )
        elif scheme == "F32":
            return open_artifact(write_tiny(self.folder / f"{model}-{seed}", model, seed=seed))
        return open_artifact(self.file(model, scheme, seed))

    def file(self, model: str, scheme: str, seed: int = 0) -> Path:
        """A model as a GGUF file of a scheme, ``F32`` included."""
        if model == DEFAULT and scheme == "Q4_K_M" and self._candidate is not None:
            return self._candidate.path
        file = self.folder / f"{model}-{seed}-{scheme}.gguf"
        if not file.is_file():
            write_candidate(self.artifact(model, "F32", seed), file, scheme=scheme)
        return file


def _cut(tokens: Sequence[int], count: int, seed: int) -> tuple[int, ...]:
    """So many tokens of a text, beginning further on for each seed."""
    start = 11 * seed % max(1, len(tokens) - count)
    if len(tokens) < count:
        raise InputError(f"the text has {len(tokens)} tokens; expected at least {count}")
    return tuple(tokens[start : start + count])


def _beginning(row: np.ndarray[tuple[int], np.dtype[np.int64]], model: str) -> tuple[int, ...]:
    """Token ids; a massive activation hangs on token 1 coming first."""
    ids = tuple(int(token) for token in row)
    return (1, *ids[1:]) if model == "qwen2-massive" else ids
