"""A trace on disk: the taps of one engine for some prompts, in a folder that any engine's author can write.

``trace.json`` says what was run; the arrays lie in safetensors files beside it. `docs/reference/traces.md`
is the format's page.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from driftscope.artifacts.files import list_folder, read_json_object
from driftscope.artifacts.safetensors import StoredTensor, read_safetensors
from driftscope.artifacts.tensor import TensorRef
from driftscope.errors import InputError
from driftscope.evidence.atomic import replacing
from driftscope.forward.architecture import tap_name
from driftscope.forward.arithmetic import Arithmetic
from driftscope.forward.batch import TokenBatch
from driftscope.forward.policy import WHOLE_MODEL

F32 = NDArray[np.float32]

MANIFEST = "trace.json"
FORMAT, VERSION = "driftscope-trace", 1

RAGGED = ("attn_scores", "attn_softmax")
"""Taps whose width depends on the length of the sequence."""

PARTS: Mapping[str, tuple[str, ...]] = {"qkv_matmul": ("q", "k", "v"), "qkv_bias": ("q", "k", "v")}
"""Taps that may be stored in parts, ``layers.3.qkv_bias.q`` and so on, which lie side by side."""

_FLOATS = ("F32", "F16", "BF16", "F64")
_KNOWN_KEYS = {
    *("format", "version", "engine", "model", "arithmetic", "prompts", "taps", "files", "arrays_sha256")
}


@dataclass(frozen=True)
class TraceManifest:
    """What a trace says about itself.

    Attributes:
        prompts: prompt id and token ids, in the order in which the prompts' tokens lie in an array.
        engine: ``name``, and as far as known ``version`` and ``options``.
        model: as far as known ``file``, ``sha256``, ``architecture``.
        arithmetic: what it was computed in, or None where nobody knows.
        capture_points: tap (without its layer) to what exactly it holds; a tap that is not listed is taken
            to hold what `driftscope.forward.architecture` says.
        absent: tap (without its layer) to the reason why the engine does not give it.
        files: names of the safetensors files; empty for all of the folder.
        arrays_sha256: digest of the files' digests, so that the manifest changes with the arrays; empty where
            the writer did not say. It is not checked on reading.
    """

    prompts: tuple[tuple[str, tuple[int, ...]], ...]
    engine: Mapping[str, Any] = field(default_factory=lambda: {"name": "unknown"})
    model: Mapping[str, Any] = field(default_factory=dict)
    arithmetic: Arithmetic | None = None
    capture_points: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    arrays_sha256: str = ""

    @property
    def batch(self) -> TokenBatch:
        """The tokens of all prompts."""
        return TokenBatch.of([ids for _, ids in self.prompts])

    @property
    def token_digests(self) -> dict[str, str]:
        """Prompt id to the SHA-256 of its token ids as little-endian int32."""
        return {
            prompt: hashlib.sha256(np.array(ids, dtype="<i4").tobytes()).hexdigest()
            for prompt, ids in self.prompts
        }

    def to_dict(self) -> dict[str, Any]:
        """The document of ``trace.json``."""
        taps: dict[str, dict[str, str]] = {}
        for key, values in (("capture_point", self.capture_points), ("absent", self.absent)):
            for tap, text in values.items():
                taps.setdefault(tap, {})[key] = text
        return {
            "format": FORMAT,
            "version": VERSION,
            "engine": dict(self.engine),
            "model": dict(self.model),
            "arithmetic": None if self.arithmetic is None else self.arithmetic.to_dict(),
            "prompts": [{"id": prompt, "ids": list(ids)} for prompt, ids in self.prompts],
            "taps": taps,
            "files": list(self.files),
            "arrays_sha256": self.arrays_sha256,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], where: str) -> TraceManifest:
        """The inverse of `to_dict`; only ``format``, ``version`` and ``prompts`` must be there.

        Raises:
            InputError: not a trace, another version, or a key of the wrong kind.
        """
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            raise InputError(
                f"{where}: format {document.get('format')!r}, version {document.get('version')!r}; "
                f"expected {FORMAT!r}, version {VERSION}"
            )
        if unknown := sorted(set(document) - _KNOWN_KEYS):
            raise InputError(
                f"{where}: unknown key {unknown[0]!r}; expected one of {', '.join(sorted(_KNOWN_KEYS))}"
            )
        taps = _mapping(document, "taps", where)
        for tap, about in taps.items():
            if not isinstance(about, Mapping) or not all(isinstance(text, str) for text in about.values()):
                raise InputError(f"{where}: taps.{tap} must give capture_point or absent as text")
        arithmetic = document.get("arithmetic")
        if arithmetic is not None and not isinstance(arithmetic, Mapping):
            raise InputError(f"{where}: arithmetic must be an object or null")
        files = document.get("files") or []
        if not isinstance(files, list) or not all(_is_plain(name) for name in files):
            raise InputError(f"{where}: files must name safetensors files of the folder")
        return cls(
            prompts=_prompts(document.get("prompts"), where),
            engine=_mapping(document, "engine", where) or {"name": "unknown"},
            model=_mapping(document, "model", where),
            arithmetic=None if arithmetic is None else Arithmetic.from_dict(arithmetic),
            capture_points={
                t: about["capture_point"] for t, about in taps.items() if "capture_point" in about
            },
            absent={t: about["absent"] for t, about in taps.items() if "absent" in about},
            files=tuple(files),
            arrays_sha256=str(document.get("arrays_sha256") or ""),
        )


class Trace:
    """A trace that lies on disk; arrays are read when they are asked for.

    Attributes:
        folder: where it lies.
        manifest: what it says about itself.
        batch: its tokens.
    """

    def __init__(self, folder: Path) -> None:
        """Open a trace.

        Raises:
            InputError: no manifest, a malformed one, or an unusable safetensors file.
        """
        self.folder = folder
        self.manifest = TraceManifest.from_dict(read_json_object(folder / MANIFEST), str(folder / MANIFEST))
        self.batch = self.manifest.batch
        names = self.manifest.files or tuple(
            path.name for path in list_folder(folder) if path.suffix == ".safetensors"
        )
        self._stored: dict[str, StoredTensor] = {}
        for name in names:
            for key, tensor in read_safetensors(folder / name).items():
                if key in self._stored:
                    raise InputError(f"{folder}: {key} is in {self._stored[key].file.name} and in {name}")
                self._stored[key] = tensor
        self._ids = tuple(prompt for prompt, _ in self.manifest.prompts)

    @property
    def name(self) -> str:
        """A short name for messages: that of the engine, or of the folder."""
        return str(self.manifest.engine.get("name") or self.folder.name)

    @property
    def places(self) -> frozenset[tuple[int, str]]:
        """Layer (`WHOLE_MODEL` for none) and tap of all that is complete: every prompt, every part."""
        found = {_place(key) for key in self._stored}
        return frozenset(place for place in found if place is not None and self.has(*place))

    def has(self, layer: int, tap: str) -> bool:
        """Whether a tap is there for every prompt."""
        return self._names(layer, tap) is not None

    def tap(self, layer: int, tap: str) -> F32:
        """One tap of all tokens, ``float32[n_tokens, channels]``; prompts one after another.

        Raises:
            InputError: it is not there, is `RAGGED`, or has another number of rows than there are tokens.
        """
        rows = [self._array(names, tap) for names in self._required(layer, tap)]
        array = rows[0] if len(rows) == 1 else np.concatenate(rows)
        if tap in RAGGED or array.ndim != 2 or array.shape[0] != self.batch.n_tokens:
            raise InputError(
                f"{self.folder}: {tap_name(layer, tap)} has the shape {list(array.shape)}; "
                f"expected {self.batch.n_tokens} rows, one a token"
            )
        return array

    def ragged(self, layer: int, tap: str) -> list[F32]:
        """One tap of `RAGGED`: for each prompt ``float32[t, heads * t]``, head by head.

        Raises:
            InputError: it is not there, or its shape is not that of scores.
        """
        found = []
        for names, tokens in zip(self._required(layer, tap), self.batch.slices, strict=True):
            array, length = self._array(names, tap), tokens.stop - tokens.start
            if array.ndim == 3 and array.shape[1:] == (length, length):
                # [heads, queries, keys], as torch has it.
                array = np.ascontiguousarray(array.swapaxes(0, 1)).reshape(length, -1)
            if array.ndim != 2 or array.shape[0] != length or array.shape[1] % length:
                raise InputError(
                    f"{self.folder}: {tap_name(layer, tap)} has the shape {list(array.shape)}; "
                    f"expected {length} rows of heads times {length} keys"
                )
            found.append(array)
        return found

    def _required(self, layer: int, tap: str) -> list[tuple[str, ...]]:
        names = self._names(layer, tap)
        if names is None:
            raise InputError(f"{self.folder}: the trace has no {tap_name(layer, tap)}")
        return names

    def _names(self, layer: int, tap: str) -> list[tuple[str, ...]] | None:
        """For each array that a tap is put together from, the names of its parts; None if one is missing."""
        full = tap_name(layer, tap)
        whole = [full] if tap not in RAGGED or len(self._ids) == 1 else []
        for stems in (whole, [f"{full}[{prompt}]" for prompt in self._ids]):
            found = [self._parts(stem, tap) for stem in stems]
            if found and all(found):
                return [names for names in found if names]
        return None

    def _parts(self, stem: str, tap: str) -> tuple[str, ...] | None:
        if stem in self._stored:
            return (stem,)
        head, bracket, prompt = stem.partition("[")
        names = tuple(f"{head}.{part}{bracket}{prompt}" for part in PARTS.get(tap, ()))
        return names if names and all(name in self._stored for name in names) else None

    def _array(self, names: Sequence[str], tap: str) -> F32:
        arrays = [_read(self._stored[name]) for name in names]
        for name, array in zip(names, arrays, strict=True):
            if array.ndim < 2 or array.ndim > (3 if tap in RAGGED else 2):
                raise InputError(
                    f"{self.folder}: {name} has the shape {list(array.shape)}; expected tokens x channels"
                )
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=1)


class TraceWriter:
    """Writes a trace, one file at a time, so that no more than one file's arrays are held.

    The manifest is written last: a folder without one is no trace.
    """

    def __init__(self, folder: Path) -> None:
        """Begin a trace in a folder, which is made where it is missing; files of an earlier trace go."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in list_folder(folder):
            if path.suffix == ".safetensors":
                path.unlink()
        self.folder = folder
        self._files: list[str] = []

    def write(self, stem: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write ``<stem>.safetensors``; names as in `Trace`, values float32 or float16."""
        from safetensors.numpy import save_file

        if not arrays:
            return
        name = f"{stem}.safetensors"
        try:
            save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, self.folder / name)
        except Exception as error:
            # safetensors reports a full disk as its own error type, without an errno.
            raise InputError(f"{self.folder / name}: cannot be written: {error}") from error
        self._files.append(name)

    def finish(self, manifest: TraceManifest) -> Trace:
        """Write the manifest and open the trace."""
        write_manifest(self.folder, manifest, self._files)
        return Trace(self.folder)


def write_manifest(folder: Path, manifest: TraceManifest, files: Sequence[str]) -> None:
    """Write ``trace.json`` beside the safetensors files of a trace, with their digest."""
    digest = hashlib.sha256()
    for name in files:
        with (folder / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    document = {**manifest.to_dict(), "files": list(files), "arrays_sha256": digest.hexdigest()}
    text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    with replacing(folder / MANIFEST) as partial:
        partial.write_text(text, encoding="utf-8")


def _read(tensor: StoredTensor) -> F32:
    from driftscope.kernels.dequantize import dequantize

    if tensor.dtype not in _FLOATS:
        raise InputError(
            f"{tensor.file}: {tensor.name} has the dtype {tensor.dtype}; expected one of {', '.join(_FLOATS)}"
        )
    if not tensor.nbytes:
        return np.zeros(tensor.shape, dtype=np.float32)
    ref = TensorRef(
        tensor.name, tensor.name, tensor.shape, tensor.dtype, tensor.file, tensor.offset, tensor.nbytes
    )
    return dequantize(np.ascontiguousarray(ref.raw()), tensor.dtype).reshape(tensor.shape)


def _place(key: str) -> tuple[int, str] | None:
    """Layer and tap of a stored name; None where the name is not one of a tap."""
    full, layer = key.partition("[")[0], WHOLE_MODEL
    if full.startswith("layers."):
        number, _, full = full.removeprefix("layers.").partition(".")
        if not number.isdigit():
            return None
        layer = int(number)
    stem, _, part = full.rpartition(".")
    return layer, stem if part in PARTS.get(stem, ()) else full


def _prompts(value: Any, where: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: prompts must list at least one prompt with its token ids")
    found = []
    for item in value:
        ids = item.get("ids") if isinstance(item, Mapping) else None
        name = item.get("id") if isinstance(item, Mapping) else None
        if not isinstance(name, str) or not name or set(name) & set("[]") or not _are_ids(ids):
            raise InputError(f"{where}: a prompt needs an id (text without brackets) and ids (token ids)")
        found.append((name, tuple(ids or ())))
    if len({name for name, _ in found}) != len(found):
        raise InputError(f"{where}: two prompts have the same id")
    return tuple(found)


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in value)
    )


def _mapping(document: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = document.get(key) or {}
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: {key} must be an object")
    return value


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def missing_places(trace: Trace, wanted: Iterable[tuple[int, str]]) -> list[str]:
    """Full names of the taps of `wanted` that a trace does not have."""
    return [tap_name(layer, tap) for layer, tap in wanted if not trace.has(layer, tap)]
