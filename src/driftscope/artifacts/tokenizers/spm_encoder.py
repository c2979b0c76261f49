"""Text to token ids with a SentencePiece vocabulary of GGUF, as llama.cpp does it.

GGUF stores such a vocabulary (``tokenizer.ggml.model`` is ``llama``) as tokens with scores and without
merges. The two neighbours whose concatenation is the token with the highest score merge first, the
leftmost of equals before the others: Kudo and Richardson 2018 (arXiv:1808.06226), SentencePiece's
``bpe_model.cc``, llama.cpp's ``llm_tokenizer_spm`` and ``tokenizer_st_partition``.

A list of merges, as Hugging Face's ``tokenizer.json`` has it, says nearly the same, but not where tokens
have equal scores (some converters gave all tokens one), nor where a token holds a character that is none.
Ids of a GGUF file are those of llama.cpp, so they come from here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

from driftscope.artifacts.tokenizers.token_types import CONTROL, SPECIAL_TYPES, UNKNOWN
from driftscope.errors import InputError

SPACE = "\u2581"

# What C's `isspace` takes for a space.
_C_SPACES = " \t\n\v\f\r"
# Pieces of text between places that no token spans; words repeat.
_MAX_CACHED_PIECES = 50_000


class SpmEncoder:
    """Encodes with a vocabulary that does not change.

    Args:
        tokens: text of each id; a space is U+2581 in all but user-defined tokens.
        scores: of each id, finite.
        types: GGUF token type of each id.
        unknown: id for a character that has neither a token nor tokens for its bytes, or None.
        add_space_prefix: a space belongs in front of a text and of what follows a special token.
        strip_right: ids of special tokens that swallow the spaces behind them.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        scores: Sequence[float],
        types: Sequence[int],
        *,
        unknown: int | None,
        add_space_prefix: bool,
        strip_right: frozenset[int] = frozenset(),
    ) -> None:
        self._ids: Mapping[str, int] = {text: index for index, text in enumerate(tokens)}
        self._scores = scores
        complete = all(f"<0x{byte:02X}>" in self._ids for byte in range(256))
        self._unknown = None if complete else unknown
        self._prefix = SPACE if add_space_prefix else ""
        self._strip_right = strip_right
        # The longest first, as llama.cpp looks for them.
        self._special = sorted(
            (
                (text, index, types[index] in (CONTROL, UNKNOWN))
                for index, text in enumerate(tokens)
                if types[index] in SPECIAL_TYPES
            ),
            key=lambda entry: -len(entry[0].encode()),
        )
        # No token spans two characters that follow each other in none of them: text is cut there.
        self._joined = {pair for text in tokens for pair in pairwise(text)}
        self._pieces: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Token ids, without those that begin and end a sequence.

        Args:
            text: without lone surrogates.
            parse_special: find control tokens; user-defined ones are found either way.

        Raises:
            InputError: a character can be encoded in no way.
        """
        ids: list[int] = []
        after_special = True
        for fragment in self._fragments(text, parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                prefix = self._prefix if after_special else ""
                self._encode_plain(prefix + fragment.replace(" ", SPACE), ids)
            after_special = isinstance(fragment, int)
        return ids

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """The text, with the special tokens in it as ids."""
        fragments: list[str | int] = [text] if text else []
        present = set(text)
        for content, index, control in self._special:
            if (control and not parse_special) or content[0] not in present or content not in text:
                continue
            found: list[str | int] = []
            for fragment in fragments:
                if isinstance(fragment, int):
                    found.append(fragment)
                else:
                    found.extend(self._around(fragment, content, index))
            fragments = found
        return fragments

    def _around(self, text: str, content: str, index: int) -> Iterator[str | int]:
        """The text cut at a special token."""
        while text:
            before, mark, after = text.partition(content)
            if before:
                yield before
            if mark:
                yield index
            text = after.lstrip(_C_SPACES) if index in self._strip_right else after

    def _encode_plain(self, text: str, ids: list[int]) -> None:
        start = 0
        unknown_before = False
        for end in range(1, len(text) + 1):
            if end < len(text) and (text[end - 1], text[end]) in self._joined:
                continue
            piece = text[start:end]
            start = end
            found = self._pieces.get(piece)
            if found is None:
                found = tuple(self._merged(piece))
                if len(self._pieces) < _MAX_CACHED_PIECES:
                    self._pieces[piece] = found
            # A run of unknown characters is one token, as in SentencePiece.
            skip = unknown_before and bool(found) and found[0] == self._unknown
            ids.extend(found[1:] if skip else found)
            if found:
                unknown_before = found[-1] == self._unknown

    def _merged(self, text: str) -> list[int]:
        """Ids of a text after all merges."""
        # A symbol is text[i : ends[i]]; one that was merged into its left neighbour has no length.
        count = len(text)
        ends = list(range(1, count + 1))
        before = list(range(-1, count - 1))
        queue: list[tuple[float, int, int, int]] = []

        def add(left: int, right: int) -> None:
            index = self._ids.get(text[left : ends[right]])
            if index is not None:
                heapq.heappush(queue, (-self._scores[index], left, right, ends[right]))

        for right in range(1, count):
            add(right - 1, right)
        while queue:
            _, left, right, end = heapq.heappop(queue)
            # An entry is stale where either symbol has merged with another since.
            if ends[left] != right or ends[right] != end:
                continue
            ends[left], ends[right] = end, right
            if end < count:
                before[end] = left
            if before[left] >= 0:
                add(before[left], left)
            if end < count:
                add(left, end)
        ids: list[int] = []
        start = 0
        while start < count:
            self._append(text[start : ends[start]], ids)
            start = ends[start]
        return ids

    def _append(self, symbol: str, ids: list[int]) -> None:
        """The id of a symbol, or those of its bytes."""
        index = self._ids.get(symbol)
        if index is not None:
            ids.append(index)
            return
        data = symbol.encode()
        found = [self._ids.get(f"<0x{byte:02X}>") for byte in data]
        known = [index for index in found if index is not None]
        if len(known) == len(data):
            ids.extend(known)
        elif self._unknown is None:
            raise InputError(f"text: the vocabulary has no token for {symbol!r} nor for its bytes")
        elif not ids or ids[-1] != self._unknown:
            ids.append(self._unknown)
