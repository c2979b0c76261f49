"""SentencePiece's model file (``tokenizer.model``), read without its library.

The file is a protocol buffer (sentencepiece's ``sentencepiece_model.proto``, message ``ModelProto``). Only
what decides ids is read: pieces, the kind of model, and how text is normalized.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from driftscope.artifacts.files import regular_file_size
from driftscope.artifacts.tokenizers.token_types import BYTE, NORMAL
from driftscope.errors import InputError

_MAX_FILE_BYTES = 256 * 2**20

# Wire types of protocol buffers.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

UNIGRAM_MODEL, BPE_MODEL = 1, 2
_MODEL_NAMES = {UNIGRAM_MODEL: "unigram", BPE_MODEL: "BPE", 3: "word", 4: "char"}

# A field's number and its value: an int, a float's four bytes, or bytes.
_Field = tuple[int, int | bytes]


@dataclass(frozen=True)
class SentencePieceModel:
    """A parsed ``tokenizer.model``.

    Attributes:
        pieces: text of each id.
        scores: of each id.
        types: of each id; SentencePiece's numbers are GGUF's.
        model_type: `UNIGRAM_MODEL`, `BPE_MODEL` or another.
        byte_fallback: characters without a piece become their bytes.
        unknown: id of the unknown piece.
        begin: id of the piece that begins a sequence, or None.
        end: id of the piece that ends one, or None.
        add_dummy_prefix: a space belongs in front of a text.
        remove_extra_whitespaces: spaces at the ends are dropped, and runs of them become one.
        charsmap: the compiled normalization of characters, empty for none.
    """

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    model_type: int = UNIGRAM_MODEL
    byte_fallback: bool = False
    unknown: int = 0
    begin: int | None = 1
    end: int | None = 2
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    charsmap: bytes = b""

    @property
    def model_name(self) -> str:
        """What kind of model it is, in SentencePiece's words."""
        return _MODEL_NAMES.get(self.model_type, str(self.model_type))


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a ``tokenizer.model``.

    Raises:
        InputError: it cannot be read or is no SentencePiece model.
    """
    size = regular_file_size(path)
    if size > _MAX_FILE_BYTES:
        raise InputError(f"{path}: {size} bytes; expected at most {_MAX_FILE_BYTES}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        return _model(data)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a SentencePiece model ({error})") from error


def _model(data: bytes) -> SentencePieceModel:
    pieces, scores, types = [], [], []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_as_bytes(value)))
            pieces.append(_as_bytes(piece.get(1, b"")).decode("utf-8"))
            scores.append(_as_float(piece.get(2, bytes(4))))
            types.append(_as_int(piece.get(3, NORMAL)))
        elif number == 2:
            trainer |= dict(_fields(_as_bytes(value)))
        elif number == 3:
            normalizer |= dict(_fields(_as_bytes(value)))
    if not pieces:
        raise ValueError("no pieces")
    if not all(NORMAL <= kind <= BYTE for kind in types):
        raise ValueError("a piece of an unknown type")
    model = SentencePieceModel(
        pieces=tuple(pieces),
        scores=tuple(scores),
        types=tuple(types),
        model_type=_as_int(trainer.get(3, UNIGRAM_MODEL)),
        byte_fallback=bool(_as_int(trainer.get(35, 0))),
        unknown=_as_int(trainer.get(40, 0)),
        begin=_optional(_as_int(trainer.get(41, 1))),
        end=_optional(_as_int(trainer.get(42, 2))),
        add_dummy_prefix=bool(_as_int(normalizer.get(3, 1))),
        remove_extra_whitespaces=bool(_as_int(normalizer.get(4, 1))),
        charsmap=_as_bytes(normalizer.get(2, b"")),
    )
    for index in (model.unknown, model.begin, model.end):
        if index is not None and not 0 <= index < len(pieces):
            raise ValueError(f"special id {index} of {len(pieces)} pieces")
    _check_charsmap(model.charsmap)
    return model


def _check_charsmap(charsmap: bytes) -> None:
    """Check that the compiled normalization has its parts: the size of a trie, the trie, texts."""
    if not charsmap:
        return
    size = int.from_bytes(charsmap[:4], "little")
    if len(charsmap) < 4 or size % 4 or size > len(charsmap) - 4:
        raise ValueError(f"a normalization of {len(charsmap)} bytes with a trie of {size}")
    charsmap[4 + size :].decode("utf-8")


def _optional(index: int) -> int | None:
    return None if index < 0 else index


def _fields(data: bytes) -> Iterator[_Field]:
    """The fields of a message, in the order of the file."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        value: int | bytes
        if wire == _VARINT:
            value, position = _varint(data, position)
        else:
            if wire == _BYTES:
                length, position = _varint(data, position)
            elif wire in (_FIXED32, _FIXED64):
                length = 4 if wire == _FIXED32 else 8
            else:
                raise ValueError(f"wire type {wire} at byte {position}")
            value = data[position : position + length]
            if len(value) != length:
                raise ValueError(f"{length} bytes at byte {position} of {len(data)}; is it truncated?")
            position += length
        if number == 0:
            raise ValueError(f"field 0 at byte {position}")
        yield number, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of at most 64 bits, seven a byte, the low ones first; and where the next field starts."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError(f"a number at byte {position} of {len(data)}; is it truncated?")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
    raise ValueError(f"a number of more than 64 bits at byte {position}")


def _as_bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text is expected")
    return value


def _as_int(value: int | bytes) -> int:
    """A signed 32-bit number."""
    if not isinstance(value, int):
        raise ValueError("text where a number is expected")
    low = value & 0xFFFF_FFFF
    return low - 2**32 if low >= 2**31 else low


def _as_float(value: int | bytes) -> float:
    if not isinstance(value, bytes) or len(value) != 4:
        raise ValueError("no float where a score is expected")
    return float(struct.unpack("<f", value)[0])
