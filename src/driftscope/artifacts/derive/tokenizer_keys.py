"""The tokenizer of any artifact as the key-values of a GGUF file."""

from __future__ import annotations

from typing import Any

import gguf

from driftscope.artifacts.derive.gguf_metadata import add_vocabulary
from driftscope.artifacts.model import Artifact
from driftscope.artifacts.tokenizers.folder_tokenizer import has_tokenizer
from driftscope.artifacts.tokenizers.folder_vocabulary import vocabulary_from_folder
from driftscope.artifacts.tokenizers.tokenizer import model_folder

_PREFIX = "tokenizer."
_NONE = (None, "none", "no_vocab")


def tokenizer_keys(artifact: Artifact) -> dict[str, Any]:
    """Keys ``tokenizer.*`` of an artifact, empty where it carries no tokenizer.

    Those of a file are given as they are; those of a folder are what its GGUF copy would have.

    Raises:
        InputError: the folder's tokenizer has no such form.
    """
    if artifact.container != "safetensors":
        if artifact.metadata.get("tokenizer.ggml.model") in _NONE:
            return {}
        return {key: value for key, value in artifact.metadata.items() if key.startswith(_PREFIX)}
    folder = model_folder(artifact)
    if not has_tokenizer(folder):
        return {}
    writer = gguf.GGUFWriter(None, "none")
    add_vocabulary(writer, vocabulary_from_folder(folder, artifact.config.vocab_size))
    keys = writer.kv_data[0]
    return {key: item.value for key, item in keys.items() if key.startswith(_PREFIX)}
