"""The tokenizer in the metadata of an .apr file: GGUF's keys under other names.

Where GGUF has ``tokenizer.ggml.bos_token_id``, an .apr file has ``tokenizer.bos_token_id``, and so on; a few
have names of their own. The chat template is a key of the format.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TEMPLATE = "chat_template"
TOKENS = "tokenizer.vocabulary"

_APR, _GGUF = "tokenizer.", "tokenizer.ggml."
_GGUF_TEMPLATE = "tokenizer.chat_template"
# .apr's name to GGUF's, where they differ by more than what stands in front.
_RENAMED = {"vocabulary": "tokens", "pre_type": "pre", "model_type": "model"}
_RENAMED_BACK = {gguf: apr for apr, gguf in _RENAMED.items()} | {"model": "model"}
# What writers of .apr files call byte-level BPE, beside GGUF's name for it.
_MODELS = {"bpe": "gpt2"}


def with_gguf_keys(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of an .apr file, the keys of its tokenizer under GGUF's names and lists as tuples."""
    found: dict[str, Any] = {}
    for key, value in metadata.items():
        if value is None:
            continue
        if not key.startswith(_APR) or key == _GGUF_TEMPLATE:
            found[key] = value
            continue
        name = key.removeprefix(_APR)
        value = tuple(value) if isinstance(value, list) else value
        if name in ("model", "model_type") and isinstance(value, str):
            value = _MODELS.get(value.lower(), value)
        found.setdefault(_GGUF + _RENAMED.get(name, name), value)
    template = found.get(TEMPLATE)
    if isinstance(template, str):
        found.setdefault(_GGUF_TEMPLATE, template)
    return found


def apr_keys(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """The tokenizer's key-values of a GGUF file as those of an .apr file, sorted.

    Args:
        tokenizer: GGUF's keys; others than ``tokenizer.*`` are left out.
    """
    found: dict[str, Any] = {}
    for key, value in tokenizer.items():
        if key == _GGUF_TEMPLATE:
            found[TEMPLATE] = value
        elif key.startswith(_GGUF):
            name = key.removeprefix(_GGUF)
            is_list = isinstance(value, Sequence) and not isinstance(value, str)
            found[_APR + _RENAMED_BACK.get(name, name)] = list(value) if is_list else value
    return dict(sorted(found.items()))
