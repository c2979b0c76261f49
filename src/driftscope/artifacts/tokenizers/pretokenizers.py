"""How text is cut into words before byte-pair merging, by the name that GGUF files give it.

GGUF stores only a name (``tokenizer.ggml.pre``); what the name means is compiled into llama.cpp
(``src/llama-vocab.cpp``, ``llm_tokenizer_bpe`` and the ``tokenizer_pre`` branches of
``llama_vocab::impl::load``). The table gives the same meaning in the terms of Hugging Face's
``tokenizer.json``, in the form that the original models use, so that the name can also be found from a
``tokenizer.json``.

llama.cpp never normalizes text for these vocabularies. Where the original tokenizer does (Qwen2 applies
NFC), the table follows the original: it is what the model was trained with. The two then differ for
text that is not in NFC, such as a letter followed by a combining accent. Likewise ``tekken`` and ``gpt-4o``:
llama.cpp's expressions leave out the combining marks that the originals take for letters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from driftscope.errors import InputError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACE}"
_QWEN2 = rf"{_CONTRACTIONS}|\p{{N}}|{_PUNCTUATION_AND_SPACE}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTED}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting text.

    Attributes:
        names: values of ``tokenizer.ggml.pre`` that mean this; the first is the usual one.
        config: the ``pre_tokenizer`` of a ``tokenizer.json``.
        normalizer: the ``normalizer`` of a ``tokenizer.json``, or None.
        ignore_merges: a word that is a token is taken whole, whatever the merges say.
        add_bos: a beginning-of-sequence token is prepended unless the file says otherwise.
    """

    names: tuple[str, ...]
    config: Mapping[str, Any]
    normalizer: Mapping[str, Any] | None = None
    ignore_merges: bool = False
    add_bos: bool = False


PRE_TOKENIZERS: tuple[PreTokenizer, ...] = (
    PreTokenizer(("gpt-2", "phi-2", "mpt", "olmo"), _byte_level(use_regex=True)),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _sequence({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)),
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _sequence(_split(_LLAMA3), _byte_level(use_regex=False)),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("dbrx", "smaug-bpe"), _sequence(_split(_LLAMA3), _byte_level(use_regex=False))),
    PreTokenizer(
        ("qwen2",), _sequence(_split(_QWEN2), _byte_level(use_regex=False)), normalizer={"type": "NFC"}
    ),
    PreTokenizer(
        ("deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"),
        _sequence(_split(_QWEN2), _byte_level(use_regex=False)),
    ),
    PreTokenizer(
        ("tekken",),
        _sequence(_split(_TEKKEN), _byte_level(use_regex=False)),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("gpt-4o", "llama4", "kanana2"), _sequence(_split(_GPT4O), _byte_level(use_regex=False))),
    PreTokenizer(
        ("qwen35",), _sequence(_split(_QWEN35), _byte_level(use_regex=False)), normalizer={"type": "NFC"}
    ),
    PreTokenizer(
        ("default",),
        _sequence(
            _split(r"[\p{P}\$\+<=>\^~\|]+"),
            _split(_GPT2),
            _split(r"\p{N}+"),
            _split(r"[0-9][0-9][0-9]"),
            _byte_level(use_regex=False),
        ),
    ),
)

_BY_NAME = {name: rule for rule in PRE_TOKENIZERS for name in rule.names}


def pre_tokenizer(name: str, where: str) -> PreTokenizer:
    """Look a pre-tokenizer up by its GGUF name.

    Args:
        name: value of ``tokenizer.ggml.pre``.
        where: the file, for the message.

    Raises:
        InputError: the name is not in the table.
    """
    rule = _BY_NAME.get(name)
    if rule is None:
        raise InputError(
            f"{where}: pre-tokenizer {name!r} is not supported; expected one of {', '.join(sorted(_BY_NAME))}"
        )
    return rule


def find_name(document: Mapping[str, Any], preferred: str | None = None) -> str | None:
    """GGUF name of the pre-tokenizer of a parsed ``tokenizer.json``, or None if it has none.

    Args:
        document: the parsed file.
        preferred: the name to return where several names mean the same.
    """
    model = document.get("model")
    ignore_merges = bool(model.get("ignore_merges")) if isinstance(model, Mapping) else False
    wanted = _comparable(document.get("pre_tokenizer"))
    normalizer = document.get("normalizer")
    if isinstance(normalizer, Mapping) and normalizer.get("normalizers") == []:
        normalizer = None
    for rule in PRE_TOKENIZERS:
        if (
            wanted == _comparable(rule.config)
            and ignore_merges == rule.ignore_merges
            and normalizer == (dict(rule.normalizer) if rule.normalizer else None)
        ):
            return preferred if preferred in rule.names else rule.names[0]
    return None


def _comparable(config: Any) -> Any:
    """The configuration without what does not change the tokens (``trim_offsets`` moves offsets only)."""
    if isinstance(config, Mapping):
        return {key: _comparable(value) for key, value in config.items() if key != "trim_offsets"}
    if isinstance(config, list):
        return [_comparable(value) for value in config]
    return config
