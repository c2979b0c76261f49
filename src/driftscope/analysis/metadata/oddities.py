"""What is unusual in a model's metadata: each value against those of published models, and against the rest.

A ``warning`` is something that breaks answers where it is not meant; a ``note`` is legal and rare. To add a
check, write a function and put it into `CHECKS`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from driftscope.analysis.metadata.facts import TokenizerFacts, stored_dtype
from driftscope.artifacts.complete import expected_shapes
from driftscope.artifacts.model import Artifact

NOTE, WARNING = "note", "warning"


@dataclass(frozen=True)
class Published:
    """What published models of an architecture have.

    Attributes:
        eps: of RMSNorm.
        theta: bases of the rotary frequencies.
        has_bos: their tokenizers have a beginning-of-sequence token.
        free_head_dim: heads times head_dim need not be the hidden size.
    """

    eps: tuple[float, ...]
    theta: tuple[float, ...]
    has_bos: bool = True
    free_head_dim: bool = False


# From the config.json of the models as their makers published them: Llama 1 to 3.3, TinyLlama, SmolLM 1 and
# 2, CodeLlama, Yi, DeepSeek Coder; Mistral 7B to Nemo, Ministral; Qwen 1.5 to 2.5 (also Math and 1M), Qwen 3;
# Gemma 2 and 3; Phi 3 to 4.
PUBLISHED: dict[str, Published] = {
    "llama": Published((1e-5, 1e-6), (1e4, 1e5, 1.3e5, 2.73e5, 5e5, 1e6, 2e6, 5e6)),
    "mistral": Published((1e-5,), (1e4, 1e6, 1e8, 1e9), free_head_dim=True),
    "qwen2": Published((1e-6, 1e-5), (1e4, 1e6, 5e6, 1e7), has_bos=False),
    "qwen3": Published((1e-6,), (1e6, 5e6, 1e7), has_bos=False, free_head_dim=True),
    "gemma2": Published((1e-6,), (1e4,), free_head_dim=True),
    "gemma3_text": Published((1e-6,), (1e6,), free_head_dim=True),
    "phi3": Published((1e-5,), (1e4, 2.5e5)),
}

# llama.h, llama_ftype: the format of most matrices that general.file_type stands for.
FILE_TYPES: dict[int, tuple[str, str]] = {
    0: ("F32", "F32"),
    1: ("F16", "F16"),
    2: ("Q4_0", "Q4_0"),
    3: ("Q4_1", "Q4_1"),
    7: ("Q8_0", "Q8_0"),
    8: ("Q5_0", "Q5_0"),
    9: ("Q5_1", "Q5_1"),
    10: ("Q2_K", "Q2_K"),
    11: ("Q3_K_S", "Q3_K"),
    12: ("Q3_K_M", "Q3_K"),
    13: ("Q3_K_L", "Q3_K"),
    14: ("Q4_K_S", "Q4_K"),
    15: ("Q4_K_M", "Q4_K"),
    16: ("Q5_K_S", "Q5_K"),
    17: ("Q5_K_M", "Q5_K"),
    18: ("Q6_K", "Q6_K"),
    19: ("IQ2_XXS", "IQ2_XXS"),
    20: ("IQ2_XS", "IQ2_XS"),
    21: ("Q2_K_S", "Q2_K"),
    22: ("IQ3_XS", "IQ3_S"),
    23: ("IQ3_XXS", "IQ3_XXS"),
    24: ("IQ1_S", "IQ1_S"),
    25: ("IQ4_NL", "IQ4_NL"),
    26: ("IQ3_S", "IQ3_S"),
    27: ("IQ3_M", "IQ3_S"),
    28: ("IQ2_S", "IQ2_S"),
    29: ("IQ2_M", "IQ2_S"),
    30: ("IQ4_XS", "IQ4_XS"),
    31: ("IQ1_M", "IQ1_M"),
    32: ("BF16", "BF16"),
    36: ("TQ1_0", "TQ1_0"),
    37: ("TQ2_0", "TQ2_0"),
    38: ("MXFP4_MOE", "MXFP4"),
}
_SUPER_BLOCK = 256
_FLOATS = ("F32", "F16", "BF16", "F64")
_TOKEN_LIKE = re.compile(r"<\|[^<>|\s{}]{1,60}\|>|<(?:start|end)_of_[a-z]{1,20}>")


@dataclass(frozen=True)
class Oddity:
    """One unusual thing.

    Attributes:
        check: id of the check.
        where: the key, tensor or token that it is about.
        what: what was found.
        why: what is usual, and what may come of it.
        severity: ``note`` or ``warning``.
    """

    check: str
    where: str
    what: str
    why: str
    severity: str


@dataclass(frozen=True)
class Subject:
    """A model with what it says of its tokenizer."""

    artifact: Artifact
    tokenizer: TokenizerFacts

    @property
    def published(self) -> Published | None:
        """What is usual for the architecture, or None where none is listed."""
        return PUBLISHED.get(self.artifact.config.architecture)


Check = Callable[[Subject], Iterator[Oddity]]


def oddities(artifact: Artifact, tokenizer: TokenizerFacts) -> list[Oddity]:
    """Everything unusual, warnings first."""
    subject = Subject(artifact, tokenizer)
    found = [oddity for check in CHECKS for oddity in check(subject)]
    return sorted(found, key=lambda oddity: oddity.severity == NOTE)


def _epsilon(subject: Subject) -> Iterator[Oddity]:
    config, usual = subject.artifact.config, subject.published
    if usual is None or any(math.isclose(config.rms_norm_eps, eps, rel_tol=1e-3) for eps in usual.eps):
        return
    between = 1e-6 <= config.rms_norm_eps <= 1e-5
    yield Oddity(
        "norm-eps",
        "rms_norm_eps",
        f"{config.rms_norm_eps:g}",
        f"published {config.architecture} models have {_either(usual.eps)}; another one "
        "changes every norm of small activations",
        NOTE if between else WARNING,
    )


def _theta(subject: Subject) -> Iterator[Oddity]:
    config, usual = subject.artifact.config, subject.published
    if usual is not None and not any(math.isclose(config.rope_theta, x, rel_tol=1e-3) for x in usual.theta):
        yield Oddity(
            "rope-theta",
            "rope_theta",
            f"{config.rope_theta:g}",
            f"published {config.architecture} models have {_either(usual.theta)}; a wrong base harms long "
            "texts first",
            NOTE if 1e4 <= config.rope_theta <= 1e9 else WARNING,
        )
    turned = config.rotary_dim or config.head_dim
    longest = 2 * math.pi * config.rope_theta ** ((turned - 2) / turned)
    if config.rope_scaling is None and config.sliding_window is None and config.context_length > longest:
        yield Oddity(
            "rope-context",
            "rope_theta, context_length",
            f"theta {config.rope_theta:g} for a context of {config.context_length} without scaling",
            f"the slowest rotary pair comes round after {longest:.0f} positions, so that farther ones "
            "repeat; models with such a context have a larger base or a scaling",
            WARNING,
        )


def _scaling(subject: Subject) -> Iterator[Oddity]:
    config = subject.artifact.config
    scaling = config.rope_scaling
    if scaling is None:
        if (
            config.architecture == "llama"
            and math.isclose(config.rope_theta, 5e5)
            and config.context_length >= 131072
        ):
            yield Oddity(
                "rope-scaling-lost",
                "rope_scaling",
                f"none, with theta 5e5 and a context of {config.context_length}",
                "Llama 3.1 and later scale the frequencies (rope_type llama3, or rope_freqs.weight in GGUF); "
                "without it short prompts are fine and long ones fail",
                WARNING,
            )
        return
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings")
    if isinstance(factor, (int, float)) and isinstance(original, (int, float)):
        most = factor * original
        if config.context_length > most * 1.001:
            yield Oddity(
                "rope-scaling-context",
                "context_length",
                f"{config.context_length}",
                f"the scaling reaches {most:.0f} positions ({original:g} x {factor:g})",
                WARNING,
            )


def _window(subject: Subject) -> Iterator[Oddity]:
    config = subject.artifact.config
    if config.sliding_window is not None and config.sliding_window > config.context_length:
        yield Oddity(
            "sliding-window",
            "sliding_window",
            f"{config.sliding_window}",
            f"it is longer than the context of {config.context_length}, so that it never acts",
            NOTE,
        )


def _heads(subject: Subject) -> Iterator[Oddity]:
    config, usual = subject.artifact.config, subject.published
    width = config.num_heads * config.head_dim
    if width != config.hidden_size and not (usual is not None and usual.free_head_dim):
        yield Oddity(
            "head-size",
            "head_dim, num_heads",
            f"{config.num_heads} heads of {config.head_dim} are {width}",
            f"published {config.architecture} models have heads that make up the hidden size, here "
            f"{config.hidden_size}",
            NOTE,
        )


def _tensors(subject: Subject) -> Iterator[Oddity]:
    artifact = subject.artifact
    expected = expected_shapes(artifact.config)
    missing = [name for name in expected if name not in artifact.tensors]
    if missing:
        yield Oddity(
            "missing-tensors",
            missing[0],
            f"{len(missing)} of {len(expected)} tensors are missing",
            "the hyperparameters ask for them; an engine that goes on without them answers wrongly",
            WARNING,
        )
    wrong = [
        name
        for name, shape in expected.items()
        if name in artifact.tensors and artifact.tensors[name].shape != shape
    ]
    if wrong:
        yield Oddity(
            "tensor-shapes",
            wrong[0],
            f"{_times(artifact.tensors[wrong[0]].shape)}{_others(wrong)}",
            f"the hyperparameters ask for {_times(expected[wrong[0]])}",
            WARNING,
        )
    unused = [name for name in artifact.tensors if name not in expected and name != "rope_freqs.weight"]
    biases = [name for name in (*unused, *artifact.unmapped) if name.endswith(".bias")]
    if biases:
        yield Oddity(
            "unexpected-biases",
            biases[0],
            f"{len(biases)} biases",
            f"{artifact.config.architecture} has none there; leaving them out changes every answer",
            WARNING,
        )
    others = [name for name in artifact.unmapped if name not in biases]
    if others:
        yield Oddity(
            "unmapped-tensors",
            others[0],
            f"{len(others)} tensors have no place in {artifact.config.architecture}",
            "they are not compared and not run",
            WARNING,
        )


def _tied(subject: Subject) -> Iterator[Oddity]:
    artifact = subject.artifact
    stored = "lm_head.weight" in artifact.tensors
    if artifact.config.tie_word_embeddings and stored:
        yield Oddity(
            "tied-head",
            "tie_word_embeddings",
            "true, and lm_head.weight is stored",
            "engines differ in which of the two they use; the logits differ where the tensors do",
            WARNING,
        )


def _vocabulary(subject: Subject) -> Iterator[Oddity]:
    config, facts = subject.artifact.config, subject.tokenizer
    if facts.problem is not None:
        yield Oddity("tokenizer", "tokenizer", "cannot be read", facts.problem, WARNING)
    elif facts.kind is None:
        yield Oddity(
            "tokenizer", "tokenizer", "none", "prompts cannot be encoded with this model alone", NOTE
        )
    count = len(facts.tokens)
    rows = subject.artifact.tensors.get("model.embed_tokens.weight")
    if rows is not None and rows.shape[0] != config.vocab_size:
        yield Oddity(
            "embedding-rows",
            "vocab_size",
            f"{config.vocab_size}, and the embedding has {rows.shape[0]} rows",
            "the two are the same in every published model",
            WARNING,
        )
    if count > config.vocab_size:
        yield Oddity(
            "tokens-beyond",
            "tokens",
            f"{count} tokens for {config.vocab_size} embedding rows",
            "the last of them have no embedding: an engine reads past the end or stops",
            WARNING,
        )
    elif 0 < count < config.vocab_size:
        padding = config.vocab_size - count
        yield Oddity(
            "rows-without-token",
            "tokens",
            f"{count} tokens for {config.vocab_size} embedding rows",
            f"{padding} rows are padding, as in models whose vocabulary was rounded up; they should never be "
            "sampled",
            NOTE if padding <= max(1024, config.vocab_size // 64) else WARNING,
        )


def _special(subject: Subject) -> Iterator[Oddity]:
    facts, usual = subject.tokenizer, subject.published
    if facts.kind is None or not facts.tokens:
        return
    for name, token in facts.special.items():
        if not 0 <= token < len(facts.tokens):
            yield Oddity(
                "special-range",
                name,
                f"id {token}",
                f"the vocabulary has {len(facts.tokens)} tokens",
                WARNING,
            )
    bos, eos = facts.special.get("bos_token"), facts.special.get("eos_token")
    if eos is None:
        yield Oddity("eos-missing", "eos_token", "none", "answers do not end by themselves", WARNING)
    if bos is None and usual is not None and usual.has_bos:
        yield Oddity(
            "bos-missing",
            "bos_token",
            "none",
            f"published {subject.artifact.config.architecture} models have one in front of every text",
            NOTE if facts.add_bos is False else WARNING,
        )
    if bos is None and facts.add_bos:
        yield Oddity(
            "bos-unnamed", "add_bos_token", "true, and no bos_token is named", "none is added", WARNING
        )
    if bos is not None and bos == eos:
        yield Oddity(
            "bos-is-eos",
            "bos_token, eos_token",
            f"both are {bos} ({facts.text(bos)!r})",
            "rare; an engine that stops at the end token must not look at the prompt",
            NOTE,
        )


def _template(subject: Subject) -> Iterator[Oddity]:
    facts = subject.tokenizer
    if facts.chat_template is None or not facts.tokens:
        return
    known = set(facts.tokens)
    unknown = sorted({text for text in _TOKEN_LIKE.findall(facts.chat_template) if text not in known})
    if unknown:
        yield Oddity(
            "template-tokens",
            "chat_template",
            f"writes {', '.join(unknown[:4])}{_others(unknown[3:])}",
            "the vocabulary has no such token: it is read as ordinary text, letter by letter",
            WARNING,
        )
    begins = re.match(r"\s*(?:\{%.*?%\}|\{#.*?#\}|\s)*\{\{-?\s*bos_token", facts.chat_template, re.DOTALL)
    if facts.add_bos and begins:
        yield Oddity(
            "double-bos",
            "add_bos_token, chat_template",
            "both begin a prompt with bos_token",
            "a prompt that is rendered and then encoded with special tokens begins with two of them",
            NOTE,
        )


def _file_type(subject: Subject) -> Iterator[Oddity]:
    artifact = subject.artifact
    if artifact.container != "gguf":
        return
    value = artifact.metadata.get("general.file_type")
    matrices = [
        tensor for name, tensor in artifact.tensors.items() if len(tensor.shape) == 2 and ".layers." in name
    ]
    if not isinstance(value, int) or not matrices:
        return
    name, format_ = FILE_TYPES.get(value, (None, None))
    if name is None:
        yield Oddity("file-type", "general.file_type", f"{value}", "no such type is known", NOTE)
        return
    sizes: Counter[str] = Counter()
    for tensor in matrices:
        sizes[stored_dtype(tensor)] += tensor.n_elements
    if format_ in sizes:
        return
    most = sizes.most_common(1)[0][0]
    # K-quants need rows of whole super-blocks; converters take another format where a model has none.
    short = sum(tensor.shape[-1] % _SUPER_BLOCK != 0 for tensor in matrices)
    fits = "_K" in str(format_) or str(format_).startswith("IQ")
    yield Oddity(
        "file-type",
        "general.file_type",
        f"{value} ({name}), and no matrix of the layers is {format_}; most are {most}",
        f"{short} of {len(matrices)} matrices have rows that {format_} cannot hold: another took its place"
        if fits and short
        else "the label is not that of this file's values",
        NOTE if fits and short else WARNING,
    )


def _quantization_version(subject: Subject) -> Iterator[Oddity]:
    artifact = subject.artifact
    if artifact.container != "gguf":
        return
    quantized = any(stored_dtype(tensor) not in _FLOATS for tensor in artifact.tensors.values())
    version = artifact.metadata.get("general.quantization_version")
    if quantized and version is None:
        yield Oddity(
            "quantization-version",
            "general.quantization_version",
            "none, and tensors are quantized",
            "GGUF asks for it wherever a tensor is quantized",
            NOTE,
        )
    elif version is not None and version != 2:
        yield Oddity(
            "quantization-version",
            "general.quantization_version",
            f"{version}",
            "all formats that are read today are those of version 2",
            WARNING,
        )
    alignment = artifact.metadata.get("general.alignment", 32)
    if alignment != 32:
        yield Oddity(
            "alignment", "general.alignment", f"{alignment}", "legal; nearly all files have 32", NOTE
        )


def _norms(subject: Subject) -> Iterator[Oddity]:
    quantized = [
        name
        for name, tensor in subject.artifact.tensors.items()
        if len(tensor.shape) == 1 and stored_dtype(tensor) not in _FLOATS
    ]
    if quantized:
        yield Oddity(
            "quantized-vectors",
            quantized[0],
            f"{len(quantized)} norms or biases are quantized",
            "they are a thousandth of the bytes and scale whole channels; converters keep them in floats",
            WARNING,
        )


CHECKS: tuple[Check, ...] = (
    _tensors,
    _tied,
    _epsilon,
    _theta,
    _scaling,
    _window,
    _heads,
    _vocabulary,
    _special,
    _template,
    _file_type,
    _quantization_version,
    _norms,
)


def _either(values: tuple[float, ...]) -> str:
    texts = [f"{value:g}" for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _others(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
