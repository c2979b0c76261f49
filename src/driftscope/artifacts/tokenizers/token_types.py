"""Token types of GGUF vocabularies, and what llama.cpp makes of them.

The numbers are those of llama.h's ``llama_token_type``, and of SentencePiece's piece types.
"""

from __future__ import annotations

from collections.abc import Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Found in a text before anything else is done with it.
SPECIAL_TYPES = frozenset({UNKNOWN, CONTROL, USER_DEFINED})

# Tokens that end a turn of a conversation.
TURN_ENDS = frozenset({"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<turn|>"})

# llama.cpp takes tokens with these texts for control tokens, whatever type the file gives them
# (src/llama-vocab.cpp, ``llama_vocab::impl::load``: tokens that end a text or a turn, and those of
# fill-in-the-middle prompts).
_CONTROL_TEXTS = TURN_ENDS | {
    "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "</s>", "<eos>", "<EOT>", "_<EOT>",
    "[EOT]", "[EOS]", "<｜end▁of▁sentence｜>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>",
    "[e~[", "<|tool_response>", "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>",
    "<PRE>", "▁<PRE>", "<|code_prefix|>", "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>",
    "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>", "<|suffix|>",
    "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>",
    "<|code_middle|>", "<|middle|>", "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
}  # fmt: skip
# ... and these for user-defined ones.
_USER_TEXTS = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})


def effective_types(tokens: Sequence[str], types: Sequence[int]) -> tuple[int, ...]:
    """The type that each token has in llama.cpp.

    Args:
        tokens: text of each id.
        types: as the file gives them, one for each token.
    """
    present = set(tokens)
    user = _USER_TEXTS
    if {"<|return|>", "<|call|>"} <= present or {"<|calls|>", "<|flush|>"} <= present:
        # Where these end a turn, <|end|> ends only a part of one.
        user |= {"<|end|>"}
    return tuple(
        USER_DEFINED if text in user else CONTROL if text in _CONTROL_TEXTS else kind
        for text, kind in zip(tokens, types, strict=True)
    )
